"""Metrics equal audioldm_eval's, and closed forms."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from conftest import FIXTURES

from mllm_audio.evaluation import metrics

# Values of the published tool, and the float32 arithmetic it did part of them in.
RTOL = 1e-6


@pytest.fixture(scope="module")
def arrays():
    with np.load(FIXTURES / "eval_metrics.npz") as file:
        return {key: file[key] for key in file}


@pytest.fixture(scope="module")
def published():
    return json.loads((FIXTURES / "eval_metrics.json").read_text())


@pytest.fixture
def pairs(arrays):
    """Logits of generated clips and of the references of the same name."""
    order = [list(arrays["kl_gen_names"]).index(name) for name in arrays["kl_ref_names"]]
    return arrays["kl_gen_logits"][order], arrays["kl_ref_logits"]


def show(what: str, value: float, expected: float) -> None:
    print(f"\n{what} {abs(value / expected - 1):.1e}", end="")


@pytest.mark.parametrize(
    ("entry", "generated", "reference", "key"),
    [
        ("fd_64d", "fd_gen", "fd_ref", "frechet_distance"),
        ("fad_128d", "fad_gen", "fad_ref", "frechet_audio_distance"),
    ],
)
def test_frechet_distance_equals_the_published_tool(
    arrays, published, entry, generated, reference, key
):
    value = metrics.frechet_distance(arrays[generated], arrays[reference])
    show(entry, value, published[entry][key])
    assert value == pytest.approx(published[entry][key], rel=RTOL)


def test_frechet_distance_of_few_clips_equals_the_published_tool(arrays, published):
    value = metrics.frechet_distance(arrays["fd_gen"][:40], arrays["fd_ref"][:35])
    expected = published["fd_64d_rank_deficient_gen[:40]_ref[:35]"]["frechet_distance"]
    show("fd of few clips", value, expected)
    assert value == pytest.approx(expected, rel=RTOL)


def test_frechet_distance_of_a_set_from_itself_is_zero(arrays):
    assert abs(metrics.frechet_distance(arrays["fd_gen"], arrays["fd_gen"])) < 1e-9


def test_frechet_distance_of_known_gaussians():
    """Commuting covariances: sum of (mean gap)^2 + (sigma gap)^2 along each axis."""
    sigma_a, sigma_b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5])
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.0])
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    value = metrics.frechet_distance_of(
        turn @ mean_a,
        turn @ np.diag(sigma_a**2) @ turn.T,
        turn @ mean_b,
        turn @ np.diag(sigma_b**2) @ turn.T,
    )
    assert value == pytest.approx(1 + 4 + 4 + 1, rel=1e-10)


def test_frechet_distance_of_samples_of_known_gaussians():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(20_000, 4))
    second = 0.5 + 2 * rng.normal(size=(20_000, 4))
    assert metrics.frechet_distance(first, second) == pytest.approx(4 * (0.25 + 1), rel=0.03)


def test_frechet_distance_survives_a_singular_product(arrays, monkeypatch):
    """Where the root is not finite, both diagonals get the published offset, once."""
    from scipy import linalg

    calls = []

    def root(matrix, sqrtm=linalg.sqrtm):
        calls.append(matrix)
        return np.full_like(matrix, np.nan) if len(calls) == 1 else sqrtm(matrix)

    monkeypatch.setattr(linalg, "sqrtm", root)
    eye = np.eye(3)
    value = metrics.frechet_distance_of(np.zeros(3), eye, np.ones(3), eye)
    assert np.allclose(calls[1], (1 + 1e-6) ** 2 * eye)
    assert value == pytest.approx(3 - 6e-6, rel=1e-9)


def test_kl_equals_the_published_tool(pairs, published):
    expected = published["kl_by_name"]
    value = metrics.kl_divergence(*pairs)
    assert value == pytest.approx(expected["kullback_leibler_divergence_softmax"], rel=RTOL)
    value = metrics.kl_divergence_sigmoid(*pairs)
    assert value == pytest.approx(expected["kullback_leibler_divergence_sigmoid"], rel=RTOL)


def test_kl_depends_on_the_pairing(arrays, pairs, published):
    wrong = metrics.kl_divergence(arrays["kl_gen_logits"], arrays["kl_ref_logits"])
    expected = published["kl_if_paired_by_row_(wrong_here)"]
    assert wrong == pytest.approx(expected["kullback_leibler_divergence_softmax"], rel=RTOL)
    assert wrong > 3 * metrics.kl_divergence(*pairs)


def test_kl_of_known_distributions():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    assert metrics.kl_divergence(np.log(q), np.log(p)) == pytest.approx(expected, rel=1e-4)


def test_inception_score_equals_the_published_tool(arrays, published):
    mean, deviation = metrics.inception_score(arrays["is_logits"])
    expected = published["is_splits10_shuffle2020"]
    assert mean == pytest.approx(expected["inception_score_mean"], rel=RTOL)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=RTOL)
    single = metrics.inception_score(arrays["is_logits"], num_splits=1)[0]
    expected = published["is_splits1_shuffle2020"]
    assert single == pytest.approx(expected["inception_score_mean"], rel=RTOL)


def test_inception_score_of_known_classes():
    """Sure of K equally frequent classes: K. Always unsure: 1."""
    sure = 1000.0 * np.tile(np.eye(5), (40, 1))
    assert metrics.inception_score(sure, num_splits=1)[0] == pytest.approx(5)
    assert metrics.inception_score(np.zeros((40, 5)))[0] == pytest.approx(1)


def test_kernel_distance_equals_the_published_tool(arrays, published):
    mean, deviation = metrics.kernel_distance(arrays["fd_gen"], arrays["fd_ref"], 20, 50)
    expected = published["kid_gamma_none_deg3_s20x50"]
    # A difference of float32 kernels near 1: six digits of them leave 1e-7.
    mean_expected = expected["kernel_inception_distance_mean"]
    assert mean == pytest.approx(mean_expected, abs=1e-7)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-5)


def test_mean_cosine_equals_the_published_value(arrays, published):
    value = metrics.mean_cosine(arrays["clap_audio"], arrays["clap_text"])
    assert value == pytest.approx(published["clap_mean_cosine"], rel=RTOL)
    assert metrics.mean_cosine([[1.0, 0], [1, 1]], [[2.0, 0], [-1, -1]]) == pytest.approx(0)


def test_accuracy_counts_the_largest():
    assert metrics.accuracy([[0.0, 1], [1, 0], [2, 3], [5, 4]], [1, 0, 0, 1]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.kl_divergence(np.zeros((3, 2)), np.zeros((4, 2))), "3 and 4 rows"),
        (lambda: metrics.kl_divergence_sigmoid([[1.0]], [[1.0], [2.0]]), "1 and 2 rows"),
        (lambda: metrics.mean_cosine(np.ones((3, 2)), np.ones((2, 2))), "3 and 2 rows"),
        (lambda: metrics.frechet_distance(np.zeros((3, 2)), np.zeros((4, 5))), r"\(3, 2\) and"),
        (lambda: metrics.frechet_distance(np.zeros((3, 2)), np.zeros((1, 2))), "1 reference row"),
        (lambda: metrics.inception_score(np.zeros((7, 3))), "10 parts.*got 7"),
        (lambda: metrics.kernel_distance(np.zeros((1, 2)), np.zeros((4, 2))), "fewer than 2"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_scipy_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install mllm-audio\[eval\]"):
        metrics.frechet_distance(np.eye(3), np.eye(3))
