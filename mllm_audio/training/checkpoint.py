"""Atomic checkpoints of a run: safetensors and JSON, no pickle, for any number of processes.

Layout:

    RUN/checkpoints/latest                         name of the newest checkpoint
    RUN/checkpoints/step-00001000/state.json       step, seconds, shapes of the parameters
                                  rank-00000.safetensors, one per process:
                                      KIND/NAME@START  (n,) float32, elements START ... of the
                                                       flattened parameter NAME that the process
                                                       keeps; KIND is in `KINDS`
                                      buffer/NAME      whole, by the first process

Each process writes the part it keeps and reads whatever overlaps it, so a run resumes at any number
of processes and ZeRO stage. A folder appears under its final name only when every part is complete:
a kill during a save leaves the previous one valid, and `latest` pointing to it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm_audio.files import share, write_atomic
from mllm_audio.training.distributed import World

STATE, LATEST = "state.json", "latest"
KINDS = ("weight", "average", "exp_avg", "exp_avg_sq")  # master, EMA and Adam's moments


@dataclass(frozen=True)
class Shard:
    """The part of a flattened parameter, or of a value beside it, that this process keeps."""

    start: int  # first element
    values: Tensor  # (n,) float32, a view of what training uses


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
    run: Path,
    step: int,
    shards: dict[str, Shard],
    buffers: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write a checkpoint, every process its part, then delete all but the last `keep`.

    Args:
        run: folder that all processes see.
        step: optimizer steps done.
        shards: by "KIND/NAME".
        buffers: whole tensors, the same in every process.
        state: small values for JSON, with "shapes" of the parameters by name.
        keep: how many checkpoints to leave.
        world: the processes that take part.

    Raises:
        OSError: if a process could not write its part; the previous checkpoint is intact.
    """
    world = world or World()
    final = checkpoint_path(run, step)
    partial = final.with_suffix(".partial")

    def begin() -> None:
        for left in final.parent.glob("*.partial"):  # of a save that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def write() -> None:
        tensors = {f"{name}@{shard.start}": shard.values for name, shard in shards.items()}
        if world.is_first:
            tensors |= {f"buffer/{name}": value for name, value in buffers.items()}
            (partial / STATE).write_text(json.dumps(state))
            _sync(partial / STATE)
        path = partial / f"rank-{world.rank:05d}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        share(path)
        _sync(path)

    def finish() -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        name_latest(final)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))

    try:
        world.first(begin)
        world.each(write)
        world.first(finish)
    except (OSError, SafetensorError) as error:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write a checkpoint to {run}: {error}; the previous one is intact"
        ) from error
    return final


def name_latest(checkpoint: Path) -> None:
    """Say in `latest` which checkpoint is the newest, for people and scripts."""
    write_atomic(checkpoint.parent / LATEST, checkpoint.name.encode() + b"\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read what is kept beside the tensors.

    Raises:
        ValueError: if it is damaged, naming the folder to delete.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
        return state
    except (OSError, json.JSONDecodeError) as error:
        raise _damaged(checkpoint, error) from error


def fill_shards(checkpoint: Path, shards: dict[str, Shard]) -> None:
    """Copy into each shard what the checkpoint's parts hold of it.

    Raises:
        ValueError: if a file is damaged, or an element is missing.
    """
    try:
        with _Parts(checkpoint) as parts:
            for name, shard in shards.items():
                parts.fill(name, shard)
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from error


def read_buffers(checkpoint: Path) -> dict[str, Tensor]:
    """Read the whole tensors beside the parameters."""
    try:
        with safe_open(checkpoint / "rank-00000.safetensors", framework="pt") as first:
            names = [key for key in first.keys() if key.startswith("buffer/")]  # noqa: SIM118
            return {name.removeprefix("buffer/"): first.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from error


def read_weights(checkpoint: Path, kind: str = "average") -> dict[str, Tensor]:
    """Put the parameters of one kind together from all parts; return a state dict with buffers.

    What training did not change is not in it.
    """
    shapes: dict[str, list[int]] = read_state(checkpoint)["shapes"]
    whole = {name: torch.empty(shape) for name, shape in shapes.items()}
    fill_shards(checkpoint, {f"{kind}/{k}": Shard(0, v.view(-1)) for k, v in whole.items()})
    return whole | read_buffers(checkpoint)


class _Parts:
    """The files of a checkpoint, and which elements each holds."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.files: list[Any] = []
        self.pieces: dict[str, list[tuple[int, Any, str]]] = {}  # start, file, key

    def __enter__(self) -> _Parts:
        for path in sorted(self.checkpoint.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt").__enter__()
            self.files.append(file)
            for key in file.keys():  # noqa: SIM118  not a dict
                name, _, start = key.rpartition("@")
                if name:
                    self.pieces.setdefault(name, []).append((int(start), file, key))
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self.files:
            file.__exit__(*error)

    def fill(self, name: str, shard: Shard) -> None:
        """Copy every piece that overlaps the shard."""
        stop, copied = shard.start + len(shard.values), 0
        for start, file, key in self.pieces.get(name, []):
            piece = file.get_slice(key)
            low, high = max(start, shard.start), min(start + piece.get_shape()[0], stop)
            if low < high:
                values = piece[low - start : high - start]
                with torch.no_grad():
                    shard.values[low - shard.start : high - shard.start].copy_(values)
                copied += high - low
        if copied != len(shard.values):
            raise ValueError(
                f"{self.checkpoint} holds {copied} of {len(shard.values)} elements of {name}, "
                f"expected all: it is damaged or of another model; {_REMEDY}"
            )


_REMEDY = "delete it to resume the one before, or to begin again"


def _damaged(checkpoint: Path, error: Exception) -> ValueError:
    return ValueError(f"checkpoint {checkpoint} cannot be read ({error}); {_REMEDY}")
