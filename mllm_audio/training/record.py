"""What a run tells of itself, by its first process: a bar on the terminal and the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from mllm_audio.training.config import TrainConfig
from mllm_audio.training.engine import Engine, StepResult
from mllm_audio.training.log import TrainLog
from mllm_audio.training.telemetry import Telemetry
from mllm_audio.types import StepCounts

# Progress by steps or by time, whichever is further.
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Record:
    """Follow the steps of a run; in processes other than the first it does nothing."""

    def __init__(self, engine: Engine, config: TrainConfig, run: Path, steps_done: int) -> None:
        self.config = config
        self.log: TrainLog | None = None
        if not engine.world.is_first:
            return
        self.log = TrainLog(run, steps_done + 1, config.wandb_project)
        self.telemetry = Telemetry(
            engine.model,
            num_processes=engine.world.size,
            peak_tflops=config.peak_tflops,
            seconds=time.monotonic(),
        )
        self.bar = tqdm(total=1.0, desc="training", bar_format=BAR_FORMAT, dynamic_ncols=True)

    @property
    def validated(self) -> int:
        """Return the step of the last validation on record, 0 if there is none."""
        return 0 if self.log is None else self.log.validated

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self.log is not None:
            self.bar.close()
            self.log.close()

    def step(
        self,
        step: int,
        result: StepResult,
        counts: StepCounts,
        masking_ratio: float,
        lr: float,
        seconds: float,
        now: float,
    ) -> None:
        """Count optimizer step `step` (from 1), and log it where it is due.

        Args:
            step: number of the step.
            result: its losses.
            counts: what it held, over all processes.
            masking_ratio: of all its rows.
            lr: its learning rate.
            seconds: of training before it.
            now: share of the run that is done.
        """
        if self.log is None:
            return
        self.telemetry.add(masking_ratio, result.audio, counts)
        self.bar.update(now - self.bar.n)
        if step % self.config.log_every and step != 1:
            return
        self.bar.set_postfix(step=step, loss=f"{result.audio:.3f}")
        self.log.write(
            step,
            {
                "train/audio_loss": result.audio,
                "train/end_loss": result.end,
                **({"train/text_loss": result.text} if counts.words else {}),
                "train/grad_norm": result.grad_norm,
                "train/masking_ratio": masking_ratio,
                "train/latents": counts.targets,
                "lr": lr,
                "seconds": seconds,
                **self.telemetry.read(time.monotonic()),
            },
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log other values at `step`."""
        if self.log is not None:
            self.log.write(step, values)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is done in a `with` block out of the speed of training."""
        started = time.monotonic()
        yield
        if self.log is not None:
            self.telemetry.leave_out(time.monotonic() - started)
