"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import astuple, fields
from itertools import islice
from pathlib import Path

import torch

from mllm_audio.data.dataset import TrainingData, seeded
from mllm_audio.training.checkpoint import (
    checkpoint_path,
    fill_shards,
    has_checkpoint,
    list_checkpoints,
    name_latest,
    read_buffers,
    read_state,
    save_checkpoint,
)
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.distributed import World, lost_contact
from mllm_audio.training.engine import Engine, StepResult, buffers
from mllm_audio.training.guards import (
    StopSignal,
    TrainingStoppedError,
    check_finite,
    check_range,
    memory_advice,
)
from mllm_audio.training.optim import learning_rate
from mllm_audio.training.record import Record
from mllm_audio.types import Batch, StepCounts


def train(
    engine: Engine,
    data: TrainingData,
    validation: TrainingData | None,
    config: TrainConfig,
    run: Path,
    export: Callable[[Path], None],
) -> None:
    """Train until `num_steps` or `max_minutes`, resuming the newest checkpoint of `run`.

    Every process of the engine's world calls this, with the same arguments.

    Args:
        engine: holds the model, optimizer and averages.
        data: what to train on.
        validation: what to measure the averaged weights on, without masking; may be None.
        config: how long and how often.
        run: folder for checkpoints and logs, that all processes see.
        export: called in the first process with each new checkpoint, to write the model for
            `generate`.

    Raises:
        TrainingStoppedError: on a non-finite loss or a latent out of range, naming the clips.
        RuntimeError: if another process is lost, or memory runs out.
    """
    world = engine.world
    step, seconds = resume(engine, run)
    started = time.monotonic() - seconds
    steps = data.steps(step, world.rank, world.size)

    def keep() -> None:
        save(engine, run, step, time.monotonic() - started, config.keep_checkpoints)
        world.first(lambda: export(checkpoint_path(run, step)))

    with StopSignal() as stop, closing(steps), Record(engine, config, run, step) as record:
        while True:
            batches = next(steps)
            counts, seconds, stopping = agree(world, batches, started, stop.requested)
            now = progress(config, step, seconds)
            if stopping or now >= 1:
                break
            lr = learning_rate(config.optim, step, now)
            result = do_step(engine, batches, counts, lr, step, config)
            step += 1
            now = progress(config, step, seconds)
            record.step(step, result, counts, batches[0].masking_ratio, lr, seconds, now)
            with record.pause():
                if validation is not None and step % config.validate_every == 0:
                    record.write(step, validate(engine, validation, config))
                if step % config.save_every == 0:
                    keep()
        measured = world.first(lambda: record.validated == step)
        if validation is not None and not measured and not stopping:
            record.write(step, validate(engine, validation, config))
        if world.first(lambda: has_checkpoint(run, step)):
            # A kill may have fallen between that checkpoint and its export.
            world.first(lambda: export(checkpoint_path(run, step)))
        else:
            keep()
    if stopping:
        raise KeyboardInterrupt(f"stopped after step {step}")


def resume(engine: Engine, run: Path) -> tuple[int, float]:
    """Load the newest checkpoint of `run`, if any; return (step, seconds trained).

    Raises:
        ValueError: if it is damaged, naming it.
    """
    checkpoint = engine.world.first(lambda: newest(run))
    if checkpoint is None:
        return 0, 0.0
    state = read_state(checkpoint)
    fill_shards(checkpoint, engine.shards())
    own = buffers(engine.model)
    for name, value in read_buffers(checkpoint).items():
        own[name].copy_(value)
    engine.continue_from(int(state["step"]))
    return int(state["step"]), float(state["seconds"])


def newest(run: Path) -> Path | None:
    """Find the newest checkpoint; a kill may have fallen before `latest` named it."""
    checkpoints = list_checkpoints(run)
    if checkpoints:
        name_latest(checkpoints[-1])
    return checkpoints[-1] if checkpoints else None


def save(engine: Engine, run: Path, step: int, seconds: float, keep: int) -> None:
    """Write the checkpoint of `step`, every process its part."""
    world, model = engine.world, engine.model
    shapes = {
        name: list(getattr(p, "ds_shape", p.shape))  # ZeRO 3 leaves parameters empty
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    state = {"step": step, "seconds": seconds, "world_size": world.size, "shapes": shapes}
    shards = engine.shards() if world.is_first or not engine.replicated else {}
    save_checkpoint(run, step, shards, buffers(model), state, keep, world)


def agree(
    world: World, batches: Sequence[Batch], started: float, stop: bool
) -> tuple[StepCounts, float, bool]:
    """Exchange what all processes must decide alike before a step.

    Returns:
        What the step holds over all processes, the first one's seconds of training, and whether
        any of them was asked to stop.
    """
    own = sum((batch.counts for batch in batches), StepCounts())
    seconds = time.monotonic() - started if world.is_first else 0.0
    *total, elapsed, stops = world.sum([*astuple(own), seconds, float(stop)])
    names = [field.name for field in fields(own)]
    counts = StepCounts(**{name: int(n) for name, n in zip(names, total, strict=True)})
    return counts, elapsed, stops > 0


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """Return how much of the run is done, by steps or by time, whichever is further."""
    by_time = seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    return max(step / config.num_steps, by_time)


def do_step(
    engine: Engine,
    batches: Sequence[Batch],
    counts: StepCounts,
    lr: float,
    step: int,
    config: TrainConfig,
) -> StepResult:
    """Do one optimizer step between its guards."""
    audio = engine.model.audio
    batches = [batch.to(engine.model.device) for batch in batches]
    for batch in batches:
        check_range(audio, batch, config.max_abs_latent)
    engine.model.train()
    rows = max(len(batch.names) for batch in batches)
    repeats = audio.config.head.batch_multiplier
    with lost_contact(), memory_advice(config, rows, repeats):
        result = engine.train_step(batches, counts, lr, step)
    check_finite(result, batches, step)
    return result


@torch.no_grad()
def validate(engine: Engine, data: TrainingData, config: TrainConfig) -> dict[str, float]:
    """Measure the averaged weights on held-out clips, with fixed noise.

    Micro-batches are shared out among the processes; as ZeRO 3 needs all of them in every forward,
    those that have none left repeat one without counting it.
    """
    world = engine.world
    size = config.rows_at_once(world.size)
    epoch = list(islice(data.epoch(0), config.validation_batches))
    micro = [rows[i : i + size] for rows in epoch for i in range(0, len(rows), size)]
    totals = [0.0] * 3
    counted = [0] * 3
    engine.model.eval()
    with engine.ema.applied():
        for first in range(0, len(micro), world.size):
            number = first + world.rank
            own = number if number < len(micro) else 0
            batch = data.batch(micro[own], epoch=0, step=own)
            losses = engine.losses(batch, seeded("validation", config.seed, own))
            if number == own:
                means = (losses.audio, losses.end, losses.text)
                counts = (batch.counts.latents, batch.counts.targets, batch.counts.words)
                totals = [t + float(m) * n for t, m, n in zip(totals, means, counts, strict=True)]
                counted = [c + n for c, n in zip(counted, counts, strict=True)]
    sums = world.sum([*totals, *counted])
    names = ("audio_loss", "end_loss", "text_loss")
    values = {
        f"validation/{name}": total / max(1, count)
        for name, total, count in zip(names, sums[:3], sums[3:], strict=True)
        if count or name != "text_loss"
    }
    if not all(math.isfinite(value) for value in values.values()):
        raise TrainingStoppedError(f"validation gave {values}: the averaged weights are not finite")
    return values
