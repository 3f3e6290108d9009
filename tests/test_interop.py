"""Weights of MAR and timm under our names compute the same functions, in float32.

`python -m pytest tests/test_interop.py -k "parity or rounds" -s` prints the errors.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_audio.backbone import BackboneConfig, build_backbone
from mllm_audio.diffusion.samplers import ddpm_step
from mllm_audio.heads import build_head
from mllm_audio.heads.adaln_mlp import AdaLNMLP, predict_under
from mllm_audio.heads.base import HeadConfig, SamplingConfig
from mllm_audio.interop import adaln_mlp_from_mar, gpt2_block_from_timm

FIXTURES = Path(__file__).parent / "fixtures"
CPU = torch.device("cpu")


def tensors(name, prefix="sd/"):
    """Tensors of a fixture whose keys start with `prefix`, which is taken off."""
    with np.load(FIXTURES / name) as arrays:
        return {
            key.removeprefix(prefix): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(prefix)
        }


@pytest.fixture(scope="module")
def mar():
    return tensors("mar_diffloss_small.npz", "")


@pytest.fixture
def mar_head(mar):
    """A head holding MAR's toy-trained weights."""
    head = build_head(HeadConfig(width=64, num_blocks=2), latent_dim=16, condition_dim=24)
    weights = {k.removeprefix("sd/"): v for k, v in mar.items() if k.startswith("sd/")}
    head.network.load_state_dict(adaln_mlp_from_mar(weights))
    return head


class RecordedNoise:
    """Noise read from a list: draw(step) is its step-th entry."""

    def __init__(self, steps):
        self.steps = steps

    def draw(self, step):
        return self.steps[step]


def agree(what, found, expected, tolerance):
    """Print the largest error over the largest magnitude, and hold it to `tolerance`."""
    error = float(((found - expected).abs().max() / expected.abs().max()).detach())
    print(f"\n{what:<56}{error:.1e} (limit {tolerance:.0e})", end="")
    assert error <= tolerance, (what, error)


def test_parity_of_loss_and_gradients(mar, mar_head):
    condition = mar["train_z"].clone().requires_grad_()
    latents, noise, timesteps = mar["train_x0"], mar["train_noise"], mar["train_t"]
    embedding = mar_head.network.embed_condition(condition)
    noisy = mar_head.schedule(1000, CPU).add_noise(latents, noise, timesteps)
    agree("noisy latents", noisy, mar["train_xt"], 1e-6)
    output = mar_head.network(noisy, timesteps, embedding)
    agree("network output", output, mar["train_model_out"], 1e-5)
    assert 0 in timesteps, "the discretised term of the bound must be exercised"
    mse, bound = mar_head.loss_terms(latents, embedding, timesteps, noise)
    agree("mse", mse, mar["train_mse"], 1e-5)
    agree("bound", bound, mar["train_vb"], 1e-5)
    agree("loss", mse + bound, mar["train_loss"], 1e-5)
    agree("mean loss", (mse + bound).mean(), mar["train_loss_mean"], 1e-5)
    masked = ((mse + bound) * mar["train_mask"]).sum() / mar["train_mask"].sum()
    agree("masked mean loss", masked, mar["train_loss_masked"], 1e-5)
    masked.backward()
    agree("gradient of the condition", condition.grad, mar["grad_z"], 1e-5)
    grads = {name: p.grad for name, p in mar_head.network.named_parameters()}
    theirs = [key.removeprefix("sd/") for key in mar if key.startswith("sd/")]
    pairs = adaln_mlp_from_mar({name: mar[f"gradnorm/{name}"] for name in theirs})
    norms = torch.stack([grads[name].norm() / norm for name, norm in pairs.items()])
    agree("gradient norms, all parameters", norms, torch.ones(len(pairs)), 1e-5)
    ours = adaln_mlp_from_mar({name: torch.tensor(i) for i, name in enumerate(theirs)})
    ours = {theirs[index]: name for name, index in ours.items()}
    for key in [key for key in mar if key.startswith("grad/")]:
        agree(
            f"gradient of {key.removeprefix('grad/')}",
            grads[ours[key.removeprefix("grad/")]],
            mar[key],
            1e-5,
        )


@pytest.mark.parametrize("index", [99, 98, 75, 50, 10, 1, 0])
@pytest.mark.parametrize(("scale", "temperature"), [(1, 1), (1, 0.5), (4, 1)])
def test_parity_of_single_steps(mar, mar_head, index, scale, temperature):
    expected = mar[f"step_i{index}_cfg{scale}_temp{temperature}"]
    rows = 16 if scale == 1 else 8  # with guidance the second half is the other branch
    condition, unconditional = mar["train_z"][:rows], mar["train_z"][rows:]
    predict = predict_under(mar_head.network, condition, unconditional, scale)
    chain, noisy = mar_head.schedule(100, CPU), mar["step_x"][:rows]
    with torch.no_grad():
        output = predict(noisy, chain.timesteps[index : index + 1])
    noise = mar["step_noise"][:rows]
    found = ddpm_step(chain, index, noisy, output, noise, temperature)
    name = f"step {index}, guidance {scale}, temperature {temperature}"
    # The first step multiplies rounding by 316, so the order of MAR's operations shows in it.
    agree(name, found, expected[:rows], 1e-4 if index == 99 else 1e-5)


def test_first_step_rounds_less_than_mar(mar, mar_head):
    chain, noisy = mar_head.schedule(100, CPU), mar["step_x"]
    with torch.no_grad():
        predict = predict_under(mar_head.network, mar["train_z"], None, 1)
        output = predict(noisy, chain.timesteps[99:])
    # The same step from the same output, in float64.
    power, noise_pred = mar["alphas_cumprod_100"][99], output[:, :16].double()
    clean = (noisy.double() - (1 - power).sqrt() * noise_pred) / power.sqrt()
    exact = mar["posterior_mean_coef1_100"][99] * clean
    exact += mar["posterior_mean_coef2_100"][99] * noisy.double()
    found = ddpm_step(chain, 99, noisy, output, mar["step_noise"], temperature=0)
    agree("step 99 against float64", found, exact, 1e-6)


@pytest.mark.parametrize(("scale", "temperature"), [(1, 1), (1, 0.9), (3, 1), (7, 0.95)])
def test_parity_of_whole_chains(mar, mar_head, scale, temperature):
    noise = RecordedNoise([mar["samp_init"], *mar["samp_steps"][:, :8]])
    config = SamplingConfig(guidance_scale=scale, temperature=temperature)
    found = mar_head.sample(mar["samp_z_cond"], mar["samp_z_uncond"], config, noise)
    expected = mar[f"samp_cfg{scale}_temp{temperature}"]
    agree(f"100 steps, guidance {scale}, temperature {temperature}", found, expected, 1e-4)


def test_parity_of_initialisation():
    expected = json.loads((FIXTURES / "mar_diffloss_init_stats_w64d2.json").read_text())
    indices = adaln_mlp_from_mar({name: torch.tensor(i) for i, name in enumerate(expected)})
    torch.manual_seed(0)
    state = AdaLNMLP(16, 24, 32, width=64, num_blocks=2).state_dict()
    assert set(state) == set(indices)
    for name, index in indices.items():
        mean, deviation = list(expected.values())[index]
        if deviation == 0:
            assert (state[name] == mean).all(), name
        else:
            assert float(state[name].std()) == pytest.approx(deviation, rel=0.06), name
            assert abs(float(state[name].mean())) < 0.1 * deviation, name


def test_mar_head_loads_under_its_checkpoint_prefix():
    weights = {f"diffloss.net.{k}": v for k, v in tensors("mar_diffloss_small.npz").items()}
    converted = adaln_mlp_from_mar({**weights, "fake_latent": torch.ones(1)}, "diffloss.net.")
    network = AdaLNMLP(latent_dim=16, condition_dim=24, out_dim=32, width=64, num_blocks=2)
    network.load_state_dict(converted)
    arrays = tensors("mar_diffloss_small.npz", "train_")
    embedding = network.embed_condition(arrays["z"])
    output = network(arrays["xt"], arrays["t"], embedding)
    torch.testing.assert_close(output, arrays["model_out"], rtol=1e-5, atol=2e-6)


def test_mar_head_reports_missing_and_unexpected_names():
    weights = tensors("mar_diffloss_small.npz")
    del weights["res_blocks.0.in_ln.bias"]
    weights["ema.decay"] = torch.ones(1)
    message = r"missing \['res_blocks.0.in_ln.bias'\], unexpected \['ema.decay'\]"
    with pytest.raises(ValueError, match=message):
        adaln_mlp_from_mar(weights)
    with pytest.raises(ValueError, match=r"prefix 'net\.' does not fit: missing"):
        adaln_mlp_from_mar(weights, "net.")


def test_parity_of_our_gpt2_backbone_with_timm_blocks():
    weights, arrays = tensors("timm_block_small.npz"), tensors("timm_block_small.npz", "")
    size = BackboneConfig(
        family="gpt2", hidden_size=64, num_layers=2, num_heads=4, max_positions=12
    )
    model = build_backbone(size, vocab_size=1).base_model.eval()
    model.wpe.weight.data.zero_()
    for index, block in enumerate(model.h):
        block.load_state_dict(gpt2_block_from_timm(weights, f"{index}."))
    outputs = []
    for block in model.h:
        block.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.no_grad():
        model(inputs_embeds=arrays["x"])
    for index, output in enumerate(outputs):
        expected = arrays[f"causal_block{index}"]
        agree(f"GPT-2 block {index} against timm", output, expected, 1e-5)
    assert len(outputs) == 2


def test_timm_block_reports_missing_and_unexpected_names():
    weights = tensors("timm_block_small.npz")
    weights["0.ls1.gamma"] = weights.pop("0.attn.qkv.bias")
    message = r"missing \['attn.qkv.bias'\], unexpected \['ls1.gamma'\]"
    with pytest.raises(ValueError, match=message):
        gpt2_block_from_timm(weights, "0.")
