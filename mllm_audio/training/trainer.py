"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from mllm_audio.config import check_range as check_config_range
from mllm_audio.config import nearest
from mllm_audio.data.dataset import TrainingData, seeded
from mllm_audio.training.checkpoint import (
    has_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from mllm_audio.training.engine import PRECISIONS, SingleProcessEngine, StepResult
from mllm_audio.training.log import TrainLog
from mllm_audio.training.optim import OptimConfig, learning_rate
from mllm_audio.types import Batch


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large and how often; the learning rate is in `optim`."""

    num_steps: int = 100_000  # optimizer steps
    max_minutes: float | None = (
        None  # end earlier after this much training time; schedules follow it
    )
    batch_size: int = 64  # clips per optimizer step
    ema_decay: float = 0.9999  # of the averaged weights that are exported
    precision: str = "bf16"  # float32, or bf16 autocast over float32 weights
    seed: int = 0  # of weights, data order, masks and noise
    log_every: int = 20  # steps
    validate_every: int = 500  # steps
    validation_batches: int = 8  # at most this many
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2  # the last n
    max_abs_latent: float = 100.0  # guard: stop when a normalised latent exceeds this many stds
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        """Check counts and the precision's name."""
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"unknown precision {self.precision!r}; {nearest(self.precision, PRECISIONS)}"
            )
        check_config_range("train", self, 0, math.inf, "max_minutes", open_low=True)
        check_config_range("train", self, 0, 1, "ema_decay")
        for name in (
            "validation_batches",
            "num_steps",
            "batch_size",
            "log_every",
            "validate_every",
            "save_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")


# Progress by steps or by time, whichever is further.
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class TrainingStoppedError(RuntimeError):
    """Training met numbers it must not continue from."""


def train(
    engine: SingleProcessEngine,
    data: TrainingData,
    validation: TrainingData | None,
    config: TrainConfig,
    run: Path,
    export: Callable[[], None],
) -> None:
    """Train until `num_steps` or `max_minutes`, resuming the newest checkpoint of `run`.

    Args:
        engine: holds the model, optimizer and averages.
        data: what to train on.
        validation: what to measure the averaged weights on, without masking; may be None.
        config: how long and how often.
        run: folder for checkpoints and logs.
        export: called after each save, to write the model for `generate`.

    Raises:
        TrainingStoppedError: on a non-finite loss or a latent out of range, naming the clips.
    """
    step, seconds = resume(engine, run)
    log = TrainLog(run, first_step=step + 1)
    bar = tqdm(total=1.0, desc="training", bar_format=BAR_FORMAT, dynamic_ncols=True)
    started, steps = time.monotonic() - seconds, data.steps(step)

    def save() -> None:
        state = {"step": step, "seconds": time.monotonic() - started}
        save_checkpoint(run, step, engine.state_dict(), state, config.keep_checkpoints)
        export()

    with StopSignal() as stop, closing(log), bar:
        while not stop.requested:
            now = progress(config, step, time.monotonic() - started)
            if now >= 1:
                break
            batch = next(steps)
            check_range(engine, batch, config.max_abs_latent)
            torch.manual_seed(seeded("dropout", config.seed, step).initial_seed())
            engine.model.train()
            lr = learning_rate(config.optim, step, now)
            result = engine.train_step(batch, lr, step, seeded("noise", config.seed, step))
            check_finite(result, batch, step)
            step += 1
            bar.update(now - bar.n)
            if step % config.log_every == 0 or step == 1:
                bar.set_postfix(step=step, loss=f"{result.losses.audio:.3f}")
                log.write(step, record(result, batch, lr, time.monotonic() - started))
            if validation is not None and step % config.validate_every == 0:
                log.write(step, validate(engine, validation, config))
            if step % config.save_every == 0:
                save()
        if validation is not None and log.validated < step and not stop.requested:
            log.write(step, validate(engine, validation, config))
        if has_checkpoint(run, step):
            export()  # a kill may have fallen between that checkpoint and its export
        else:
            save()
    if stop.requested:
        raise KeyboardInterrupt(f"stopped after step {step}")


class StopSignal:
    """Turn SIGINT and SIGTERM into a request that the loop honours between two steps.

    An interrupt inside a step would leave weights, moments and averages of different steps.
    """

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._before = {n: signal.signal(n, self._request) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True


def resume(engine: SingleProcessEngine, run: Path) -> tuple[int, float]:
    """Load the newest checkpoint of `run`, if any; return (step, seconds trained)."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return 0, 0.0
    tensors, state = load_checkpoint(checkpoints[-1])
    engine.load_state_dict(tensors)
    return int(state["step"]), float(state["seconds"])


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """Return how much of the run is done, by steps or by time, whichever is further."""
    by_time = seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    return max(step / config.num_steps, by_time)


def check_range(engine: SingleProcessEngine, batch: Batch, limit: float) -> None:
    """Stop before a latent far outside the training statistics reaches the weights."""
    if not len(batch.latents):
        return
    largest = engine.model.audio.normalise(batch.latents.to(engine.model.device)).abs().max()
    if not float(largest) <= limit:
        raise TrainingStoppedError(
            f"a latent {float(largest):.3g} stds from the mean (limit {limit:g}) in one of: "
            f"{name_list(batch)}; check these files, or raise train.max_abs_latent"
        )


def check_finite(result: StepResult, batch: Batch, step: int) -> None:
    """Stop at the first loss or gradient that is not a number, before it reached the weights."""
    loss = result.losses.total.detach()
    if not (bool(torch.isfinite(loss)) and bool(torch.isfinite(result.grad_norm))):
        raise TrainingStoppedError(
            f"step {step + 1}: loss {float(loss):.4g}, gradient norm "
            f"{float(result.grad_norm):.4g}, on: {name_list(batch)}; check these files, or lower "
            "train.optim.lr; the run resumes from its last checkpoint"
        )


def name_list(batch: Batch, most: int = 8) -> str:
    """Name the clips of a batch, the first `most` of them."""
    more = f" and {len(batch.names) - most} more" if len(batch.names) > most else ""
    return ", ".join(batch.names[:most]) + more


def record(result: StepResult, batch: Batch, lr: float, seconds: float) -> dict[str, float]:
    """Collect what is logged of one step."""
    says = bool((batch.text_labels >= 0).any())
    return {
        "train/audio_loss": float(result.losses.audio),
        "train/end_loss": float(result.losses.end),
        **({"train/text_loss": float(result.losses.text)} if says else {}),
        "train/grad_norm": float(result.grad_norm),
        "train/masking_ratio": batch.masking_ratio,
        "train/latents": len(batch.target_positions),
        "lr": lr,
        "seconds": seconds,
    }


@torch.no_grad()
def validate(
    engine: SingleProcessEngine, data: TrainingData, config: TrainConfig
) -> dict[str, float]:
    """Measure the averaged weights on held-out clips, with fixed noise."""
    engine.model.eval()
    totals = {"audio_loss": 0.0, "end_loss": 0.0, "text_loss": 0.0}
    latents, words = 0, 0
    with engine.ema.applied():
        for index, rows in enumerate(data.epoch(0)[: config.validation_batches]):
            batch = data.batch(rows, epoch=0, step=index)
            losses = engine.losses(batch, seeded("validation", config.seed, index))
            num_latents, num_words = (
                len(batch.target_positions),
                int((batch.text_labels >= 0).sum()),
            )
            totals["audio_loss"] += float(losses.audio) * num_latents
            totals["end_loss"] += float(losses.end) * num_latents
            totals["text_loss"] += float(losses.text) * num_words
            latents, words = latents + num_latents, words + num_words
    counts = {"audio_loss": latents, "end_loss": latents, "text_loss": words}
    values = {
        f"validation/{name}": total / max(1, counts[name])
        for name, total in totals.items()
        if words or name != "text_loss"
    }
    if not all(math.isfinite(value) for value in values.values()):
        raise TrainingStoppedError(f"validation gave {values}: the averaged weights are not finite")
    return values
