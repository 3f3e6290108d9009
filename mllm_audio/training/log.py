"""The record of a run: RUN/log.jsonl and RUN/tensorboard/."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mllm_audio.files import encode_lines, write_atomic


class TrainLog:
    """Append one JSON line per record, and the same numbers to TensorBoard.

    Attributes:
        validated: the step of the last validation on record, 0 if there is none.
    """

    def __init__(self, run: Path, first_step: int) -> None:
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

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._tensorboard.close()


def read_log(run: Path) -> list[dict[str, float]]:
    """Read the whole lines of RUN/log.jsonl; a line cut off by a kill is left out."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _forget_after(path: Path, first_step: int) -> None:
    """Drop records at or after `first_step`: a resumed run writes them again."""
    kept = [record for record in read_log(path.parent) if record["step"] < first_step]
    write_atomic(path, encode_lines(kept))
