"""Who trains together, from one process to many nodes, and what the model needs for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_audio.audiomar import AudioMAR
from mllm_audio.backbone import blocks
from mllm_audio.models import Model
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.distributed import World
from mllm_audio.training.engine import Engine, SingleProcessEngine
from mllm_audio.training.zero import ZeroEngine, join_world, leave_world
from mllm_audio.training.zero_config import offloads_optimizer, read_zero_config, uses_bf16


@dataclass(frozen=True)
class Cluster:
    """Who trains together, and how; by default this process alone."""

    world: World = field(default_factory=World)
    zero: dict[str, Any] | None = None  # the DeepSpeed file; None: no DeepSpeed

    def engine(self, model: Model, config: TrainConfig) -> Engine:
        """Build the engine that trains `model`."""
        save_memory_and_time(model, config)
        if self.zero is None:
            return SingleProcessEngine(model, config)
        return ZeroEngine(model, config, self.zero, self.world)


@contextmanager
def joined_cluster(deepspeed: Path | None, config: TrainConfig) -> Iterator[Cluster]:
    """Meet the processes that a launcher started, for the time of a `with` block.

    Raises:
        ValueError: if the DeepSpeed file sets what has its home elsewhere, or there are several
            processes and no such file.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if deepspeed is None:
        if size > 1:
            raise ValueError(
                f"found {size} processes (WORLD_SIZE) and no --deepspeed; type --deepspeed "
                "configs/deepspeed/zero2.json"
            )
        yield Cluster()
        return
    zero = read_zero_config(deepspeed)
    if uses_bf16(zero) and config.precision != "bf16":
        raise ValueError(
            f"train.precision={config.precision} and {deepspeed} has bf16 enabled; remove one"
        )
    config.rows_at_once(size)
    yield Cluster(join_world(config.timeout_seconds, offloads_optimizer(zero)), zero)
    leave_world()  # not after an error: the others may still wait for this process


def save_memory_and_time(model: Model, config: TrainConfig) -> None:
    """Switch on gradient checkpointing and compilation where the configuration asks for them.

    Raises:
        ValueError: if the backbone stands still, where transformers checkpoints nothing.
    """
    if isinstance(model, AudioMAR):
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    elif config.gradient_checkpointing:
        if model.origin is not None and model.origin.mode == "frozen":
            raise ValueError(
                "train.gradient_checkpointing=true has no effect on a frozen backbone; leave it "
                "out, or train with --lora"
            )
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        head: Any = model.audio.head
        stack = model.blocks if isinstance(model, AudioMAR) else blocks(model.backbone)
        for block in [*stack, head.network]:
            block.compile(dynamic=True)
