"""An exponential moving average of the weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average every trained parameter of a model.

    Early on the decay is (1 + step) / (10 + step), so that a short run does not average in its
    random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.averages = {k: p.detach().float().clone() for k, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - decay)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with averaged weights in place of trained ones."""
        state = model.state_dict()
        return state | {k: v.to(state[k].dtype) for k, v in self.averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the duration of a `with` block."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._copy(self.averages)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
