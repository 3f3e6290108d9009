"""`timing.json`: how long generated sounds took, as figures of quality against speed need it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mllm_audio.config import read_json
from mllm_audio.files import write_atomic
from mllm_audio.hardware import machine_name
from mllm_audio.types import Clip

TIMING_FILE = "timing.json"


def timed(path: Path, clip: Clip, seconds: float, batch_size: int) -> dict[str, Any]:
    """Record one sound of a batch that took `seconds` of wall-clock."""
    audio_seconds = len(clip.waveform) / clip.sample_rate
    share = seconds / batch_size
    return {
        "audio": path.name,
        "wall_seconds": share,
        "audio_seconds": audio_seconds,
        "rtf": share / audio_seconds,
        "batch_size": batch_size,
    }


def add_timing(
    out: Path, clips: Sequence[dict[str, Any]], facts: Mapping[str, Any] | None = None
) -> None:
    """Add sounds to a folder's `timing.json`, those of one name replaced."""
    path = out / TIMING_FILE
    before = read_json(path, "delete it")["clips"] if path.is_file() else []
    rows = list({clip["audio"]: clip for clip in [*before, *clips]}.values())
    values = {**(facts or machine_facts()), "rtf": rtf(rows), "clips": rows}
    write_atomic(path, (json.dumps(values, indent=1) + "\n").encode())


def machine_facts() -> dict[str, Any]:
    """Say what times depend on: the machine, its threads, the device."""
    is_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def rtf(clips: Sequence[Mapping[str, Any]]) -> float:
    """Divide the seconds that sounds took by those that they last."""
    wall, audio = (sum(clip[key] for clip in clips) for key in ("wall_seconds", "audio_seconds"))
    return float(wall / audio)
