"""Atomic checkpoints of a run: safetensors and JSON, no pickle.

Layout: RUN/checkpoints/step-00001000/{state.safetensors, state.json}. A folder appears under its
final name only when complete, so a kill during a save leaves the previous one valid.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE = "state.safetensors", "state.json"


def list_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*[0-9]"))


def checkpoint_path(run: Path, step: int) -> Path:
    """Name the checkpoint of optimizer step `step`."""
    return run / "checkpoints" / f"step-{step:08d}"


def has_checkpoint(run: Path, step: int) -> bool:
    """Tell whether the checkpoint of `step` is complete."""
    return checkpoint_path(run, step).is_dir()


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint, then delete all but the last `keep`."""
    final = checkpoint_path(run, step)
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write a checkpoint to {run}: {error}; the previous one is intact"
        ) from error
    for name in (TENSORS, STATE):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder.

    Raises:
        ValueError: if a file is damaged, naming the folder to delete.
    """
    try:
        return load_file(checkpoint / TENSORS), json.loads((checkpoint / STATE).read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read ({error}); delete it to resume the one "
            "before, or to begin again"
        ) from error
