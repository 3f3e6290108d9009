"""The record of a run: RUN/log.jsonl, RUN/tensorboard/ and, if asked for, Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mllm_audio.config import read_json
from mllm_audio.files import encode_lines, write_atomic

WANDB_FILE = "wandb.json"  # of a run folder: the id of its run at Weights & Biases


class TrainLog:
    """Append one JSON line per record, and the same numbers to TensorBoard and W&B.

    Attributes:
        validated: the step of the last validation on record, 0 if there is none.
    """

    def __init__(self, run: Path, first_step: int, wandb_project: str | None = None) -> None:
        """Open the record of a run to go on at `first_step`.

        Args:
            run: its folder.
            first_step: records from there on are written again.
            wandb_project: name of a project at Weights & Biases; None logs nothing there.

        Raises:
            ValueError: if wandb is not installed, or does not start.
        """
        self._wandb = _begin_wandb(run, wandb_project) if wandb_project else None
        self.path = run / "log.jsonl"
        _forget_after(self.path, first_step)
        self._file = self.path.open("a")
        validations = [r["step"] for r in read_log(run) if "validation/audio_loss" in r]
        self.validated = int(max(validations, default=0))
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at `step`, on disk before returning."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if "validation/audio_loss" in values:
            self.validated = step
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Flush and close the files, and the run at W&B."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_log(run: Path) -> list[dict[str, float]]:
    """Read the whole lines of RUN/log.jsonl; a line cut off by a kill is left out."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _forget_after(path: Path, first_step: int) -> None:
    """Drop records at or after `first_step`: a resumed run writes them again."""
    kept = [record for record in read_log(path.parent) if record["step"] < first_step]
    write_atomic(path, encode_lines(kept))


def _begin_wandb(run: Path, project: str) -> Any:
    """Begin a run at Weights & Biases, or go on with the one that RUN/wandb.json names."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"train.wandb_project={project} needs wandb; type: pip install 'mllm-audio[wandb]'"
        ) from error
    path = run / WANDB_FILE
    known = read_json(path, "delete it to begin another W&B run")["id"] if path.is_file() else None
    try:
        started = wandb.init(
            project=project, name=run.resolve().name, id=known, dir=run, resume="allow"
        )
    except wandb.Error as error:
        raise ValueError(
            f"W&B did not start ({error}); type: wandb login, set WANDB_MODE=offline, or leave "
            "train.wandb_project out"
        ) from error
    # A killed run goes on before its last record, and W&B's own step cannot go back.
    started.define_metric("step", hidden=True)
    started.define_metric("*", step_metric="step")
    write_atomic(path, json.dumps({"id": started.id}).encode())
    return started
