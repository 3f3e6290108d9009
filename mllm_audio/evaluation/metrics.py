"""Measures of generated sound, as functions of the features that embedders made of it.

Each follows the code that published AudioCaps figures come from, haoheliu/audioldm_eval at 8dc07ee,
and computes in float64. No sound, file or network is known here.

Legend: N clips, n rows of features, E channels of a feature, K classes.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SINGULAR_OFFSET = 1e-6  # added to both diagonals when the square root of a product is not finite
KL_FLOOR = 1e-6  # added to the generated clip's probabilities before their logarithm
SHUFFLE_SEED = 2020  # of the inception score's permutation
NUM_SPLITS = 10  # of the inception score


def frechet_distance(generated: Any, reference: Any) -> float:
    """Measure the distance of the Gaussians fitted to two sets of features.

    Heusel et al. 2017 (arXiv:1706.08500), Eq. 6. Covariances are divided by n - 1. With fewer rows
    than channels they are singular and the distance is biased upwards.

    Args:
        generated: (n, E).
        reference: (m, E).

    Raises:
        ValueError: if the shapes do not agree, or a set has fewer than 2 rows.
        ImportError: if scipy is not installed.
    """
    first, second = _pair("frechet_distance", generated, reference, same_rows=False)
    for name, rows in (("generated", first), ("reference", second)):
        if len(rows) < 2:
            raise ValueError(
                f"frechet_distance: {len(rows)} {name} row has no covariance; expected 2 at least"
            )
    return frechet_distance_of(
        first.mean(0),
        np.atleast_2d(np.cov(first, rowvar=False)),
        second.mean(0),
        np.atleast_2d(np.cov(second, rowvar=False)),
    )


def frechet_distance_of(
    mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array
) -> float:
    """Measure |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of (E,) means, (E, E) covariances.

    Raises:
        ValueError: if the square root has a large imaginary part: broken covariances.
        ImportError: if scipy is not installed.
    """
    linalg = _scipy_linalg()
    with warnings.catch_warnings():
        # With fewer rows than channels the product is singular; its root is still good to 1e-6.
        warnings.simplefilter("ignore", linalg.LinAlgWarning)
        root = linalg.sqrtm(covariance_a @ covariance_b)
    if not np.isfinite(root).all():
        offset = SINGULAR_OFFSET * np.eye(len(covariance_a))
        root = linalg.sqrtm((covariance_a + offset) @ (covariance_b + offset))
    if np.iscomplexobj(root):
        imaginary = np.abs(np.diagonal(root).imag).max()
        if imaginary > 1e-3:
            raise ValueError(
                f"the square root of the covariances' product has an imaginary part of "
                f"{imaginary:.3g}, expected 0; give more clips"
            )
        root = root.real
    gap = mean_a - mean_b
    return float(gap @ gap + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root))


def kl_divergence(generated: Any, reference: Any) -> float:
    """Average the divergence of a generated clip's class probabilities from its recording's.

    sum_k p_ref (log p_ref - log(p_gen + 1e-6)), p = softmax of the logits, mean over clips.

    Args:
        generated: (N, K) logits, row i of the same caption as row i of `reference`.
        reference: (N, K) logits.

    Raises:
        ValueError: if the rows do not pair up.
    """
    first, second = _pair("kl_divergence", generated, reference, same_rows=True)
    log_reference = log_softmax(second)  # (N, K)
    gap = log_reference - np.log(np.exp(log_softmax(first)) + KL_FLOOR)
    return float((np.exp(log_reference) * gap).sum(1).mean())


def kl_divergence_sigmoid(generated: Any, reference: Any) -> float:
    """Do as `kl_divergence` with a sigmoid for every class: clips that have several labels.

    Raises:
        ValueError: if the rows do not pair up.
    """
    first, second = _pair("kl_divergence_sigmoid", generated, reference, same_rows=True)
    log_reference = -np.logaddexp(0, -second)  # (N, K)
    gap = log_reference - np.log(np.exp(-np.logaddexp(0, -first)) + KL_FLOOR)
    return float((np.exp(log_reference) * gap).sum(1).mean())


def inception_score(logits: Any, num_splits: int = NUM_SPLITS) -> tuple[float, float]:
    """Score how sure the classes of clips are, and how many different ones there are.

    Salimans et al. 2016 (arXiv:1606.03498), section 4, on a fixed permutation of the clips. It
    grows with N: compare only equal N.

    Args:
        logits: (N, K).
        num_splits: parts of the clips whose scores are averaged.

    Returns:
        Mean and population standard deviation of the parts' scores.

    Raises:
        ValueError: if there are fewer clips than parts.
    """
    values = np.asarray(logits, np.float64)
    if len(values) < num_splits:
        raise ValueError(
            f"inception_score averages {num_splits} parts of the clips but got {len(values)}; "
            f"give {num_splits} clips at least"
        )
    permutation = np.random.RandomState(SHUFFLE_SEED).permutation(len(values))
    log_p = log_softmax(values[permutation])  # (N, K)
    bounds = [part * len(values) // num_splits for part in range(num_splits + 1)]
    scores = []
    for start, end in itertools.pairwise(bounds):
        part = log_p[start:end]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    generated: Any,
    reference: Any,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = SHUFFLE_SEED,
) -> tuple[float, float]:
    """Average the unbiased squared MMD of random subsets, kernel (x . y / E + 1)^3.

    Binkowski et al. 2018 (arXiv:1801.01401), the kernel inception distance. Unlike the Frechet
    distance it has no bias in N.

    Args:
        generated: (n, E).
        reference: (m, E).
        num_subsets: drawn without replacement inside a subset.
        subset_size: rows of one, at most the smaller of n and m.
        seed: of the draws.

    Returns:
        Mean and population standard deviation over the subsets.

    Raises:
        ValueError: if the shapes do not agree, or a set has fewer than 2 rows.
    """
    first, second = _pair("kernel_distance", generated, reference, same_rows=False)
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError("kernel_distance: found a set of fewer than 2 rows; give more clips")
    rng = np.random.RandomState(seed)
    kernels = [(a @ b.T / a.shape[1] + 1) ** 3 for a, b in _squares(first, second)]
    values = []
    for _ in range(num_subsets):
        i = rng.choice(len(first), size, replace=False)
        j = rng.choice(len(second), size, replace=False)
        within_a, within_b, across = (
            kernel[np.ix_(rows, columns)]
            for kernel, rows, columns in zip(kernels, (i, j, i), (i, j, j), strict=True)
        )
        within = within_a.sum() - within_a.trace() + within_b.sum() - within_b.trace()
        values.append(within / (size * (size - 1)) - 2 * across.mean())
    return float(np.mean(values)), float(np.std(values))


def mean_cosine(first: Any, second: Any) -> float:
    """Average the cosines of the paired rows of two (N, E) sets.

    Raises:
        ValueError: if the rows do not pair up.
    """
    a, b = _pair("mean_cosine", first, second, same_rows=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)  # (N,)
    return float(((a * b).sum(1) / norms).mean())


def accuracy(logits: Any, targets: Any) -> float:
    """Share of (N, K) logits whose largest is that of the (N,) wanted class."""
    return float((np.asarray(logits).argmax(1) == np.asarray(targets)).mean())


def log_softmax(logits: Array) -> Array:
    """Turn (N, K) logits into log probabilities."""
    shifted = logits - logits.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _squares(first: Array, second: Array) -> list[tuple[Array, Array]]:
    return [(first, first), (second, second), (first, second)]


def _pair(name: str, first: Any, second: Any, same_rows: bool) -> tuple[Array, Array]:
    """Check two sets of rows and turn them into float64."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name}: found sets of shapes {a.shape} and {b.shape}, expected (rows, channels) with "
            "equal channels; use one embedder for both"
        )
    if same_rows and len(a) != len(b):
        raise ValueError(
            f"{name}: found {len(a)} and {len(b)} rows, expected pairs; give one generated clip "
            "for each reference"
        )
    return a, b


def _scipy_linalg() -> Any:
    """Import scipy, which is an extra."""
    try:
        import scipy.linalg
    except ImportError as error:
        raise ImportError(
            "the Frechet distance needs scipy, which is not installed; type "
            "pip install mllm-audio[eval]"
        ) from error
    return scipy.linalg
