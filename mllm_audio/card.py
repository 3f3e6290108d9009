"""The model card of a checkpoint: a README.md for the hub, of what its files say and no more."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

import mllm_audio
from mllm_audio.config import from_dict, read_json
from mllm_audio.evaluation.perplexity import DRIFT_FILE, TextDrift
from mllm_audio.folder import ADAPTER_FILE, PREFIX, is_adapter, read_audio_config
from mllm_audio.modality import AudioConfig
from mllm_audio.tokenizers import AudioLDMTokenizer, DCTTokenizer

AUDIO_TOKENIZERS = {kind.name: kind for kind in (AudioLDMTokenizer, DCTTokenizer)}
STATISTICS = {"audio.latent_mean", "audio.latent_std"}  # tensors that are no parameters
DESCRIBE = (
    'clip = voice.generate(["DESCRIPTION OF A SOUND"])[0]',
    "print(clip.waveform.shape, clip.sample_rate)",
)
TALK = (
    'messages = [{"role": "user", "content": "YOUR REQUEST"}]',
    "for event in voice.generate_interleaved(messages):  # TextDelta or AudioChunk",
    "    print(event)",
)
TRAINED = {  # what of the base model training changed, by mode
    "frozen": "audio modules, beside a base model that stood still",
    "lora": "audio modules and LoRA layers, beside a base model that stood still",
    "full": "audio modules and the whole base model",
}


def model_card(
    folder: Path | str, repo_id: str = "OWNER/NAME", *, license: str | None = None
) -> str:
    """Write the README.md of a hub repository from what a run or checkpoint folder holds.

    A fact that no file of the folder states is left out; of paths only the last component is told.

    Args:
        folder: a checkpoint, an adapter, or a run folder.
        repo_id: where it will be, for title and usage.
        license: of the weights, an identifier of the hub such as "apache-2.0"; None says nothing.

    Raises:
        ValueError: if the folder holds neither a checkpoint nor an adapter, or a damaged file.
    """
    folder = Path(folder)
    audio = audio_config(folder)
    base, mode = _origin(folder)
    has_hub_base = base is not None and is_hub_id(base)
    data = ModelCardData(
        base_model=base if has_hub_base else None,
        base_model_relation=(
            ("adapter" if is_adapter(folder) else "finetune") if has_hub_base else None
        ),
        library_name="mllm-audio",
        license=license,
        pipeline_tag="text-to-audio",
        tags=["text-to-audio", "audio", "mllm-audio", *(["lora"] if mode == "lora" else [])],
    )
    facts = {
        **_model_facts(folder, audio, base, mode),
        **_tokenizer_facts(audio),
        **_run_facts(folder),
        "card written by": f"mllm-audio {code_version()}",
    }
    rows = [
        f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in facts.items() if value
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.split('/')[-1]}",
        "A language model with a voice: it makes sounds from descriptions, as continuous audio "
        f"latents that a {audio.head.name} head draws one after another. The method is that of "
        "[arXiv:2507.09834](https://arxiv.org/abs/2507.09834).",
        "\n".join(["| | |", "|---|---|", *rows]),
        _weights_notice(audio),
        _usage(folder, repo_id, base, has_text=not audio.prompt_streams),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def audio_config(folder: Path) -> AudioConfig:
    """Read the audio section of an adapter or a checkpoint.

    Raises:
        ValueError: if the folder is neither, or its file is damaged.
    """
    if not is_adapter(folder):
        return read_audio_config(folder)
    path = folder / ADAPTER_FILE
    values = read_json(path, "restore the folder")
    config: AudioConfig = from_dict(AudioConfig, values.get("audio", {}), str(path))
    return config


def is_hub_id(name: str) -> bool:
    """Tell the name of a hub repository from a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def public_name(name: str) -> str:
    """Return a hub id as it is, and of a local path only the last component."""
    return name if is_hub_id(name) else PureWindowsPath(name).name  # it knows both slashes


def code_version() -> str:
    """Return the package's version, and the commit where it runs from its own git checkout."""
    root = Path(mllm_audio.__file__).parents[1]
    # Only its own checkout: an environment may lie inside that of another project.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return mllm_audio.__version__
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    commit = result.stdout.strip()
    return f"{mllm_audio.__version__}, commit {commit}" if commit else mllm_audio.__version__


def _read_run(folder: Path) -> dict[str, Any]:
    """Read `run.json`, empty where there is none."""
    path = folder / "run.json"
    return read_json(path, "restore or delete it") if path.is_file() else {}


def _origin(folder: Path) -> tuple[str | None, str | None]:
    """Return base model and mode, as the adapter or else the run says; a mode needs a base."""
    if is_adapter(folder):
        values = read_json(folder / ADAPTER_FILE, "restore the folder")
        return values.get("base"), values.get("mode")
    run = _read_run(folder)
    return run.get("base"), run["adapt"]["mode"] if run.get("base") else None


def _model_facts(
    folder: Path, audio: AudioConfig, base: str | None, mode: str | None
) -> dict[str, str | None]:
    facts: dict[str, str | None] = {}
    if base is not None:
        link = f"[{base}](https://huggingface.co/{base})"
        facts["base model"] = link if is_hub_id(base) else f"`{public_name(base)}`, a local folder"
    facts["trained"] = TRAINED.get(mode or "", mode)
    if (folder / "config.json").is_file():
        facts["backbone"] = read_json(folder / "config.json", "restore it").get("model_type")
    is_decoder = facts.get("backbone") != "audiomar"
    silent_tables = bool(audio.prompt_streams) and is_decoder
    count = f"{_num_parameters(folder, silent_tables=silent_tables):,}"
    facts["parameters"] = f"{count} beside the base model's" if is_adapter(folder) else count
    if audio.conditioner is not None:
        name, _, rest = audio.conditioner.partition(":")
        sources = [part.partition("=") for part in rest.split(",") if part]
        encoders = ", ".join(f"{key} `{public_name(source)}`" for key, _, source in sources)
        facts["prompted by"] = f"`{name}`" + (f": {encoders}" if encoders else "")
    facts["longest clip"] = f"{audio.max_seconds:g} s, {audio.max_tokens} latents"
    return facts


def _num_parameters(folder: Path, *, silent_tables: bool) -> int:
    """Count the elements of all weights, from the headers of their files.

    With `silent_tables` those of the backbone outside its blocks that are matrices are zeros, and
    no parameters.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in set(file.keys()) - STATISTICS:
                    shape = file.get_slice(name).get_shape()
                    in_block = any(part.isdigit() for part in name.split("."))
                    is_table = len(shape) == 2 and not (in_block or name.startswith(PREFIX))
                    total += 0 if silent_tables and is_table else math.prod(shape)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it, or save again") from error
    return total


def _tokenizer_facts(audio: AudioConfig) -> dict[str, str | None]:
    name, colon, source = audio.tokenizer.partition(":")
    fingerprint = f", fingerprint `{audio.tokenizer_fingerprint}`"
    facts: dict[str, str | None] = {
        "audio tokenizer": f"`{name}{colon}{public_name(source) if source else ''}`"
        + (fingerprint if audio.tokenizer_fingerprint else "")
    }
    if kind := AUDIO_TOKENIZERS.get(name):
        facts["licence of its weights"] = kind.weights_license or "none needed, it has no weights"
        facts["sample rate"] = f"{kind.sample_rate:,} Hz"
    return facts


def _run_facts(folder: Path) -> dict[str, str | None]:
    """State preset, data and figures, each where a file of the run has it."""
    run = _read_run(folder)
    facts: dict[str, str | None] = {"preset": run.get("preset")}
    counts = ", ".join(f"{count:,} {split}" for split, count in run.get("data_counts", {}).items())
    names = [PureWindowsPath(run.get("data_manifest", "")).name, counts and f"{counts} clips"]
    facts["data"] = ": ".join(name for name in names if name)
    for key in (key for key in run if key.endswith("_sha256")):
        facts[f"SHA-256 of the {key.removesuffix('_sha256')}"] = f"`{run[key]}`"
    if validation := _last_validation(folder):
        figures = [f"{k.split('/')[1]} {v:.4g}" for k, v in validation.items() if "/" in k]
        facts[f"validation at step {validation['step']:,}"] = ", ".join(figures)
    if (folder / DRIFT_FILE).is_file():
        facts["text"] = str(TextDrift.read(folder))
    return facts


def _last_validation(folder: Path) -> dict[str, float]:
    """Return step and figures of the last validation in `log.jsonl`, empty without one."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in reversed(lines):
        # Without its end, a kill cut the line off.
        if "validation/" in line and line.endswith("\n"):
            record: dict[str, float] = json.loads(line)
            return {k: v for k, v in record.items() if k == "step" or k.startswith("validation/")}
    return {}


def _weights_notice(audio: AudioConfig) -> str:
    """Say what the licence of the audio tokenizer's weights means for the sounds."""
    kind = AUDIO_TOKENIZERS.get(audio.tokenizer.partition(":")[0])
    if kind is None or "NC" not in kind.weights_license.split("-"):
        return ""
    return (
        f"The audio tokenizer's weights are under {kind.weights_license} and not part of this "
        "repository. Sounds made with them are for non-commercial use."
    )


def _usage(folder: Path, repo_id: str, base: str | None, *, has_text: bool) -> str:
    """Show how to load the voice and, of a standalone checkpoint, the text side."""
    is_local = is_adapter(folder) and base is not None and not is_hub_id(base)
    argument = ', base="FOLDER_OF_THE_BASE_MODEL"' if is_local else ""
    lines = [
        "## Use",
        "",
        "```python",
        "from huggingface_hub import snapshot_download",
        "",
        "from mllm_audio import Voice",
        "",
        f'voice = Voice.load(snapshot_download("{repo_id}"){argument})',
        *(TALK if base is not None else DESCRIBE),
        "```",
    ]
    if has_text and not is_adapter(folder):
        lines += [
            "",
            "The text side is an ordinary checkpoint: "
            f'`AutoModelForCausalLM.from_pretrained("{repo_id}")`.',
        ]
    return "\n".join(lines)
