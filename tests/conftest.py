"""Fixtures shared by the tests: tiny models and data that need no download."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixture_arrays():
    """Load tests/fixtures/NAME.npz as float32 or int64 tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}

    return load


CAPTIONS = ["a low beep", "two high beeps", "noise then a low beep", "a rising sweep"]


def test_run_config(**train):
    """Build a run configuration small enough for unit tests."""
    from mllm_audio.presets import tiny

    config = tiny()
    return replace(
        config,
        backbone=replace(
            config.backbone,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            max_positions=64,
            dropout=0.1,
        ),
        audio=replace(
            config.audio, max_tokens=16, head=replace(config.audio.head, width=32, num_blocks=1)
        ),
        train=replace(config.train, **{"max_minutes": None, "batch_size": 4, **train}),
    )


test_run_config.__test__ = False  # a helper, not a test


@pytest.fixture(scope="session")
def text_tokenizer():
    """A tokenizer trained on `CAPTIONS`."""
    from mllm_audio.text import train_text_tokenizer

    return train_text_tokenizer(CAPTIONS)


@pytest.fixture
def special(text_tokenizer):
    """The special ids of `text_tokenizer`."""
    from mllm_audio.text import SpecialIds

    return SpecialIds.of(text_tokenizer)


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    """Every backbone family."""
    return request.param


@pytest.fixture
def make_model(text_tokenizer):
    """Build a tiny model whose zero-initialised outputs are made random, so that nothing is 0."""
    from mllm_audio.build import build_model

    def make(family: str = "gpt2", head: str = "flow", **audio):
        config = test_run_config()
        config = replace(
            config,
            backbone=replace(config.backbone, family=family),
            audio=replace(config.audio, head=replace(config.audio.head, name=head), **audio),
        )
        model = build_model(config, len(text_tokenizer))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.audio.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.audio.set_statistics(torch.full((128,), 0.5), torch.linspace(0.5, 2.0, 128))
        return model.eval()

    return make


def sine_manifest(folder: Path, count: int = 12, seconds: float = 0.5) -> Path:
    """Write short captioned tones and their manifest."""
    import json

    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        frequency = 200 * (1 + index % 4)
        time = np.arange(int(16000 * (seconds + 0.04 * (index % 3)))) / 16000
        wave = 0.3 * np.sin(2 * np.pi * frequency * time) * np.exp(-3 * time)
        soundfile.write(folder / f"{index}.wav", wave.astype(np.float32), 16000)
        split = "validation" if index % 4 == 3 else "train"
        rows.append({"audio": f"{index}.wav", "caption": CAPTIONS[index % 4], "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


def labelled_manifest(folder: Path) -> Path:
    """Write twelve labelled tones to train on, and twelve of split test."""
    import json
    import shutil

    sine_manifest(folder / "tones")
    rows = []
    for index in range(24):
        name = f"tones/take{index}.wav"
        shutil.copyfile(folder / f"tones/{index % 12}.wav", folder / name)
        split = "train" if index < 12 else "test"
        row = {"audio": name, "caption": CAPTIONS[index % 4], "label": "ab"[index % 2]}
        rows.append({**row, "split": split})
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared folder of a dozen short tones."""
    from mllm_audio.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tones")
    prepare(sine_manifest(folder), folder / "data", "dct", progress=False)
    return folder / "data"


# Decoders of every family that is tested, as their checkpoints are configured, but tiny.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
BASES = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "vocab_size": 320}),  # spare rows
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 12}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 12}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "phi": ("PhiConfig", {}),
    "cohere": ("CohereConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}),
}


def write_base(folder: Path, name: str = "gpt2", seed: int = 0) -> Path:
    """Write a tiny random checkpoint with a text tokenizer, in the layout of its family."""
    import transformers

    from mllm_audio.text import SPECIAL_TOKENS, train_text_tokenizer

    tokenizer = train_text_tokenizer(CAPTIONS, vocab_size=300, special_tokens=["<|end|>"])
    tokenizer.eos_token = "<|end|>"
    assert not set(SPECIAL_TOKENS) & set(tokenizer.get_vocab())
    tokenizer.save_pretrained(folder)
    kind, options = BASES[name]
    sizes = SIZES if name != "gpt2" else {"bos_token_id": None, "eos_token_id": None}
    sizes = {"vocab_size": len(tokenizer)} | sizes | options
    config = getattr(transformers, kind)(**sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms and biases too: nothing may be 0 or 1 by chance of its start
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Give the folder of a tiny base model of a family."""
    made: dict[str, Path] = {}

    def get(name: str = "gpt2") -> Path:
        if name not in made:
            made[name] = write_base(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get
