"""Claims about the decoding noise. Bounds are four or more standard errors wide."""

import math

import pytest
import torch

from mllm_audio.diffusion.noise import Noise, uniform


def many_noise(seed=0, rows=2000, dim=128):
    return Noise(torch.full((rows,), seed), torch.arange(rows), dim)


def test_noise_is_standard_normal():
    values = many_noise().draw(3).double().flatten()  # 256,000 values
    error = len(values) ** -0.5
    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((values**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96) * error
    quantiles = values.quantile(torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]).double())
    expected = torch.tensor([-2.3263, -0.6745, 0.0, 0.6745, 2.3263]).double()
    torch.testing.assert_close(quantiles, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "other",
    [
        many_noise(seed=1).draw(3),
        many_noise(seed=-1).draw(3),
        many_noise().draw(4),
        many_noise().draw(3).roll(1, 0),  # the next position
        many_noise().draw(3).roll(1, 1),  # the next channel
        many_noise(seed=1).draw(2),
    ],
    ids=["seed", "negative seed", "step", "position", "channel", "seed and step"],
)
def test_noise_is_independent_across(other):
    values = many_noise().draw(3)
    bound = 5 / math.sqrt(values.numel())
    assert abs((values * other).mean()) < bound
    assert abs((values**2 * other**2).mean() - 1) < 8 * bound


def test_noise_is_deterministic():
    assert torch.equal(many_noise(seed=7).draw(5), many_noise(seed=7).draw(5))
    assert not torch.equal(many_noise(seed=7).draw(5), many_noise(seed=8).draw(5))


def test_noise_of_a_row_ignores_its_neighbours():
    seeds, positions = torch.tensor([5, -3, 2**62]), torch.tensor([0, 17, 255])
    together = Noise(seeds, positions, 16).draw(9)
    for row in range(3):
        alone = Noise(seeds[row : row + 1], positions[row : row + 1], 16).draw(9)
        assert torch.equal(alone[0], together[row])


def test_uniform_is_flat_and_open():
    values = uniform(torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000), 1)
    assert values.dtype == torch.float64 and values.min() > 0 and values.max() < 1
    counts = values.histc(10, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-squared, 9 degrees, p = 0.001
