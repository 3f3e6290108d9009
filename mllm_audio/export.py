"""A checkpoint of a run as a folder of its own: averaged weights, or those of one step."""

from __future__ import annotations

import shutil
from pathlib import Path

from mllm_audio.claim import RUN_FILE
from mllm_audio.generation.voice import Voice
from mllm_audio.training.checkpoint import (
    checkpoint_path,
    has_checkpoint,
    list_checkpoints,
    read_weights,
)

KINDS = {"ema": "average", "raw": "weight"}  # as typed, and in checkpoints


def export(
    run: Path, out: Path, weights: str = "ema", step: int | None = None, base: str | None = None
) -> Path:
    """Write the voice of a checkpoint, whatever number of processes saved it, and load it back.

    Args:
        run: folder of the run.
        out: new or empty folder.
        weights: "ema", the averages that `generate` uses, or "raw", those of the last step.
        step: of the checkpoint; by default the newest.
        base: where an adapter's base model is now, if it moved.

    Returns:
        The checkpoint that was written.

    Raises:
        ValueError: if there is no such checkpoint, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists, expected a new or empty folder; type another")
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run} holds no checkpoint; expected a folder that train writes")
    if step is not None and not has_checkpoint(run, step):
        found = ", ".join(str(int(path.name.partition("-")[2])) for path in checkpoints)
        raise ValueError(f"{run} holds no checkpoint of step {step}; found {found}")
    checkpoint = checkpoints[-1] if step is None else checkpoint_path(run, step)
    voice = Voice.load(run, base, merge=False)
    voice.save(out, read_weights(checkpoint, KINDS[weights]))
    shutil.copyfile(run / RUN_FILE, out / RUN_FILE)
    Voice.load(out, base)
    return checkpoint
