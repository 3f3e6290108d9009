"""Checkpoint and adapter folders: which files they hold, and what is said when they do not.

A checkpoint is the backbone's own, tensor names unchanged, plus `audio.*`: `config.json` has an
`audio` section, and `AutoModelForCausalLM.from_pretrained(folder)` loads the text side. An adapter
holds what training changed beside a backbone that stood still: `audio_adapter.json`, the tensors
`audio.*` and `special_rows.*` in `audio.safetensors`, and, with LoRA, PEFT's two adapter files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mllm_audio.config import from_dict, read_json, to_dict
from mllm_audio.files import write_atomic
from mllm_audio.modality import AudioConfig
from mllm_audio.weights import ADAPTER_FILE, LORA_WEIGHTS, read_tensors, write_tensors

ARCHITECTURE = "AudioLanguageModel"
PREFIX = "audio."  # of every tensor of a checkpoint that is not the backbone's
AUDIO_WEIGHTS = "audio.safetensors"
GENERATION_FILE = "generation_config.json"  # transformers' name


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a voice was added to."""

    base: str  # folder or hub id
    fingerprint: str  # of its weights
    mode: str  # key in adapter.MODES


def write_checkpoint(
    folder: Path,
    backbone: PreTrainedModel,
    audio: AudioConfig,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a standalone checkpoint.

    Args:
        folder: made if absent.
        backbone: whose configuration is written.
        audio: the `audio` section of `config.json`.
        tensors: weights under checkpoint names.
    """
    write_tensors(tensors, folder)
    config = backbone.config.to_dict()
    config |= {"architectures": [ARCHITECTURE], "audio": to_dict(audio)}
    _write_json(folder / "config.json", config)
    if backbone.generation_config is not None:
        _write_json(folder / GENERATION_FILE, backbone.generation_config.to_dict())
    # Last: what is loaded is what was saved last, and a kill before leaves the adapter whole.
    (folder / ADAPTER_FILE).unlink(missing_ok=True)


def read_audio_config(folder: Path) -> AudioConfig:
    """Read the `audio` section of a checkpoint.

    Raises:
        ValueError: if the folder is no checkpoint with a voice.
    """
    path = folder / "config.json"
    if not path.is_file():
        begun = (folder / "run.json").is_file()
        expected = (
            "its training has not saved yet; wait for it, or type its command again"
            if begun
            else "expected a folder that `mllm-audio train` or `add-voice` wrote"
        )
        raise ValueError(f"found no config.json in {folder}: {expected}")
    values = read_json(path, "train again, or restore the folder")
    if "audio" not in values:
        raise ValueError(
            f"{path} has no `audio` section: a text-only checkpoint, not a voice; "
            f"type  mllm-audio add-voice {folder} --out DIR"
        )
    config: AudioConfig = from_dict(AudioConfig, values["audio"], str(path))
    return config


def read_generation_config(folder: Path, backbone: PreTrainedModel) -> None:
    """Give the backbone the text generation settings of the folder, if it has any."""
    if (folder / GENERATION_FILE).is_file():
        backbone.generation_config = GenerationConfig.from_pretrained(folder)


def write_adapter(
    folder: Path,
    origin: Origin,
    audio: AudioConfig,
    tensors: Mapping[str, Tensor],
    lora: Any = None,
    lora_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder; `lora` is PEFT's configuration of `lora_tensors`."""
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a standalone checkpoint; save the adapter elsewhere")
    # Gone while its parts change: a kill in between leaves no adapter rather than a mixed one.
    (folder / ADAPTER_FILE).unlink(missing_ok=True)
    write_tensors(tensors, folder, AUDIO_WEIGHTS)
    if lora is not None:
        write_tensors(lora_tensors or {}, folder, LORA_WEIGHTS)
        lora.save_pretrained(folder)
    _write_json(folder / ADAPTER_FILE, {**asdict(origin), "audio": to_dict(audio)})


def is_adapter(folder: Path) -> bool:
    """Tell an adapter folder from a standalone checkpoint."""
    return (folder / ADAPTER_FILE).is_file()


def read_adapter(folder: Path) -> tuple[Origin, AudioConfig, dict[str, Tensor]]:
    """Read an adapter folder; LoRA tensors come under PEFT's names.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    path = folder / ADAPTER_FILE
    values = read_json(path, "train again, or restore the folder")
    audio: AudioConfig = from_dict(AudioConfig, values.pop("audio", None), str(path))
    origin: Origin = from_dict(Origin, values, str(path))
    tensors = read_tensors(folder, AUDIO_WEIGHTS)
    if origin.mode == "lora":
        tensors |= read_tensors(folder, LORA_WEIGHTS)
    return origin, audio, tensors


def check_base(folder: Path, origin: Origin, base: str, found: str) -> None:
    """Refuse an adapter beside another base than it was trained on.

    Raises:
        ValueError: naming both.
    """
    if found != origin.fingerprint:
        raise ValueError(
            f"{folder} was trained on {origin.base} with fingerprint {origin.fingerprint}, found "
            f"{base} with {found}: another base model; name the one it was trained on with --base"
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
