"""Confidence intervals by resampling clips.

Resampling with repeats makes the Frechet distance grow and the inception score shrink, as fewer
clips would. Intervals are therefore those of the resamples' deviations from their own mean, laid
around the measured value; for a mean over clips that is the ordinary percentile interval (Efron and
Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_audio.evaluation.metrics import Array

Counts = NDArray[np.int64]  # (N,) how often each clip is in a resample
LEVEL = 95.0  # per cent


@dataclass(frozen=True)
class Interval:
    """Where a value may lie; without one, why."""

    low: float | None
    high: float | None
    num_resamples: int
    reason: str = ""  # that there is no interval


def bootstrap(
    value: float,
    statistic: Callable[[Counts, Counts], float],
    num_generated: int,
    num_reference: int,
    paired: bool,
    num_resamples: int,
    seed: int,
    max_seconds: float,
) -> Interval:
    """Estimate the 95 % interval of a value.

    Args:
        value: measured on all clips.
        statistic: the same for clips repeated as often as the counts of both sides say.
        num_generated: clips.
        num_reference: clips.
        paired: clips of one name are drawn together.
        num_resamples: 0 for none.
        seed: of the draws.
        max_seconds: refuse if the first resample says that all will take longer.
    """
    if num_resamples == 0:
        return Interval(None, None, 0, "not asked for")
    rng = np.random.default_rng(seed)
    values: list[float] = []
    start = time.monotonic()
    for _ in range(num_resamples):
        generated = _draw(rng, num_generated)
        reference = generated if paired else _draw(rng, num_reference)
        values.append(statistic(generated, reference))
        if len(values) == 1 and (seconds := time.monotonic() - start) * num_resamples > max_seconds:
            reason = (
                f"one resample takes {seconds:.1f} s, {num_resamples} more than "
                f"{max_seconds:.0f} s; raise --bootstrap-seconds or lower --bootstrap"
            )
            return Interval(None, None, 0, reason)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(np.array(values) - np.mean(values), [tail, 100 - tail])
    return Interval(value + float(low), value + float(high), num_resamples)


def frechet_statistic(
    generated: Sequence[Array], reference: Sequence[Array]
) -> Callable[[Counts, Counts], float]:
    """Prepare the Frechet distance for many resamples.

    tr (C_a C_b)^(1/2) is the sum of the singular values of A B^T, C_a = A^T A and C_b = B^T B,
    which costs less than a matrix root; A and B are centred rows over the root of n - 1, or, where
    there are more rows than channels, roots of the covariances.

    Args:
        generated: (n_i, E) features of each clip.
        reference: (m_j, E) features of each clip.
    """
    a, b = np.concatenate(generated), np.concatenate(reference)
    lengths_a, lengths_b = ([len(rows) for rows in side] for side in (generated, reference))
    # (n, m), all that the singular values of any resample need.
    products = a @ b.T if max(a.shape[0], b.shape[0]) <= a.shape[1] else None

    def statistic(counts_a: Counts, counts_b: Counts) -> float:
        weights_a, weights_b = counts_a.repeat(lengths_a), counts_b.repeat(lengths_b)
        first, second = _Moments(a, weights_a), _Moments(b, weights_b)
        if products is None:
            root = _root(first.covariance())
            squares = np.linalg.eigvalsh(root @ second.covariance() @ root)
            trace = np.sqrt(squares.clip(0)).sum()
        else:
            rows, columns = weights_a > 0, weights_b > 0
            centred = products[np.ix_(rows, columns)]
            centred = centred - (first.share[rows] @ centred)[None]
            centred = centred - (centred @ second.share[columns])[:, None]
            scale = np.outer(np.sqrt(weights_a[rows]), np.sqrt(weights_b[columns]))
            norm = np.sqrt((first.total - 1) * (second.total - 1))
            trace = np.linalg.svd(centred * scale / norm, compute_uv=False).sum()
        gap = first.mean - second.mean
        return float(gap @ gap + first.variance() + second.variance() - 2 * trace)

    return statistic


class _Moments:
    """Mean and covariance of (n, E) rows that are repeated."""

    def __init__(self, rows: Array, weights: Counts) -> None:
        self.total = int(weights.sum())
        self.share = weights / self.total  # (n,)
        self.mean = self.share @ rows  # (E,)
        self._rows, self._weights = rows, weights

    def covariance(self) -> Array:
        """(E, E)."""
        centred = self._rows - self.mean
        result: Array = (centred * self._weights[:, None]).T @ centred / (self.total - 1)
        return result

    def variance(self) -> float:
        """Trace of the covariance."""
        squares = np.square(self._rows - self.mean).sum(1)
        return float(self._weights @ squares / (self.total - 1))


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    result: Array = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return result


def _draw(rng: Any, size: int) -> Counts:
    """Count how often each of `size` clips is drawn in `size` draws."""
    return np.bincount(rng.integers(0, size, size), minlength=size) if size else np.zeros(0, int)
