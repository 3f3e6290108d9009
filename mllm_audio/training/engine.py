"""One optimizer step, and the state it needs to be continued exactly.

The loop in `trainer.py` does not know which engine runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_audio.model import AudioLanguageModel
from mllm_audio.training.ema import EMA
from mllm_audio.training.optim import OptimConfig, build_optimizer
from mllm_audio.types import Batch, Losses

PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    losses: Losses
    grad_norm: Tensor  # scalar, before clipping


class SingleProcessEngine:
    """Forward, backward, clip, AdamW and EMA in this process."""

    def __init__(
        self, model: AudioLanguageModel, config: OptimConfig, ema_decay: float, precision: str
    ) -> None:
        self.model = model
        self.config = config
        self.precision = precision
        self.optimizer = build_optimizer(model, config)
        self.ema = EMA(model, ema_decay)

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Run the model in the configured precision: bf16 is autocast over float32 weights."""
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses: Losses = self.model(batch.to(device), generator)
        return losses

    def train_step(
        self, batch: Batch, lr: float, step: int, generator: torch.Generator
    ) -> StepResult:
        """Do optimizer step `step`; a non-finite loss leaves weights and averages untouched."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batch, generator)
        losses.total.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.max_grad_norm, foreach=True
        )
        if bool(torch.isfinite(grad_norm)):
            self.optimizer.step()
            self.ema.update(step)
        return StepResult(losses, grad_norm)

    def state_dict(self) -> dict[str, Tensor]:
        """Gather weights, averages and optimizer moments under flat names, for safetensors.

        Weights that training does not change are left out: they are in the base model's folder.
        """
        state = {
            f"model.{k}": v
            for k, v in self.model.state_dict(keep_vars=True).items()
            if v.requires_grad or not isinstance(v, torch.nn.Parameter)
        }
        state |= {f"ema.{k}": v for k, v in self.ema.averages.items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            state |= {f"optimizer.{names[id(parameter)]}.{k}": v for k, v in moments.items()}
        unique = {id(value): name for name, value in reversed(state.items())}  # drops tied copies
        return {name: state[name].detach().contiguous() for name in unique.values()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore exactly what `state_dict` gathered."""
        own = self.state_dict()
        missing = sorted(k for k in own.keys() - state.keys() if not k.startswith("optimizer."))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of this model: {missing[:3]}"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"], strict=False)
        for name, average in self.ema.averages.items():
            average.copy_(parts["ema"][name])
        parameters = dict(self.model.named_parameters())
        for name, value in parts["optimizer"].items():
            parameter_name, _, key = name.rpartition(".")
            self.optimizer.state[parameters[parameter_name]][key] = value.to(
                parameters[parameter_name].device, copy=True
            )
