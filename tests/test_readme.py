"""The README: its commands and code run as typed, its tree and tables match the code."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import labelled_manifest, sine_manifest, write_base

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What is added to a README command so that it takes seconds; the rest runs as written.
SHORTER = {
    "train": ["train.num_steps=3", "backbone.num_layers=1", "audio.head.width=32"],
    "demo": ["--minutes", "0.02", "--clips", "40"],
    "add-voice": ["train.num_steps=2", "audio.max_tokens=16", "audio.head.width=32"],
    "chat": ["--max-new-tokens", "8"],
    "reproduce": ["--rows", "E", "--seeds", "1", "--steps", "2", "audio.head.width=32"],
    "torchrun": ["train.num_steps=3", "train.batch_size=4", "backbone.num_layers=1"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    sine_manifest(folder)
    labelled_manifest(folder)
    row = blocks("json")[0].replace("seven.wav", "1.wav")
    (folder / "talk.jsonl").write_text(row * 4)
    (folder / "held_out.txt").write_text("a rising sweep and a low beep")
    write_base(folder / "my-model")
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


@pytest.mark.slow
def test_every_command_and_code_block_runs_in_order(workplace, monkeypatch, capsys):
    from mllm_audio.cli import main

    monkeypatch.chdir(workplace)
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    named = {line.split()[0 if line.startswith("torchrun") else 1] for line in commands}
    assert named == set(SHORTER) | {
        "prepare", "generate", "info", "merge", "plan", "export", "bench", "evaluate",
    }  # fmt: skip
    for line in commands:
        arguments = shlex.split(line)
        if arguments[0] == "torchrun":
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            subprocess.run([*launcher, *arguments[1:], *SHORTER["torchrun"]], check=True)
            continue
        monkeypatch.setattr(sys, "argv", arguments + SHORTER.get(arguments[1], []))
        monkeypatch.setattr(sys, "stdin", io.StringIO("say seven\n"))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, f"{line}\n{capsys.readouterr().err}"
    assert (workplace / "beeps.wav").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert re.search(
        r"caption adherence: [\d.]+% of 80 held-out captions \(real soundscapes: ", printed
    )
    assert "<audio" in (workplace / "runs/demo/report.html").read_text()
    output = io.StringIO()
    code = blocks("python")
    assert len(code) == 2
    with contextlib.redirect_stdout(output):
        for block in code:
            exec(compile(block, "README.md", "exec"), {})
    assert "torch.Size([20480]) 16000" in output.getvalue()
    assert (workplace / "runs/untrained/adapter_model.safetensors").is_file()
    assert (workplace / "runs/zero-raw/model.safetensors").is_file()
    assert (workplace / "runs/voice-merged/config.json").is_file()
    assert "fd_judge" in (workplace / "scores/report.html").read_text()


def test_the_tree_matches_the_disk():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "scripts/tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.tree() in README, "type: python scripts/tree.py --write"


def test_the_tables_named_in_the_readme_exist():
    from mllm_audio.backbone import FAMILIES
    from mllm_audio.conditioners import CONDITIONERS
    from mllm_audio.diffusion.samplers import NOISE_SAMPLERS, VELOCITY_SAMPLERS
    from mllm_audio.evaluation.embedders import EMBEDDERS
    from mllm_audio.evaluation.measures import METRICS
    from mllm_audio.heads import HEADS
    from mllm_audio.masking import SCHEDULES
    from mllm_audio.presets import PRESETS
    from mllm_audio.reproduce.tables import TABLES
    from mllm_audio.tokenizers import TOKENIZERS

    tables = {
        "CONDITIONERS": CONDITIONERS,
        "EMBEDDERS": EMBEDDERS,
        "FAMILIES": FAMILIES,
        "METRICS": METRICS,
        "TABLES": TABLES,
        "NOISE_SAMPLERS": NOISE_SAMPLERS,
        "VELOCITY_SAMPLERS": VELOCITY_SAMPLERS,
        "HEADS": HEADS,
        "SCHEDULES": SCHEDULES,
        "PRESETS": PRESETS,
        "TOKENIZERS": TOKENIZERS,
    }
    section = README.split("## Extend")[1].split("## Limits")[0]
    assert set(re.findall(r"`([A-Z_]{5,})`", section)) == set(tables)
    assert all(tables.values())


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert shutil.which("make")
