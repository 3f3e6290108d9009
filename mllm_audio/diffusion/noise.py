"""Standard normal noise as a pure function of (seed, position, step).

A row's audio must not depend on its neighbours in the batch, on the device or on whether the
request was preempted, so decoding never advances a random state. A counter is hashed instead
(SplitMix64's finaliser, Steele et al. 2014, over 64-bit integers) and two uniforms become
one normal (Box-Muller, in float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# What a sampler is driven by: a network, from (R, D) noisy latents and (1,) timesteps or times to
# (R, D or more), and the noise of a step, (R, D).
Predict = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int], Tensor]

# Odd 64-bit constants, written as the signed integers that wrap to them.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if unsigned: torch's own shift repeats the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """Hash int64 to int64 so that neighbouring inputs give unrelated outputs."""
    value = value + _GOLDEN
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def _uniform(counter: Tensor) -> Tensor:
    """Turn hashed int64 into float64 in (0, 1): 53 bits, centred so that 0 cannot occur."""
    return (_shift_right(_mix(counter), 11).double() + 0.5) * 2.0**-53


def uniform(seeds: Tensor, position: Tensor, step: int) -> Tensor:
    """Draw one float64 in (0, 1) per row, (R,) from (R,) seeds and (R,) positions."""
    return _uniform(_mix(_mix(_mix(seeds) + position) + step))


@dataclass(frozen=True)
class Noise:
    """The noise of one position of every row being decoded.

    Its tensors are not to be changed in place: what all steps share is computed once.
    """

    seeds: Tensor  # (R,) int64, one per request
    position: Tensor  # (R,) int64, the target position being drawn
    dim: int  # D

    @cached_property
    def _keys(self) -> Tensor:
        """Hash seeds and positions, (R,) int64."""
        return _mix(_mix(self.seeds) + self.position)

    def draw(self, step: int) -> Tensor:
        """Draw the (R, D) float32 standard normal of sampling step `step`."""
        row = _mix(self._keys + step)  # (R,)
        counters = row[:, None] + torch.arange(2 * self.dim, device=row.device)  # (R, 2D)
        first, second = _uniform(counters).view(len(row), self.dim, 2).unbind(-1)  # (R, D) each
        return ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).float()
