"""One optimizer step, and the state it needs to be continued exactly.

The loop in `trainer.py` does not know which engine runs it: `SingleProcessEngine` here, or
`zero.ZeroEngine` on any number of processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mllm_audio.data.dataset import seeded
from mllm_audio.hardware import has_bf16
from mllm_audio.models import Model
from mllm_audio.training.checkpoint import Shard
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.distributed import World
from mllm_audio.training.ema import EMA
from mllm_audio.training.optim import build_optimizer
from mllm_audio.types import Batch, Losses, StepCounts


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, over all processes."""

    total: float  # what is differentiated
    text: float
    audio: float
    end: float
    grad_norm: float  # before clipping

    @classmethod
    def of(cls, losses: Sequence[float], grad_norm: float) -> StepResult:
        """Name what `stack_losses` stacked."""
        total, text, audio, end = losses
        return cls(total, text, audio, end, grad_norm)

    @property
    def is_finite(self) -> bool:
        """Tell whether the step may reach the weights."""
        return math.isfinite(self.total) and math.isfinite(self.grad_norm)


class Engine(Protocol):
    """What the loop needs of an engine."""

    model: Model
    world: World
    ema: EMA

    @property
    def replicated(self) -> bool:
        """Tell whether every process keeps the same shards."""

    def losses(
        self, batch: Batch, generator: torch.Generator, counts: StepCounts | None = None
    ) -> Losses:
        """Run the model in the run's precision."""

    def train_step(
        self, batches: Sequence[Batch], counts: StepCounts, lr: float, step: int
    ) -> StepResult:
        """Do optimizer step `step` on this process's micro-batches of it.

        Args:
            batches: micro-batches number rank, rank + world size, ...
            counts: of the whole step, over all processes.
            lr: before the groups' shares.
            step: from 0.
        """

    def shards(self) -> dict[str, Shard]:
        """List by "KIND/NAME" what this process keeps of masters, averages and moments."""

    def continue_from(self, step: int) -> None:
        """Go on after `step` steps with the values that were put into the shards."""


def sow(seed: int, step: int, number: int, device: torch.device) -> torch.Generator:
    """Seed dropout, and return the generator of the noise, of micro-batch `number` of a step.

    Both depend on the number alone, not on the process that computes it.
    """
    torch.manual_seed(seeded("dropout", seed, step, number).initial_seed())
    noise = seeded("noise", seed, step, number).initial_seed()
    return torch.Generator(device).manual_seed(noise)


def stack_losses(losses: Sequence[Losses]) -> Tensor:
    """Add up the parts of a step's loss over micro-batches: (4,) float64, on the host."""
    rows = [torch.stack([x.total.detach(), x.text, x.audio, x.end]) for x in losses]  # (4,) each
    return torch.stack(rows).double().sum(0).cpu()


def named_shards(
    masters: dict[str, Shard], ema: EMA, moments: dict[str, dict[str, Tensor]]
) -> dict[str, Shard]:
    """Name masters, averages and Adam's moments, by parameter, as a checkpoint does."""
    shards = {f"weight/{name}": shard for name, shard in masters.items()}
    for name, shard in masters.items():
        shards[f"average/{name}"] = Shard(shard.start, ema.averages[name])
        for kind, values in moments[name].items():
            shards[f"{kind}/{name}"] = Shard(shard.start, values)
    return shards


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """List the persistent tensors that are no parameters."""
    state = model.state_dict(keep_vars=True)
    return {k: v for k, v in state.items() if not isinstance(v, nn.Parameter)}


class SingleProcessEngine:
    """Forward, backward, clip, AdamW and EMA in this process."""

    replicated = False

    def __init__(self, model: Model, config: TrainConfig) -> None:
        self.model = model
        self.config = config
        self.world = World()
        self.optimizer = build_optimizer(model, config.optim)
        self.parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.masters = {k: Shard(0, p.detach().view(-1)) for k, p in self.parameters.items()}
        self.ema = EMA({k: shard.values for k, shard in self.masters.items()}, config.ema_decay)

    def losses(
        self, batch: Batch, generator: torch.Generator, counts: StepCounts | None = None
    ) -> Losses:
        """Run the model in the configured precision: bf16 is autocast over float32 weights."""
        with autocast(self.model, self.model.device, self.config.precision):
            losses: Losses = self.model(batch.to(self.model.device), generator, counts)
        return losses

    def train_step(
        self, batches: Sequence[Batch], counts: StepCounts, lr: float, step: int
    ) -> StepResult:
        """Do optimizer step `step`; a non-finite loss leaves weights and averages untouched."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for number, batch in enumerate(batches):
            generator = sow(self.config.seed, step, number, self.model.device)
            losses = self.losses(batch, generator, counts)
            losses.total.backward()
            parts.append(losses)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optim.max_grad_norm, foreach=True
        )
        result = StepResult.of(stack_losses(parts).tolist(), float(grad_norm))
        if result.is_finite:
            self.optimizer.step()
            self.ema.update(step)
        return result

    def shards(self) -> dict[str, Shard]:
        """List what is kept: all of it."""
        moments = {}
        for name, parameter in self.parameters.items():
            state = adam_state(self.optimizer, parameter)
            moments[name] = {k: state[k].view(-1) for k in ("exp_avg", "exp_avg_sq")}
        return named_shards(self.masters, self.ema, moments)

    def continue_from(self, step: int) -> None:
        """Tell Adam how many steps its moments have seen."""
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["step"].fill_(step)


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return Adam's state of a parameter, as it is before the first step if there was none."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        counts_on_device = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.zeros((), device=parameter.device) if counts_on_device else 0
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def autocast(
    model: nn.Module, device: torch.device, precision: str
) -> AbstractContextManager[None]:
    """Compute in bf16 where it is safe, or in float32 throughout.

    A CPU that would emulate bf16, many times slower, computes with float32 weights in float32,
    and it is said. Weights in bf16, which DeepSpeed makes, leave no choice.
    """
    enabled = precision == "bf16"
    is_float32 = next(model.parameters()).dtype == torch.float32
    if enabled and is_float32 and not has_bf16(device.type):
        _say_no_bf16()
        enabled = False
    context: AbstractContextManager[None] = torch.autocast(
        device.type, torch.bfloat16, enabled=enabled
    )
    return context


@cache
def _say_no_bf16() -> None:
    """Say once that the precision is another one than was asked for."""
    print("this CPU has no bf16 instructions: it computes in float32", file=sys.stderr)
