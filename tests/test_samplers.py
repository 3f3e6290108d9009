"""Claims about samplers on a problem whose solution is known, and against diffusers' schedulers.

The latents are N(MEAN, DEVIATION^2), so the best prediction of the noise, the ODE from every start
and the moments of every SDE are known in closed form.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from mutation import mutants, passes

from mllm_audio.diffusion import solvers
from mllm_audio.diffusion.noise import Noise
from mllm_audio.diffusion.samplers import NOISE_SAMPLERS, SAMPLERS, VELOCITY_SAMPLERS, ddpm
from mllm_audio.diffusion.schedule import chain_of, cosine_schedule
from mllm_audio.generation.decode import GenerationConfig, decode
from mllm_audio.heads import build_head
from mllm_audio.heads.adaln_mlp import predict_under
from mllm_audio.heads.base import HeadConfig, SamplingConfig
from mllm_audio.heads.flow import TIME_SCALE

# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")
MEAN, DEVIATION = 1.5, 0.4
ORDERS = {"ddim": 1, "dpmpp_2m": 2}  # of convergence
ETAS = {"dpmpp_2m": 0.0, "dpmpp_2m_sde": 1.0}  # of the ddim that their first steps are
NEW = [name for name in NOISE_SAMPLERS if name != "ddpm"]


def optimal(chain):
    """Predict the noise of N(MEAN, DEVIATION^2), the only mean that no network can better."""

    def predict(noisy, timesteps):
        index = int((chain.timesteps == timesteps).nonzero())
        signal, scale = chain.signal_scale[index], chain.noise_scale[index]
        return scale * (noisy - signal * MEAN) / (signal**2 * DEVIATION**2 + scale**2)

    return predict


def exact_state(chain, start, index):
    """Where the ODE of that prediction is at `index`, in float64: noise keeps its quantile."""
    signal, scale = chain.signal_scale.double(), chain.noise_scale.double()
    deviation = ((signal * DEVIATION) ** 2 + scale**2).sqrt()
    quantile = (start.double() - signal[-1] * MEAN) / deviation[-1]
    return signal[index] * MEAN + deviation[index] * quantile


def even_chain(num_steps):
    """A chain from half log SNR -3 to 3, in even gaps."""
    log_snr = torch.linspace(3, -3, num_steps, dtype=torch.float64)
    return chain_of(torch.arange(num_steps), torch.sigmoid(2 * log_snr), CPU)


def draw_for(rows, dim=1):
    return Noise(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), dim).draw


def rates(errors):
    return [math.log2(before / after) for before, after in pairwise(errors)]


# ---- the ODE


def check_order(name, module=solvers):
    """Halving the gap of log SNR divides the error by 2^order, and it is small."""
    draw, errors = draw_for(64, 4), []
    for num_steps in (17, 33, 65):
        chain = even_chain(num_steps)
        predict = optimal(chain)
        last = exact_state(chain, draw(0), 0).float()
        expected = chain.predict_clean(last, predict(last, chain.timesteps[:1]), 0)
        found = getattr(module, name)(predict, draw, chain)
        errors.append(float((found - expected).abs().max()))
    assert rates(errors) == pytest.approx([ORDERS[name]] * 2, abs=0.2), errors
    assert errors[-1] < (0.05 if ORDERS[name] == 1 else 0.001)


@pytest.mark.parametrize("name", ORDERS)
def test_solver_converges_with_its_order(name):
    check_order(name)


@pytest.mark.parametrize(("name", "most"), [("ddim", 0.08), ("dpmpp_2m", 0.006)])
def test_solver_converges_on_the_timesteps_of_a_network(name, most):
    draw, errors = draw_for(64, 4), []
    for num_steps in (20, 40, 80, 160):
        chain = cosine_schedule(1000, num_steps, CPU, "log_snr")
        signal, scale = chain.signal_scale[-1], chain.noise_scale[-1]
        quantile = (draw(0) - signal * MEAN) / ((signal * DEVIATION) ** 2 + scale**2).sqrt()
        found = NOISE_SAMPLERS[name].run(optimal(chain), draw, chain)
        errors.append(float((found - (MEAN + DEVIATION * quantile)).abs().max()))
    assert min(rates(errors)) > ORDERS[name] - 0.15, errors
    assert errors[1] < most


# ---- the SDEs


def check_moments(name, most, module=solvers, **options):
    """The samples have the target's mean and deviation, but for `most` and the error of 65,536."""
    chain = cosine_schedule(1000, 100, CPU, "log_snr")
    latents = getattr(module, name)(optimal(chain), draw_for(65_536), chain, **options)
    assert abs(float(latents.mean()) - MEAN) < 4 * DEVIATION / 256 + 0.002
    assert abs(float(latents.std()) - DEVIATION) < most
    centred = (latents - latents.mean()) / latents.std()
    assert abs(float((centred**4).mean()) - 3) < 0.1  # of a normal


@pytest.mark.parametrize(
    ("name", "most", "options"),
    [
        ("dpmpp_2m_sde", 0.005, {}),
        ("dpmpp_2m", 0.003, {}),
        ("ddim", 0.025, {"eta": 1.0}),  # first order: twice the steps halve it
        ("ddim", 0.02, {"eta": 0.5}),
    ],
)
def test_samples_have_the_moments_of_the_target(name, most, options):
    check_moments(name, most, **options)


def deviation_of(name, num_steps, temperature=1.0, **options):
    """Deviation of a sampler's output, exactly: it is linear in its independent noises."""
    chain, power = cosine_schedule(1000, num_steps, CPU, "log_snr"), 0.0
    zero = NOISE_SAMPLERS[name].run(optimal(chain), lambda _: torch.zeros(1, 1), chain, **options)
    for chosen in range(num_steps):
        unit = lambda step, chosen=chosen: torch.full((1, 1), float(step == chosen))  # noqa: E731
        found = NOISE_SAMPLERS[name].run(optimal(chain), unit, chain, temperature, **options)
        power += float(found - zero) ** 2
    return math.sqrt(power)


def test_the_sde_solver_is_of_higher_order_than_ancestral_noise():
    ancestral = [deviation_of("ddim", n, eta=1.0) - DEVIATION for n in (20, 40, 80)]
    solved = [deviation_of("dpmpp_2m_sde", n) - DEVIATION for n in (20, 40, 80)]
    assert rates([abs(error) for error in ancestral]) == pytest.approx([1, 1], abs=0.2)
    assert min(rates([abs(error) for error in solved])) > 1.6
    assert all(abs(a) > 5 * abs(b) for a, b in zip(ancestral, solved, strict=True)), (
        ancestral,
        solved,
    )


# ---- against each other


def check_ancestral(module=solvers):
    """DDIM with eta 1 is ddpm with the smaller variance, sample by sample, clamped or not."""
    draw = draw_for(64, 4)
    for spacing, clamp in (("even", None), ("log_snr", None), ("even", 0.7)):
        chain = cosine_schedule(1000, 50, CPU, spacing)
        predict = optimal(chain)

        def with_variance(noisy, timesteps, predict=predict):
            noise = predict(noisy, timesteps)
            return torch.cat([noise, torch.full_like(noise, -1.0)], dim=-1)

        expected = ddpm(with_variance, draw, chain, clamp_predicted=clamp)
        for closure in (predict, with_variance):  # what follows the noise is not read
            found = module.ddim(closure, draw, chain, clamp_predicted=clamp, eta=1.0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ddim_with_eta_one_is_ddpm_with_the_smaller_variance():
    check_ancestral()


def check_two_steps(name, module=solvers):
    """In two steps a solver is DDIM: the first has no call before it, the last no noise after."""
    chain, draw = cosine_schedule(1000, 2, CPU, "log_snr"), draw_for(64, 4)
    expected = NOISE_SAMPLERS["ddim"].run(optimal(chain), draw, chain, eta=ETAS[name])
    found = getattr(module, name)(optimal(chain), draw, chain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ETAS)
def test_two_steps_of_a_solver_are_ddim(name):
    check_two_steps(name)


MODES, SHARES, SPREAD = torch.tensor([-1.0, 0.8]), torch.tensor([0.25, 0.75]), 0.2


def test_all_agree_in_distribution_at_all_the_training_steps():
    """Of two modes, by the largest gap to the known distribution function (Kolmogorov-Smirnov)."""
    rows = 4096
    for name, sampler in NOISE_SAMPLERS.items():
        chain = cosine_schedule(1000, 1000, CPU, sampler.spacing)
        assert torch.equal(chain.timesteps, torch.arange(1000))

        def predict(noisy, timesteps, chain=chain):
            signal, scale = chain.signal_scale[timesteps], chain.noise_scale[timesteps]
            variance = (signal * SPREAD) ** 2 + scale**2
            away = noisy - signal * MODES  # (R, 2)
            weights = (SHARES.log() - away**2 / (2 * variance)).softmax(1)
            noise = (weights * away).sum(1, keepdim=True) * scale / variance
            return torch.cat([noise, -torch.ones_like(noise)], dim=-1)

        latents = sampler.run(predict, draw_for(rows), chain)[:, 0].sort().values
        below = torch.special.ndtr((latents[:, None] - MODES) / SPREAD) @ SHARES
        gap = (below - (torch.arange(rows) + 0.5) / rows).abs().max()
        assert float(gap) < 1.63 / math.sqrt(rows), name  # exceeded by 1 % of true samples


# ---- parity with diffusers


def a_network(noisy, timesteps):
    """Some noise, of no particular target."""
    return (noisy + 0.3 * (timesteps / 100).sin()).tanh()


def check_parity_of_dpmpp(name, num_steps, module=solvers):
    """A whole chain equals that of diffusers' DPMSolverMultistepScheduler, with its noise."""
    chain, draw = cosine_schedule(1000, num_steps, CPU, "log_snr"), draw_for(8, 4)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        algorithm_type="sde-dpmsolver++" if name.endswith("sde") else "dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.alphas_cumprod = cosine_schedule(1000, 1000, CPU).alphas_cumprod.double()
    scheduler.set_timesteps(timesteps=chain.timesteps.flip(0).tolist())
    latents = draw(0).double()
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        output = a_network(latents, timestep)
        latents = scheduler.step(
            output, timestep, latents, variance_noise=draw(step).double()
        ).prev_sample
    found = getattr(module, name)(a_network, draw, chain)
    torch.testing.assert_close(found, latents.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [2, 7, 20, 50])
@pytest.mark.parametrize("name", ETAS)
def test_parity_of_dpmpp_with_diffusers(name, num_steps):
    check_parity_of_dpmpp(name, num_steps)


def check_parity_of_ddim(eta, module=solvers):
    """A whole chain equals that of diffusers' DDIMScheduler, with its noise."""
    draw, powers = draw_for(8, 4), cosine_schedule(1000, 1000, CPU).alphas_cumprod.double()
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.alphas_cumprod = powers
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps.flip(0)
    latents = draw(0).double()
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        latents = scheduler.step(
            a_network(latents, timestep),
            timestep,
            latents,
            eta=eta,
            variance_noise=draw(step).double(),
        ).prev_sample
    chain = chain_of(timesteps, powers[timesteps], CPU)
    found = module.ddim(a_network, draw, chain, eta=eta)
    torch.testing.assert_close(found, latents.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_parity_of_ddim_with_diffusers(eta):
    check_parity_of_ddim(eta)


# ---- temperature, clamping, calls


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in NEW), ("ddim", {"eta": 0.6})]
)
def test_temperature_scales_every_noise(name, options):
    chain, draw = cosine_schedule(1000, 10, CPU, "log_snr"), draw_for(64, 4)
    run = NOISE_SAMPLERS[name].run
    found = run(optimal(chain), draw, chain, 0.7, **options)
    expected = run(optimal(chain), lambda step: 0.7 * draw(step), chain, **options)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, run(optimal(chain), draw, chain, **options), atol=0.01)


@pytest.mark.parametrize("name", NOISE_SAMPLERS)
def test_clamp_bounds_the_latents(name):
    chain, draw = cosine_schedule(1000, 10, CPU, "log_snr"), draw_for(64, 4)

    def wrong(noisy, timesteps):
        return torch.zeros(len(noisy), 2 * noisy.shape[1])

    run = NOISE_SAMPLERS[name].run
    assert run(wrong, draw, chain).abs().max() > 4
    assert run(wrong, draw, chain, clamp_predicted=0.5).abs().max() <= 0.5


def record(name, num_steps, **options):
    """Run a sampler; return the calls of its network and the steps it drew noise for."""
    calls, drawn = [], []

    def predict(latents, places):
        calls.append(float(places))
        return torch.zeros(2, 6 if name in NOISE_SAMPLERS else 3)

    def draw(step):
        drawn.append(step)
        return torch.ones(2, 3)

    sampler, over = SAMPLERS[name], num_steps
    if name in NOISE_SAMPLERS:
        over = cosine_schedule(1000, num_steps, CPU, sampler.spacing)
    assert sampler.run(predict, draw, over, **options).isfinite().all()
    return calls, drawn


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_as_many_as_the_table_says(name):
    for num_steps in (2, 3, 20, 1000):
        calls, _ = record(name, num_steps)
        assert len(calls) == num_steps * SAMPLERS[name].calls_per_step
    if name in VELOCITY_SAMPLERS:
        assert len(record(name, 1)[0]) == SAMPLERS[name].calls_per_step
    else:
        assert calls == sorted(calls, reverse=True)


def test_noise_is_drawn_once_a_step_and_only_where_it_is_added():
    start, all_steps = [0], list(range(20))
    for name in ("dpmpp_2m", *VELOCITY_SAMPLERS):
        assert record(name, 20)[1] == start
    assert record("ddim", 20)[1] == start
    assert record("ddim", 20, eta=0.1)[1] == all_steps
    assert record("dpmpp_2m_sde", 20)[1] == all_steps
    assert record("ddpm", 20)[1] == all_steps


# ---- in the heads


PAIRS = [("ddpm", name) for name in NOISE_SAMPLERS] + [("flow", name) for name in VELOCITY_SAMPLERS]


def small(name, **changes):
    """A head of D = 4, Z = 6, with no layer left at zero."""
    torch.manual_seed(1)
    head = build_head(HeadConfig(name=name, width=32, num_blocks=2, **changes), 4, 6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head


def noise_for(rows):
    return Noise(torch.arange(rows), torch.arange(rows), 4)


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_a_head_hands_its_sampler_guided_predictions_and_its_options(name, sampler):
    head, condition, other = small(name, clamp_predicted=2.0), torch.randn(3, 6), torch.randn(3, 6)
    eta = 0.5 if SAMPLERS[sampler].takes_eta else 0.0
    config = SamplingConfig(
        sampler=sampler, num_inference_steps=5, guidance_scale=2.5, temperature=0.8, eta=eta
    )
    scale, options = (1, {}) if name == "ddpm" else (TIME_SCALE, {})
    over = 5
    if name == "ddpm":
        over = cosine_schedule(1000, 5, CPU, SAMPLERS[sampler].spacing)
        options = {"clamp_predicted": 2.0, **({"eta": eta} if eta else {})}

    def predict(noisy, places):
        """Guide by two separate runs of the network."""
        first, second = (
            predict_under(head.network, states, None, 1.0)(noisy, scale * places)
            for states in (condition, other)
        )
        guided = second[:, :4] + 2.5 * (first[:, :4] - second[:, :4])
        return torch.cat([guided, first[:, 4:]], dim=1)

    with torch.no_grad():
        expected = SAMPLERS[sampler].run(predict, noise_for(3).draw, over, 0.8, **options)
    found = head.sample(condition, other, config, noise_for(3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_rows_are_their_own_and_nothing_is_read_back(name, sampler):
    head, condition, other = small(name), torch.randn(3, 6), torch.randn(3, 6)
    scales = torch.tensor([[1.0], [2.5], [4.0]])
    config = SamplingConfig(sampler=sampler, num_inference_steps=5, guidance_scale=scales)
    together = head.sample(condition, other, config, noise_for(3))
    for row in range(3):
        one = slice(row, row + 1)
        alone = head.sample(
            condition[one],
            other[one],
            SamplingConfig(
                sampler=sampler, num_inference_steps=5, guidance_scale=float(scales[row])
            ),
            Noise(torch.arange(3)[one], torch.arange(3)[one], 4),
        )
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    seeds = torch.empty(3, dtype=torch.int64, device="meta")  # meta tensors hold no values
    states = torch.empty(3, 6, device="meta")
    config = SamplingConfig(sampler=sampler, num_inference_steps=5, guidance_scale=2.0)
    latents = head.to("meta").sample(states, states, config, Noise(seeds, seeds, 4))
    assert latents.shape == (3, 4) and latents.dtype == torch.float32


def test_few_steps_of_a_solver_do_not_amplify_what_a_head_gets_wrong():
    """Where MAR's timesteps start there is no signal: an error there comes out 20,000-fold."""
    wrong = lambda noisy, _timesteps: 0.9 * noisy  # noqa: E731  off by a tenth at the start
    for num_steps in (2, 5, 10):
        chain = cosine_schedule(1000, num_steps, CPU, "log_snr")
        latents = NOISE_SAMPLERS["dpmpp_2m"].run(wrong, draw_for(256), chain)
        assert float(latents.abs().max()) < 150
        even = cosine_schedule(1000, num_steps, CPU, "even")
        latents = NOISE_SAMPLERS["dpmpp_2m"].run(wrong, draw_for(256), even)
        assert float(latents.abs().max()) > 500


@pytest.mark.parametrize(
    ("eta", "sampler", "message"),
    [
        (0.5, None, r"eta is 0\.5 but sampler is None; set sampler to ddim, or eta to 0"),
        (0.5, "dpmpp_2m_sde", r"eta is 0\.5 but sampler is 'dpmpp_2m_sde'; set sampler to ddim"),
        (1.5, "ddim", r"eta is 1\.5; set 0, which adds no noise, to 1"),
    ],
)
def test_an_eta_without_use_is_refused(eta, sampler, message):
    for kind in (SamplingConfig, GenerationConfig):
        with pytest.raises(ValueError, match=message):
            kind(sampler=sampler, eta=eta)


# ---- over the positions of a span


def test_steps_fall_evenly_from_the_first_latent_to_the_last():
    config = GenerationConfig(num_inference_steps=50, final_inference_steps=5)
    assert [config.steps_at(position, 10) for position in range(10)] == list(range(50, 0, -5))
    assert config.steps_at(0, 1) == 50
    assert GenerationConfig(num_inference_steps=50).steps_at(9, 10) == 50
    rising = GenerationConfig(num_inference_steps=4, final_inference_steps=7)
    assert [rising.steps_at(position, 4) for position in range(4)] == [4, 5, 6, 7]


def test_a_latent_is_drawn_as_its_position_says():
    config = GenerationConfig(
        sampler="ddim",
        num_inference_steps=9,
        final_inference_steps=3,
        guidance_weight=4.0,
        temperature=0.6,
        eta=0.2,
    )
    expected = {"sampler": "ddim", "temperature": 0.6, "eta": 0.2}
    assert config.sampling_at(0, 3) == SamplingConfig(
        num_inference_steps=9, guidance_scale=5.0, **expected
    )
    assert config.sampling_at(2, 3) == SamplingConfig(
        num_inference_steps=3, guidance_scale=config.scale_at(2, 3), **expected
    )
    with pytest.raises(ValueError, match=r"generation.final_inference_steps=0, expected \[1"):
        GenerationConfig(final_inference_steps=0)


def test_decoding_calls_the_head_less_at_later_positions(make_model, text_tokenizer, special):
    model, calls = make_model("gpt2", "ddpm"), []
    model.audio.head.network.register_forward_hook(lambda *_: calls.append(1))
    config = GenerationConfig(
        sampler="dpmpp_2m", num_inference_steps=8, final_inference_steps=2, seconds=0.48
    )
    prompt = torch.tensor(text_tokenizer.encode("a low beep"))
    counts = []
    for _ in decode(model, [prompt], special, [0], config):
        counts.append(len(calls))
        calls.clear()
    assert counts == [config.steps_at(index, len(counts)) for index in range(len(counts))]
    assert counts[0] == 8 and counts[-1] == 2 and len(counts) > 4


def test_the_command_line_names_every_sampler():
    from click.testing import CliRunner

    from mllm_audio.cli import cli

    shown = " ".join(CliRunner().invoke(cli, ["generate", "--help"]).output.split())
    assert f"head ddpm: {', '.join(NOISE_SAMPLERS)}; of head flow" in shown
    assert f"head flow: {', '.join(VELOCITY_SAMPLERS)}." in shown


# ---- every sign matters


def test_flipping_any_sign_of_the_solvers_is_caught():
    """By the closed forms alone, and by the parity alone."""

    def closed_forms_hold(module):
        return passes(
            *((check_order, name, module) for name in ORDERS),
            *((check_two_steps, name, module) for name in ETAS),
            (check_ancestral, module),
            (check_moments, "dpmpp_2m_sde", 0.005, module),
        )

    def parity_holds(module):
        return passes(
            *((check_parity_of_dpmpp, name, 7, module) for name in ETAS),
            (check_parity_of_ddim, 0.3, module),
            (check_ancestral, module),  # diffusers is not asked to clamp
        )

    for all_hold in (closed_forms_hold, parity_holds):
        assert all_hold(solvers)
        found = [(line, all_hold(mutant)) for line, mutant in mutants(solvers)]
        assert len(found) >= 20
        assert not [line for line, survives in found if survives]
