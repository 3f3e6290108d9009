"""Claims about the schedule and the samplers, most of them in closed form."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mutation import mutants, passes

from mllm_audio.diffusion import samplers, schedule
from mllm_audio.diffusion.noise import Noise
from mllm_audio.diffusion.samplers import NOISE_SAMPLERS, SAMPLERS, VELOCITY_SAMPLERS
from mllm_audio.diffusion.schedule import cosine_schedule

CPU = torch.device("cpu")
MEAN, DEVIATION = 1.5, 0.4  # of the Gaussian every sampler must recover
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2}  # of convergence
NUM_STEPS = {"ddim": 250}  # of first order, in a spacing that is coarse where much happens; else 50
MAR = np.load(Path(__file__).parent / "fixtures" / "mar_diffloss_small.npz")


def optimal_noise(chain):
    """The exact predictor for N(MEAN, DEVIATION^2): posterior mean of the noise, and variance."""

    def predict(noisy, timesteps):
        index = int((chain.timesteps == timesteps).nonzero())
        power = float(chain.alphas_cumprod[index])
        total = power * DEVIATION**2 + 1 - power
        noise = math.sqrt(1 - power) * (noisy - math.sqrt(power) * MEAN) / total
        clean_variance = DEVIATION**2 * (1 - power) / total
        lower, upper = float(chain.posterior_log_variance[index]), float(chain.log_betas[index])
        previous = float(chain.alphas_cumprod[index - 1]) if index else 1.0
        beta = 1 - power / previous
        exact = beta * (1 - previous) / (1 - power)
        exact += (beta * math.sqrt(previous) / (1 - power)) ** 2 * clean_variance
        weight = 2 * (math.log(exact) - lower) / (upper - lower) - 1
        return torch.cat([noise, torch.full_like(noise, weight)], dim=-1)

    return predict


def optimal_velocity(noisy, times):
    """The exact velocity of the linear path from N(0, 1) to N(MEAN, DEVIATION^2)."""
    variance = (1 - times) ** 2 + (times * DEVIATION) ** 2
    return MEAN + (times * DEVIATION**2 - (1 - times)) / variance * (noisy - times * MEAN)


def normal_draw(rows=4096, dim=4):
    return Noise(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), dim).draw


def check_gaussian(name, samplers=samplers, schedule=schedule):
    """Sampler `name` makes N(MEAN, DEVIATION^2) of the exact predictor."""
    sampler, num_steps = samplers.SAMPLERS[name], NUM_STEPS.get(name, 50)
    if name in NOISE_SAMPLERS:
        exact = optimal_noise(cosine_schedule(1000, num_steps, CPU, sampler.spacing))
        chain = schedule.cosine_schedule(1000, num_steps, CPU, sampler.spacing)
        latents = sampler.run(exact, normal_draw(), chain)
    else:
        latents = sampler.run(optimal_velocity, normal_draw(), num_steps)
    assert float(latents.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(latents.std()) == pytest.approx(DEVIATION, abs=0.02)


def check_order(name, order, samplers=samplers):
    """Halving the step of sampler `name` divides its error by 2^order."""
    draw = normal_draw(8)
    exact = math.exp(2) * draw(0)  # where x' = (1 + 2t) x ends
    errors = []
    for num_steps in (20, 40, 80):
        found = getattr(samplers, name)(lambda x, t: (1 + 2 * t) * x, draw, num_steps)
        errors.append(float((found - exact).abs().max()))
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert rates == pytest.approx([order, order], abs=0.15), errors


def check_tables(schedule=schedule):
    """The tables are MAR's, of the whole chain and of 100 steps."""
    train = schedule.cosine_schedule(1000, 1000, CPU)
    spaced = schedule.cosine_schedule(1000, 100, CPU)
    assert spaced.timesteps.tolist() == MAR["timestep_map_100"].tolist()
    for table, expected in [
        (train.betas, MAR["betas_1000"]),
        (train.alphas_cumprod, MAR["alphas_cumprod_1000"]),
        (train.signal_scale, MAR["alphas_cumprod_1000"] ** 0.5),
        (train.noise_scale, (1 - MAR["alphas_cumprod_1000"]) ** 0.5),
        (spaced.betas, MAR["betas_100"]),
        (spaced.log_betas, np.log(MAR["betas_100"])),
        (spaced.alphas_cumprod, MAR["alphas_cumprod_100"]),
        (spaced.posterior_log_variance, MAR["posterior_log_variance_clipped_100"]),
        (spaced.posterior_mean_clean, MAR["posterior_mean_coef1_100"]),
        (spaced.posterior_mean_noisy, MAR["posterior_mean_coef2_100"]),
    ]:
        assert table.dtype == torch.float32
        np.testing.assert_allclose(table.numpy(), expected, rtol=1e-6)


def check_log_snr_spacing(schedule=schedule):
    """Timesteps are the nearest to even half log SNR, or all there are, and the gains are exact."""
    power = MAR["alphas_cumprod_1000"]
    log_snr = np.log(power / (1 - power)) / 2
    noisiest = np.flatnonzero(log_snr >= -5.1)[-1]
    for num_steps in (2, 8, 16):
        chain = schedule.cosine_schedule(1000, num_steps, CPU, "log_snr")
        wanted = np.linspace(log_snr[0], log_snr[noisiest], num_steps + 1)[1:]
        nearest = [int(abs(log_snr - value).argmin()) for value in wanted]
        assert chain.timesteps.tolist() == nearest
        assert chain.log_snr_gain[0] == math.inf
        np.testing.assert_allclose(chain.log_snr_gain[1:], -np.diff(log_snr[nearest]), rtol=1e-6)
    for num_steps in (100, 900, 995, 996, 997, 1000):  # more than there are at either end
        timesteps = schedule.cosine_schedule(1000, num_steps, CPU, "log_snr").timesteps
        assert timesteps[0] >= 0 and (timesteps.diff() > 0).all()
        assert timesteps[-1] == max(noisiest, num_steps - 1)
        crowded = int((timesteps == torch.arange(num_steps)).sum())
        assert crowded < num_steps or num_steps >= 996  # no run of neighbours where there is room
    dense = schedule.cosine_schedule(1000, 100, CPU, "log_snr").timesteps
    middle = np.linspace(log_snr[0], log_snr[noisiest], 101)[1:][40:60]
    np.testing.assert_allclose(log_snr[dense[40:60]], middle, atol=0.01)


def check_noising(schedule=schedule):
    """Noising follows the tables, is inverted by `predict_clean`, and rows are independent."""
    chain = schedule.cosine_schedule(1000, 1000, CPU)
    latents, noise = torch.randn(2, 6, 3, generator=torch.manual_seed(0))
    index = torch.tensor([0, 10, 100, 300, 500, 700])
    noisy = chain.add_noise(latents, noise, index)
    power = chain.alphas_cumprod[300]
    torch.testing.assert_close(noisy[3], power.sqrt() * latents[3] + (1 - power).sqrt() * noise[3])
    torch.testing.assert_close(chain.predict_clean(noisy, noise, index), latents, atol=1e-5, rtol=0)
    assert torch.equal(noisy[3], chain.add_noise(latents, noise, 300)[3])


def check_path(schedule=schedule):
    """The path starts at the noise, ends at the data, and its velocity leads there."""
    latents, noise = torch.randn(2, 3, 4, generator=torch.manual_seed(0))
    ends = [schedule.path_point(latents, noise, torch.full((3,), t)) for t in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(ends[0], noise)
    torch.testing.assert_close(ends[2], latents)
    torch.testing.assert_close(ends[1] + 0.75 * schedule.path_velocity(latents, noise), latents)


def check_guided(samplers=samplers):
    """0 is unconditional, 1 conditional, 3 goes twice as far again."""
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    found = [samplers.guided(conditional, unconditional, scale).item() for scale in (0, 1, 3)]
    assert found == [1, 2, 4]


def check_step_adds_its_noise(samplers=samplers):
    """A step of ddpm moves along the noise, by temperature times the predicted deviation."""
    chain = cosine_schedule(1000, 50, CPU)
    state = torch.zeros(1, 2), torch.full((1, 4), -1.0)  # noisy latents, network output
    without, added = (samplers.ddpm_step(chain, 9, *state, torch.ones(1, 2), t) for t in (0, 0.5))
    deviation = (chain.posterior_log_variance[9] / 2).exp()
    torch.testing.assert_close(added - without, (0.5 * deviation).expand(1, 2))


def check_clamp(samplers=samplers):
    """Clamped, a chain of wrong predictions stays within the bounds, on both sides."""
    chain, draw = cosine_schedule(1000, 20, CPU), normal_draw(64)

    def wrong(noisy, timesteps):
        return torch.zeros(len(noisy), 2 * noisy.shape[1])

    assert samplers.ddpm(wrong, draw, chain).abs().max() > 100
    latents = samplers.ddpm(wrong, draw, chain, clamp_predicted=3.0)
    assert latents.abs().max() <= 3 and latents.min() < -1 and latents.max() > 1


def test_tables_equal_mar():
    check_tables()


@pytest.mark.parametrize("num_steps", [2, 7, 25, 250, 1000])
def test_respacing_keeps_both_ends(num_steps):
    chain = cosine_schedule(1000, num_steps, CPU)
    assert len(chain) == num_steps
    assert chain.timesteps[0] == 0 and chain.timesteps[-1] == 999
    train = cosine_schedule(1000, 1000, CPU)
    torch.testing.assert_close(chain.alphas_cumprod, train.alphas_cumprod[chain.timesteps])


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_impossible_respacing_is_refused(num_steps):
    with pytest.raises(ValueError, match=rf"is {num_steps}; .* 2 to 1000 steps"):
        cosine_schedule(1000, num_steps, CPU)


def test_log_snr_spacing_is_even_and_complete():
    check_log_snr_spacing()


def test_predict_clean_inverts_add_noise():
    check_noising()


def test_schedule_built_in_inference_mode_can_train():
    cosine_schedule.cache_clear()
    with torch.inference_mode():
        chain = cosine_schedule(1000, 17, CPU)
    latents = torch.ones(1, 2, requires_grad=True)
    chain.add_noise(latents, torch.zeros(1, 2), 3).sum().backward()
    torch.testing.assert_close(latents.grad, chain.signal_scale[3].expand(1, 2))


def test_path_leads_from_noise_to_data():
    check_path()


def test_guided_extrapolates_from_unconditional():
    check_guided()


def test_ddpm_step_adds_its_noise():
    check_step_adds_its_noise()


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_recovers_a_gaussian(name):
    check_gaussian(name)


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_flow_sampler_converges_with_its_order(name, order):
    check_order(name, order)


@pytest.mark.parametrize("name", VELOCITY_SAMPLERS)
def test_temperature_scales_the_starting_noise_of_flow(name):
    draw = normal_draw(64)
    run = SAMPLERS[name].run
    doubled = run(optimal_velocity, draw, 10, 2.0)
    torch.testing.assert_close(doubled, run(optimal_velocity, lambda step: 2 * draw(step), 10))


def test_temperature_zero_leaves_only_the_start_of_ddpm():
    chain, draw = cosine_schedule(1000, 20, CPU), normal_draw(64)
    once = samplers.ddpm(optimal_noise(chain), draw, chain, temperature=0)
    again = samplers.ddpm(optimal_noise(chain), lambda _: draw(0), chain, temperature=0)
    assert torch.equal(once, again)
    assert not torch.equal(once, samplers.ddpm(optimal_noise(chain), draw, chain))


def test_clamp_bounds_an_exploding_chain():
    check_clamp()


@pytest.mark.parametrize("name", SAMPLERS)
def test_chain_is_float32_under_half_precision_noise_and_network(name):
    seen = []

    def predict(noisy, timesteps):
        seen.append(noisy.dtype)
        return torch.zeros(len(noisy), noisy.shape[1] * (1 + (name in NOISE_SAMPLERS))).bfloat16()

    steps = cosine_schedule(1000, 4, CPU) if name in NOISE_SAMPLERS else 4
    latents = SAMPLERS[name].run(predict, lambda step: torch.ones(2, 3).bfloat16(), steps)
    assert {latents.dtype, *seen} == {torch.float32}


# ---- every sign in the arithmetic matters: each one is flipped in turn and must be caught


def test_flipping_any_sign_of_the_samplers_is_caught():
    def all_hold(module):
        return passes(
            (check_guided, module),
            (check_step_adds_its_noise, module),
            (check_clamp, module),
            *((check_order, name, order, module) for name, order in ORDERS.items()),
            *((check_gaussian, name, module) for name in ("ddpm", *VELOCITY_SAMPLERS)),
        )

    assert all_hold(samplers)
    found = [(line, all_hold(mutant)) for line, mutant in mutants(samplers)]
    assert len(found) >= 8
    assert not [line for line, survives in found if survives]


def test_flipping_any_sign_of_the_schedule_is_caught():
    def all_hold(module):
        return passes(
            (check_path, module),
            (check_tables, module),
            (check_log_snr_spacing, module),
            (check_noising, module),
            (check_gaussian, "ddpm", samplers, module),
        )

    assert all_hold(schedule)
    found = [(line, all_hold(mutant)) for line, mutant in mutants(schedule)]
    assert len(found) >= 20
    assert not [line for line, survives in found if survives]
