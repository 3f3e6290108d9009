"""The layers: a module imports only from strictly lower ones, and third parties stay fenced."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mllm_audio"
SERVING = ROOT / "integrations" / "vllm" / "mllm_audio_vllm"

# Lowest first. A folder stands for every module in it; modules of one folder may import each other.
LAYERS = [
    {"types", "config"},
    {"attention", "wav", "diffusion", "files", "hardware", "quiet"},
    {"tokenizers", "conditioners", "backbone", "heads", "int8", "masking", "text", "weights"},
    {"modality", "adapter", "pretrained", "data", "evaluation", "listening"},
    {"folder"},
    {"card"},
    {"checkpointed", "hub"},
    {"model", "audiomar"},
    {"models", "interop"},
    {"training", "generation", "peers"},
    {"presets"},
    {"build", "claim", "costs"},
    {"run", "info", "bench", "export", "serving"},
    {"add_voice", "chat", "demo", "plan", "reproduce"},
    {"benchmarks", "distill"},
    {"cli", "__main__"},
]
# Modules of one layer that may import another of it, in one direction.
WITHIN = {
    ("checkpointed", "hub"),
    ("__main__", "cli"),
}
# Third parties and the only files that may import them.
FENCES = {
    "deepspeed": {"training/zero.py"},
    "soundfile": {"wav.py"},
    "soxr": {"wav.py"},
    "datasets": {"data/importers/huggingface.py"},
    "diffusers": {"tokenizers/audioldm.py", "peers/pipelines.py", "benchmarks/decode.py"},
    "laion_clap": {"conditioners/laion.py"},
    "torchaudio": {"wav.py"},
    "vllm": set(),
    "matplotlib": set(),
    "peft": {"adapter.py"},
    "fsspec": {"data/remote.py"},
    "wandb": {"training/log.py"},
    "httpx": {"serving/client.py", "serving/load.py"},
}
EXTRAS = {"deepspeed", "diffusers", "laion_clap", "vllm", "torchaudio", "peft", "datasets", "wandb"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            if node.module == "mllm_audio":
                names |= {f"mllm_audio.{alias.name}" for alias in node.names}
    return names


def layer(unit: str) -> int:
    found = [number for number, units in enumerate(LAYERS) if unit in units]
    assert found, f"{unit} has no layer: add it to LAYERS"
    return found[0]


def unit_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in MODULES if p != Path("__init__.py")], ids=str)
def test_modules_import_only_from_lower_layers(path):
    own = unit_of(path)
    for name in imports(path):
        if not name.startswith("mllm_audio."):
            continue
        other = name.split(".")[1]
        allowed = other == own or layer(other) < layer(own) or (own, other) in WITHIN
        assert allowed, f"{path} (layer {layer(own)}) imports {name} (layer {layer(other)})"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_third_parties_are_imported_in_their_one_place(path):
    for name in imports(path):
        allowed = FENCES.get(name.split(".")[0])
        assert allowed is None or path.as_posix() in allowed, f"{path} imports {name}"


def test_diffusion_is_pure_maths():
    for path in MODULES:
        if path.parts[0] == "diffusion":
            assert "torch.nn" not in imports(path)
            assert "nn.Module" not in (PACKAGE / path).read_text()


def test_import_is_quick_and_loads_no_extra():
    script = (
        "import sys, time; start = time.perf_counter(); import mllm_audio; "
        "seconds = time.perf_counter() - start; "
        f"heavy = {EXTRAS}; "
        "print(seconds); print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    seconds, heavy = result.stdout.splitlines()
    assert float(seconds) < 3
    assert heavy == "[]"


def test_every_public_name_resolves_and_loads_no_extra():
    script = (
        "import sys, mllm_audio; [getattr(mllm_audio, name) for name in mllm_audio.__all__]; "
        f"heavy = {EXTRAS}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
    import mllm_audio

    with pytest.raises(AttributeError, match="no attribute 'Voise'"):
        mllm_audio.Voise  # noqa: B018


def test_files_stay_short():
    for path in [*(PACKAGE / module for module in MODULES), *SERVING.rglob("*.py")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 300, f"{path} has {lines} lines"


def test_what_is_decided_in_serving_knows_no_vllm():
    """States, options and the drawing of latents run, and are tested, without an engine."""
    for name in ("state", "decoding", "options", "frames"):
        names = imports(SERVING / f"{name}.py")
        assert not {n for n in names if n.split(".")[0] == "vllm"}, name
