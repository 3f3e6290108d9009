"""An exponential moving average of the weights, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Average the master weights that this process keeps; no message is exchanged.

    Early on the decay is (1 + step) / (10 + step), so that a short run does not average in its
    random start.

    Attributes:
        averages: by name, float32, the shape of each master.
    """

    def __init__(
        self, masters: dict[str, Tensor], decay: float, publish: Callable[[], None] | None = None
    ) -> None:
        """Start at the weights.

        Args:
            masters: float32 weights by name, updated in place by the optimizer.
            decay: in [0, 1].
            publish: brings changed masters into the model, where it computes with copies.
        """
        self.decay = decay
        self.masters = masters
        self.publish = publish or (lambda: None)
        self.averages = {name: master.detach().clone() for name, master in masters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        masters = [master.detach() for master in self.masters.values()]
        if masters:  # a process may keep none
            torch._foreach_lerp_(list(self.averages.values()), masters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the duration of a `with` block."""
        kept = {name: master.detach().clone() for name, master in self.masters.items()}
        try:
            self._copy(self.averages)
            self.publish()
            yield
        except BaseException:
            self._copy(kept)  # and no message: this process may be the only one that failed
            raise
        self._copy(kept)
        self.publish()

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(values[name])
