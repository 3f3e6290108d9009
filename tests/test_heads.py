"""Claims about every head in HEADS; parity with MAR is in `test_interop.py`."""

import math

import pytest
import torch

from mllm_audio.diffusion.noise import Noise
from mllm_audio.heads import HEADS, build_head
from mllm_audio.heads.base import HeadConfig, SamplingConfig


def small(name, **changes):
    """A head of D = 4, Z = 6, with no layer left at zero."""
    torch.manual_seed(1)
    config = HeadConfig(name=name, width=32, num_blocks=2, **changes)
    head = build_head(config, latent_dim=4, condition_dim=6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head


@pytest.mark.parametrize(
    ("num_blocks", "count"), [(1, 9_843_968), (3, 20_344_064), (6, 36_094_208)]
)
def test_parameter_counts_equal_mar(num_blocks, count):
    config = HeadConfig(num_blocks=num_blocks)
    with torch.device("meta"):
        head = build_head(config, latent_dim=128, condition_dim=768)
    assert sum(p.numel() for p in head.parameters()) == count


def noise_for(rows, dim=4):
    return Noise(torch.arange(rows), torch.arange(rows), dim)


@pytest.mark.parametrize("name", HEADS)
def test_loss_is_one_number_a_row_and_repeats_with_its_generator(name):
    head = small(name)
    latents, condition = torch.randn(5, 4), torch.randn(5, 6)
    losses = [head.loss(latents, condition, generator=torch.manual_seed(s)) for s in (3, 3, 4)]
    assert losses[0].shape == (5,) and losses[0].dtype == torch.float32
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert head.loss(latents[:0], condition[:0]).shape == (0,)


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_and_the_condition_get_gradients(name):
    head, condition = small(name), torch.randn(5, 6, requires_grad=True)
    head.loss(torch.randn(5, 4), condition, generator=torch.manual_seed(0)).sum().backward()
    for parameter in [condition, *head.parameters()]:
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", HEADS)
def test_batch_multiplier_averages_independent_draws_under_one_embedding(name):
    head, seen, embedded = small(name, batch_multiplier=16), {}, []

    def loss_terms(latents, embedding, places, noise, channel_weight):
        seen.update(latents=latents, embedding=embedding, places=places, noise=noise)
        score = noise.mean(-1)
        return (score - 1, torch.ones_like(score)) if name == "ddpm" else score

    head.loss_terms = loss_terms
    head.network.condition_projection.register_forward_hook(lambda *call: embedded.append(call[2]))
    latents, condition = torch.randn(5, 4), torch.randn(5, 6)
    losses = head.loss(latents, condition)
    torch.testing.assert_close(losses, seen["noise"].view(16, 5, 4).mean((0, 2)))
    assert len(seen["noise"].unique()) == 16 * 5 * 4 and len(seen["places"].unique()) > 70
    assert torch.equal(seen["latents"].view(16, 5, 4), latents.expand(16, 5, 4))
    assert len(embedded) == 1 and len(embedded[0]) == 5
    assert torch.equal(seen["embedding"].view(16, 5, 32), embedded[0].expand(16, 5, 32))


@pytest.mark.parametrize("name", HEADS)
def test_channel_weight_weighs_the_squared_error_only(name):
    head, latents = small(name), torch.randn(5, 4)
    embedding = head.network.embed_condition(torch.randn(5, 6)).detach()
    places = torch.tensor([0, 1, 300, 600, 999]) if name == "ddpm" else torch.linspace(0, 1, 5)
    noise, weights = torch.randn(5, 4), 4 * torch.eye(4)

    def terms(weight):
        found = head.loss_terms(latents, embedding, places, noise, weight)
        return found if isinstance(found, tuple) else (found, torch.zeros(5))

    plain, bound = terms(None)
    torch.testing.assert_close(terms(torch.ones(4)), (plain, bound))
    torch.testing.assert_close(sum(terms(weight)[0] for weight in weights) / 4, plain)
    assert not torch.allclose(terms(weights[0])[0], plain)
    assert torch.equal(terms(weights[0])[1], bound)


def test_bound_leaves_the_predicted_noise_alone():
    head = small("ddpm")
    embedding = head.network.embed_condition(torch.randn(5, 6))
    timesteps = torch.tensor([0, 1, 300, 600, 999])
    _, bound = head.loss_terms(torch.randn(5, 4), embedding, timesteps, torch.randn(5, 4))
    bound.sum().backward()
    grad = head.network.output.projection.bias.grad
    assert (grad[:4] == 0).all() and (grad[4:] != 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_row_ignores_its_neighbours(name):
    head, condition, other = small(name), torch.randn(3, 6), torch.randn(3, 6)
    config = SamplingConfig(num_inference_steps=5, guidance_scale=2.0)
    together = head.sample(condition, other, config, noise_for(3))
    for row in range(3):
        one = slice(row, row + 1)
        noise = Noise(torch.arange(3)[one], torch.arange(3)[one], 4)
        alone = head.sample(condition[one], other[one], config, noise)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_scale_1_never_runs_the_second_branch(name):
    head, condition = small(name), torch.randn(3, 6)
    rows = []
    head.network.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    config = SamplingConfig(num_inference_steps=5)
    poison = torch.full((3, 6), math.nan)
    plain = head.sample(condition, None, config, noise_for(3))
    assert torch.equal(plain, head.sample(condition, poison, config, noise_for(3)))
    assert set(rows) == {3}
    head.sample(condition, condition, SamplingConfig(guidance_scale=2.0), noise_for(3))
    assert rows[-1] == 6


@pytest.mark.parametrize("name", HEADS)
def test_guidance_between_equal_branches_changes_nothing(name):
    head, condition = small(name), torch.randn(3, 6)
    plain = head.sample(condition, None, SamplingConfig(num_inference_steps=9), noise_for(3))
    config = SamplingConfig(num_inference_steps=9, guidance_scale=5.0)
    found = head.sample(condition, condition, config, noise_for(3))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_no_value_is_read_back_from_the_device(name):
    head, condition = small(name).to("meta"), torch.empty(3, 6, device="meta")
    seeds = torch.empty(3, dtype=torch.int64, device="meta")  # meta tensors hold no values
    config = SamplingConfig(num_inference_steps=5, guidance_scale=2.0)
    latents = head.sample(condition, condition, config, Noise(seeds, seeds, 4))
    assert head.loss(latents, condition).shape == (3,)


@pytest.mark.parametrize("name", HEADS)
def test_half_precision_weights_give_float32_latents_close_to_the_full_ones(name):
    head, condition = small(name), torch.randn(64, 6)
    config = SamplingConfig(num_inference_steps=10)
    full = head.sample(condition, None, config, noise_for(64))
    head.bfloat16()
    half = head.sample(condition.bfloat16(), None, config, noise_for(64))
    assert half.dtype == torch.float32
    assert float((half - full).norm() / full.norm()) < 0.05
    loss = head.loss(torch.randn(64, 4).bfloat16(), condition.bfloat16())
    assert loss.dtype == torch.float32 and loss.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_each_row_may_have_a_guidance_scale_of_its_own(name):
    head, noise = small(name), noise_for(3)
    condition, other = torch.randn(3, 6), torch.randn(3, 6)
    scales = torch.tensor([[1.0], [2.5], [4.0]])
    config = SamplingConfig(num_inference_steps=4, guidance_scale=scales)
    together = head.sample(condition, other, config, noise)
    for row, scale in enumerate(scales[:, 0].tolist()):
        one = Noise(noise.seeds[row : row + 1], noise.position[row : row + 1], noise.dim)
        config = SamplingConfig(num_inference_steps=4, guidance_scale=scale)
        alone = head.sample(condition[row : row + 1], other[row : row + 1], config, one)
        assert torch.allclose(together[row], alone[0], rtol=1e-5, atol=1e-5)


# ---- messages


def test_unknown_head_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown head 'ddmp'; did you mean 'ddpm'"):
        build_head(HeadConfig(name="ddmp"), 4, 6)


@pytest.mark.parametrize(
    ("head", "sampler", "usable"),
    [
        ("ddpm", "euler", "ddpm, ddim, dpmpp_2m, dpmpp_2m_sde"),
        ("flow", "ddpm", "euler, midpoint, heun"),
    ],
)
def test_sampler_of_another_head_is_refused(head, sampler, usable):
    config = SamplingConfig(sampler=sampler)
    with pytest.raises(ValueError, match=f"'{sampler}', which head '{head}'.* from {usable}"):
        small(head).sample(torch.randn(1, 6), None, config, noise_for(1))


def test_guidance_without_a_second_branch_is_refused():
    config = SamplingConfig(guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"guidance_scale is 3\.0 but no unconditional"):
        small("flow").sample(torch.randn(1, 6), None, config, noise_for(1))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (HeadConfig, "width", 0),
        (HeadConfig, "batch_multiplier", 0),
        (HeadConfig, "num_train_timesteps", 1),
        (HeadConfig, "clamp_predicted", -1.0),
        (SamplingConfig, "num_inference_steps", 0),
        (SamplingConfig, "temperature", -0.5),
    ],
)
def test_impossible_settings_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; set"):
        kind(**{field: value})


# ---- learning


MODES = torch.tensor([[[1.5, 1.0], [-1.0, 0.5]], [[0.5, -1.5], [-1.0, -1.0]]])  # (class, mode, 2)
WEIGHTS = torch.tensor([0.75, 0.25])  # of the modes
SPREAD = 0.15  # standard deviation of a mode


def draw_mixture(classes, generator):
    """Draw (P, 4) latents, two channels of the mixture of their class and two of N(0, 1)."""
    modes = torch.multinomial(WEIGHTS, len(classes), replacement=True, generator=generator)
    noise = torch.randn(len(classes), 4, generator=generator)
    return torch.cat([MODES[classes, modes] + SPREAD * noise[:, :2], noise[:, 2:]], dim=-1)


@pytest.mark.parametrize("name", HEADS)
def test_head_learns_a_conditional_mixture(name):
    torch.manual_seed(0)
    generator = torch.manual_seed(0)
    head = build_head(HeadConfig(name=name, width=64, num_blocks=2, clamp_predicted=4.0), 4, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    num_steps = 600
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        classes = torch.randint(2, (128,), generator=generator)
        condition = torch.nn.functional.one_hot(classes, 2).float()
        loss = head.loss(draw_mixture(classes, generator), condition, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    classes = torch.arange(2).repeat_interleave(1000)
    condition = torch.nn.functional.one_hot(classes, 2).float()
    config = SamplingConfig(num_inference_steps=50)
    latents = head.sample(condition, None, config, noise_for(2000))
    for which in range(2):
        points = latents[classes == which][:, :2]
        distances, nearest = torch.cdist(points, MODES[which]).min(1)
        assert (distances < 5 * SPREAD).float().mean() > 0.95
        for mode in range(2):
            members = points[nearest == mode]
            assert len(members) / len(points) == pytest.approx(float(WEIGHTS[mode]), abs=0.06)
            assert (members.mean(0) - MODES[which, mode]).norm() < SPREAD
            assert float((members - members.median(0).values).abs().median()) == pytest.approx(
                0.6745 * SPREAD, rel=0.4
            )
    rest = latents[:, 2:]
    assert abs(rest.mean()) < 0.1 and float(rest.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_latents_are_noised_as_the_loss_noises_them(name, monkeypatch):
    """The network of the loss is called on what `noised` gives for the same generator."""
    head = build_head(HeadConfig(name=name, width=16, num_blocks=1, batch_multiplier=1), 4, 6)
    latents, seen = torch.randn(5, 4), []
    forward = head.network.forward

    def spy(noisy, timesteps, embedding):
        seen.append((noisy, timesteps))
        return forward(noisy, timesteps, embedding)

    monkeypatch.setattr(head.network, "forward", spy)
    head.loss(latents, torch.randn(5, 6), None, torch.Generator().manual_seed(3))
    noisy, timesteps = head.noised(latents, torch.Generator().manual_seed(3))
    assert torch.equal(noisy, seen[0][0]) and torch.equal(timesteps, seen[0][1])
    assert timesteps.shape == (5,) and not torch.equal(noisy, latents)
