"""Masking schedules and the choice of kept positions: all of masked next-token prediction.

MNTP (paper section 3.3) drops a share `r` of a clip's latents and does next-token prediction on
what is left; the model is told the position of each latent (content) and of the one it must
predict (target). One `r` serves a whole optimizer step, so that batches stay dense. Next-token
prediction is the case r = 0.

Two of the paper's ablations keep masked latents in the sequence, as zeros or as Gaussian noise, and
one predicts the immediate next latent from what is left (table 3). AudioMAR, the bidirectional
topline, predicts masked latents at their own places. To decode several latents a step, a model
learns to predict the ones behind the next one as well (`max_distance`).

A schedule is the quantile function of the distribution of `r`. The paper draws A and B in its
figure 5 without giving parameters: **the numbers for A and B here are our assumption.**
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_audio.config import check_range, nearest


def truncated_normal(u: float, mode: float, std: float, low: float, high: float) -> float:
    """Quantile `u` of a normal distribution cut to [low, high]."""
    normal = NormalDist(mode, std)
    below, above = normal.cdf(low), normal.cdf(high)
    return min(max(normal.inv_cdf(below + u * (above - below)), low), high)


# A: a normal distribution at high ratios. B: a long tail to low ratios. Both assumed, see above.
schedule_a = partial(truncated_normal, mode=0.7, std=0.1, low=0.4, high=0.95)
schedule_b = partial(truncated_normal, mode=0.7, std=0.35, low=0.0, high=0.7)
# D: MAR's truncated normal (mode 1, std 0.25 on [0.7, 1]) shifted down by 0.15, as the paper says.
schedule_d = partial(truncated_normal, mode=0.85, std=0.25, low=0.55, high=0.85)


def schedule_c(u: float) -> float:
    """Mix A and B equally: the paper's default."""
    return schedule_a(2 * u) if u < 0.5 else schedule_b(2 * u - 1)


# Quantile functions of u in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "a": schedule_a,
    "b": schedule_b,
    "c": schedule_c,
    "d": schedule_d,
    "mar": partial(truncated_normal, mode=1.0, std=0.25, low=0.7, high=1.0),  # of AudioMAR
    "uniform": lambda u: u,
    "fixed": lambda u: 1.0,  # scaled by MaskingConfig.scale: `fixed` with 0.7 is the paper's
    "ntp": lambda u: 0.0,
}


# Nothing (MNTP); zeros or Gaussian noise, of the latents' statistics (ablations); or a place that
# predicts its own latent (AudioMAR).
HIDDEN = ("drop", "zero", "gaussian", "own")


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """How many latents a training step drops."""

    schedule: str = "c"  # key in SCHEDULES
    scale: float = (
        1.0  # multiplies the drawn ratio, in [0, 1]; 0.7 with `fixed` is the paper's ablation
    )
    hidden: str = "drop"  # in HIDDEN: what stands where a latent is masked
    next_kept: bool = True  # predict the next kept latent; false: the immediate next one
    # As far as `tokens_per_step` of decoding: every element predicts the next one, and a share of
    # them, by a copy that no other sees, the j-th next one, j uniform in 2 to this.
    max_distance: int = 1
    far_share: float = 0.5

    def __post_init__(self) -> None:
        """Check the schedule's name and the scale."""
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"unknown masking schedule {self.schedule!r}; {nearest(self.schedule, SCHEDULES)}"
            )
        check_range("masking", self, 0, 1, "scale", "far_share")
        check_range("masking", self, 1, 10_000, "max_distance")
        if self.hidden not in HIDDEN:
            raise ValueError(
                f"unknown masking.hidden {self.hidden!r}; {nearest(self.hidden, HIDDEN)}"
            )
        if self.next_kept and self.hidden in ("zero", "gaussian"):
            raise ValueError(
                f"masking.hidden={self.hidden} keeps every latent's place, so the next one is "
                "predicted; set masking.next_kept=false"
            )
        if self.hidden == "own" and self.max_distance > 1:
            raise ValueError(
                f"masking.max_distance={self.max_distance}, but with masking.hidden=own latents "
                "predict themselves; leave it at 1"
            )


def sample_ratio(config: MaskingConfig, generator: torch.Generator) -> float:
    """Draw the masking ratio of one optimizer step."""
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    return config.scale * SCHEDULES[config.schedule](u)


def num_kept(num_tokens: int, ratio: float) -> int:
    """Count the latents left of `num_tokens` after dropping `ratio` of them; at least one."""
    return max(1, num_tokens - round(num_tokens * ratio))


def sample_kept_positions(num_tokens: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Choose which latents of a clip stay: (K,) int64, increasing, uniform over subsets."""
    kept = num_kept(num_tokens, ratio)
    if kept == num_tokens:
        return torch.arange(num_tokens)
    return torch.randperm(num_tokens, generator=generator)[:kept].sort().values


def sample_known_positions(num_tokens: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Choose which latents of a clip AudioMAR knows: (K,) int64, increasing, perhaps none.

    As MAR masks them, ceil(N r): with all of them masked, training has what the first pass of
    decoding has.
    """
    known = num_tokens - math.ceil(num_tokens * ratio)
    return torch.randperm(num_tokens, generator=generator)[:known].sort().values


def sample_far(config: MaskingConfig, count: int, generator: torch.Generator) -> Tensor | None:
    """Choose which of the next ones the copies of `count` elements predict, (count,) int64.

    0 where there is no copy; None where there are none at all.
    """
    if config.max_distance == 1:
        return None
    far = torch.randint(2, config.max_distance + 1, (count,), generator=generator)
    copied = torch.randperm(count, generator=generator)[: num_copies(config, count)]
    return torch.zeros_like(far).index_copy(0, copied, far[copied])


def num_copies(config: MaskingConfig, count: int) -> int:
    """Count the copies of `count` elements."""
    return round(config.far_share * count) if config.max_distance > 1 else 0


def end_weights(num_tokens: int, kept: Tensor, ratio: float, distances: Tensor) -> Tensor:
    """Weigh "is the target the end?" so that masking leaves its odds as they were.

    The end is never dropped while latents are, so ends are too frequent among targets, and by
    how much depends on the clip's length. Each prediction is weighed by the probability that it
    would have were every element, the end too, kept independently with 1 - r, over the one it
    has when exactly K of N latents are kept. With g places to the target, the j-th next kept, s = 1
    for the prediction of a latent (0: of the start, always there) and e = 1 of one (0: of the end):

        (1 - r)^(s + j) r^(g - j) / (C(N - s - g + 1 - e, K - s - j + 1 - e) / C(N, K)).

    The start is followed by a latent in any clip, so for j = 1 its prediction needs no weight.

    Args:
        num_tokens: N, latents of the clip.
        kept: (K,) int64, positions that stayed, increasing.
        ratio: r, that `kept` was drawn with.
        distances: (K + 1,) int64, j of the start and of each kept latent.

    Returns:
        (K + 1,) float32; ones for r = 0, or where nothing is the j-th next.
    """
    num_kept = len(kept)
    if ratio == 0:
        return torch.ones(num_kept + 1)
    places = F.pad(kept, (1, 1), value=-1)
    places[-1] = num_tokens
    number = torch.arange(num_kept + 1) + distances  # of the target among the places
    gap = places[number.clamp(max=num_kept + 1)] - places[:-1]
    of_latent, is_latent = torch.ones_like(gap), (number <= num_kept).long()
    of_latent[0] = 0
    independent = (of_latent + distances) * math.log1p(-min(ratio, 1 - 1e-6))
    independent = independent + (gap - distances) * math.log(ratio)
    exact = _log_binomial(
        num_tokens - of_latent - gap + 1 - is_latent,
        num_kept - of_latent - distances + 1 - is_latent,
    ) - _log_binomial(torch.tensor(num_tokens), torch.tensor(num_kept))
    no_weight = number > num_kept + 1
    no_weight[0] |= distances[0] == 1
    return torch.where(no_weight, 1.0, (independent - exact).exp()).float()


def _log_binomial(total: Tensor, chosen: Tensor) -> Tensor:
    """Logarithm of the number of ways to choose, float64."""
    total, chosen = total.double(), chosen.double()
    return (total + 1).lgamma() - (chosen + 1).lgamma() - (total - chosen + 1).lgamma()
