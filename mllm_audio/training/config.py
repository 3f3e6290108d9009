"""How long, how large and how often to train."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mllm_audio.config import check_range, nearest
from mllm_audio.training.optim import OptimConfig

PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The learning rate is in `optim`; memory and communication are the DeepSpeed file's."""

    num_steps: int = 100_000  # optimizer steps
    max_minutes: float | None = (
        None  # end earlier after this much training time; schedules follow it
    )
    batch_size: int = 64  # rows per optimizer step, over all processes
    # Rows that a process computes at once, the rest of its share one after another; None: all.
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False  # compute the backbone's blocks twice to store less
    compile: bool = False  # torch.compile the backbone's blocks and the head
    ema_decay: float = 0.9999  # of the averaged weights that are exported
    precision: str = "bf16"  # float32, or bf16 autocast over float32 weights
    seed: int = 0  # of weights, data order, masks and noise
    log_every: int = 20  # steps
    wandb_project: str | None = None  # also log to this project of Weights & Biases
    peak_tflops: float | None = None  # of one device in bf16, for the MFU of unknown devices
    validate_every: int = 500  # steps
    validation_batches: int = 8  # at most this many
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2  # the last n
    max_abs_latent: float = 100.0  # guard: stop when a normalised latent exceeds this many stds
    timeout_seconds: float = 600.0  # for an answer from another process
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        """Check counts and the precision's name."""
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"unknown precision {self.precision!r}; {nearest(self.precision, PRECISIONS)}"
            )
        check_range("train", self, 0, math.inf, "max_minutes", "peak_tflops", open_low=True)
        check_range("train", self, 1, 86_400, "timeout_seconds")
        check_range("train", self, 0, 1, "ema_decay")
        for name in (
            "validation_batches",
            "num_steps",
            "batch_size",
            "micro_batch_size",
            "log_every",
            "validate_every",
            "save_every",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name}={value} must be at least 1")

    def rows_at_once(self, world_size: int) -> int:
        """Count the rows of a micro-batch on `world_size` processes.

        Raises:
            ValueError: if micro-batches cannot be shared out evenly.
        """
        size = self.micro_batch_size or -(-self.batch_size // world_size)
        if self.batch_size % (size * world_size):
            best = max(
                (n for n in range(1, size + 1) if self.batch_size % (n * world_size) == 0),
                default=None,
            )
            remedy = (
                f"set train.micro_batch_size={best}"
                if best
                else f"set train.batch_size={world_size * max(1, self.batch_size // world_size)}"
            )
            raise ValueError(
                f"train.batch_size={self.batch_size} is not a multiple of {world_size} processes x "
                f"train.micro_batch_size={size}; {remedy}"
            )
        return size
