"""Masking schedules: exact counts, quantiles, and masked prediction as generalised NTP."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from mllm_audio.masking import (
    SCHEDULES,
    MaskingConfig,
    num_kept,
    sample_kept_positions,
    sample_ratio,
)


def test_kept_positions_are_an_exact_count_of_increasing_positions():
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 4, 13, 256):
        for ratio in (0.0, 0.1, 0.5, 0.7, 0.99, 1.0):
            kept = sample_kept_positions(num_tokens, ratio, generator)
            assert (
                len(kept)
                == num_kept(num_tokens, ratio)
                == max(1, num_tokens - round(ratio * num_tokens))
            )
            assert bool((kept.diff() > 0).all())
            assert int(kept[0]) >= 0 and int(kept[-1]) < num_tokens


def test_ratio_zero_keeps_everything_and_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state().clone()
    assert sample_kept_positions(7, 0.0, generator).tolist() == list(range(7))
    assert torch.equal(generator.get_state(), before)


def test_every_position_is_kept_equally_often():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(16)
    for _ in range(4000):
        counts[sample_kept_positions(16, 0.75, generator)] += 1
    share = counts / 4000  # expected 0.25, standard error 0.007
    assert float((share - 0.25).abs().max()) < 0.03


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_quantile_functions_within_zero_and_one(name):
    u = [i / 200 for i in range(200)]
    ratios = [SCHEDULES[name](x) for x in u]
    assert all(0 <= r <= 1 for r in ratios)
    halves = [ratios] if name != "c" else [ratios[:100], ratios[100:]]
    for half in halves:
        assert half == sorted(half)


def test_schedule_d_is_mars_distribution_shifted():
    # MAR: normal(1, 0.25) cut to [0.7, 1]; the paper shifts it to [0.55, 0.85].
    normal = NormalDist(1.0, 0.25)
    low, high = normal.cdf(0.7), normal.cdf(1.0)
    for u in (0.01, 0.25, 0.5, 0.9):
        expected = normal.inv_cdf(low + u * (high - low)) - 0.15
        assert SCHEDULES["d"](u) == pytest.approx(expected, abs=1e-9)


def test_schedule_c_is_an_equal_mixture_of_a_and_b():
    generator = torch.Generator().manual_seed(0)
    config = MaskingConfig(schedule="c")
    drawn = torch.tensor([sample_ratio(config, generator) for _ in range(4000)])
    grid = [(i + 0.5) / 2000 for i in range(2000)]
    for threshold in (0.2, 0.4, 0.6, 0.8):
        expected = (
            sum(sum(SCHEDULES[part](u) < threshold for u in grid) / len(grid) for part in "ab") / 2
        )
        assert float((drawn < threshold).float().mean()) == pytest.approx(expected, abs=0.03)


def test_fixed_and_uniform_are_the_papers_ablations():
    generator = torch.Generator().manual_seed(0)
    fixed = MaskingConfig(schedule="fixed", scale=0.7)
    assert {sample_ratio(fixed, generator) for _ in range(5)} == {0.7}
    uniform = torch.tensor(
        [sample_ratio(MaskingConfig(schedule="uniform"), generator) for _ in range(4000)]
    )
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown masking schedule 'unifrom'; did you mean 'uniform'"
    ):
        MaskingConfig(schedule="unifrom")
    with pytest.raises(ValueError, match=r"masking.scale=1.5, expected \[0, 1\]"):
        MaskingConfig(scale=1.5)
