"""Costs on paper: presets of the paper's sizes, FLOPs, memory, messages, and the printed plan."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from statistics import NormalDist, mean

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mllm_audio.build import build_model
from mllm_audio.config import override
from mllm_audio.costs import (
    LIVE_PARAMETERS,
    STAGES,
    activation_bytes,
    block_bytes,
    sent_bytes,
    state_bytes,
)
from mllm_audio.data.layout import Audio, Text, collate
from mllm_audio.hardware import GPUS, find_gpu, get_gpu
from mllm_audio.info import count_components, sketch
from mllm_audio.masking import MaskingConfig, sample_far, sample_kept_positions
from mllm_audio.plan import Assumptions, lowest, plan, quantiles, row_counts
from mllm_audio.presets import get_preset
from mllm_audio.training.ema import EMA
from mllm_audio.training.flops import model_flops
from mllm_audio.training.optim import OptimConfig, build_optimizer
from mllm_audio.types import StepCounts


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        ("base_193m", (170_108_928, 20_344_064, 100_608, 393_216, 1_536)),
        ("large_462m", (403_079_168, 56_258_816, 134_144, 524_288, 2_048)),
        ("large_462m audio.head.width=1024", (403_079_168, 36_356_352, 134_144, 524_288, 2_048)),
    ],
)
def test_presets_have_the_parameters_of_the_papers_parts(preset, parts):
    name, *overrides = preset.split()
    started = time.monotonic()
    model = sketch(override(get_preset(name), overrides))
    assert time.monotonic() - started < 3
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    counts = count_components(model)
    found = (
        counts["backbone.blocks"],
        counts["audio.head"],
        counts["audio.latent_proj"] + counts["audio.latent_norm"],
        counts["audio.content_positions"] + counts["audio.target_positions"],
        counts["backbone.final_norm"],
    )
    assert found == parts
    assert "audio.end_of_audio" not in counts
    assert sum(v for k, v in counts.items() if k != "total") == counts["total"]


def test_the_base_preset_states_the_papers_training():
    config = get_preset("base_193m")
    optim = config.train.optim
    assert (optim.lr, optim.schedule, optim.betas) == (1e-4, "constant", (0.9, 0.95))
    assert (optim.weight_decay, optim.max_grad_norm) == (0.02, 3.0)
    assert (config.train.batch_size, config.train.ema_decay) == (2048, 0.9999)
    assert (config.masking.schedule, config.masking.scale) == ("c", 1.0)
    assert (config.backbone.num_heads, config.backbone.dropout) == (12, 0.1)
    assert (config.audio.max_seconds, config.audio.channel_weight_exponent) == (10.24, 0)
    assert (config.audio.head.name, config.audio.head.batch_multiplier) == ("ddpm", 4)
    assert config.data.unconditional_share == 0.1
    generation = config.generation
    assert (generation.num_inference_steps, generation.temperature) == (100, 1.0)
    assert (generation.guidance_scale, generation.guidance_schedule) == (7.0, "annealed")
    large = get_preset("large_462m")
    assert (large.backbone.num_heads, large.train) == (16, config.train)


# --- FLOPs


def text_and_audio(special, rows: int, length: int, words: int, latents: int, **options):
    """Rows of `length` text ids, of which `words` are learned, and a span of audio."""
    generator = torch.Generator().manual_seed(0)
    learned = torch.arange(length) >= length - words
    made = [
        [
            Text(torch.randint(5, 200, (length,), generator=generator), learned),
            Audio(torch.randn(latents, 128, generator=generator), torch.arange(latents)),
        ]
        for _ in range(rows)
    ]
    return collate(made, [str(row) for row in range(rows)], special, **options)


@pytest.mark.parametrize("max_distance", [1, 4])
def test_rows_are_counted_with_their_copies(special, max_distance):
    digits = get_preset("digits")
    config = replace(digits, masking=replace(digits.masking, max_distance=max_distance))
    counts = row_counts(config, 0.5, 1, 8)
    generator = torch.Generator().manual_seed(0)
    kept = sample_kept_positions(config.audio.max_tokens, 0.5, generator)
    far = sample_far(config.masking, 1 + len(kept), generator)
    row = [Text(torch.arange(8)), Audio(torch.randn(32, 128), kept, far=far)]
    found = collate([row], ["row"], special, masking_ratio=0.5).counts
    assert found.elements == counts.elements == 8 + (17 if max_distance == 1 else 17 + 8)
    # Of copies near the end, some ask for the end and others for nothing.
    assert 0 <= counts.targets - found.targets <= (0 if max_distance == 1 else 3)


# Without padding: rows of a multiple of 8 elements, latents and words in multiples of 128.
@pytest.mark.parametrize("shape", [(8, 7, 0, 16), (16, 15, 8, 16)])
@pytest.mark.parametrize("head", ["ddpm", "flow"])
def test_the_formula_is_what_torch_counts_and_the_input_gradients_of_first_layers(
    make_model, special, family, head, shape
):
    model = make_model(family, head).train()
    batch = text_and_audio(special, *shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch, torch.Generator().manual_seed(0)).total.backward()
    counts = batch.counts
    network = model.audio.head.network
    draws = counts.latents * model.audio.config.head.batch_multiplier
    spared = 2 * model.audio.latent_proj.weight.numel() * len(batch.latents)
    spared += 2 * network.input_projection.weight.numel() * draws
    spared += 2 * network.timestep_embedding.linear_in.weight.numel() * draws
    flops = model_flops(model)
    idle = 0 if counts.words else flops.per_word  # the text head runs once all the same
    assert flops.step(counts) == counter.get_total_flops() + spared - idle
    assert batch.input_ids.numel() == counts.elements


def test_a_frozen_weight_costs_two_products_and_a_recomputed_one_four(make_model):
    model = make_model()
    element = StepCounts(elements=1, rows=1)
    trained, recomputed = (
        model_flops(model).step(element, recompute=recompute) for recompute in (False, True)
    )
    layers, width = 2, 32
    blocks, pair = layers * 12 * width**2, 4 * layers * width
    assert trained == 6 * blocks + 3 * pair
    assert recomputed == 8 * blocks + 4 * pair
    model.backbone.requires_grad_(False)
    assert model_flops(model).step(element) == 4 * blocks + 3 * pair


def test_weights_that_zero_3_has_emptied_count_as_whole(make_model):
    model = make_model()
    counts = StepCounts(rows=2, elements=40, latents=32, targets=34, words=5)
    whole = model_flops(model).step(counts)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert model_flops(model).step(counts) == whole


# --- masking


def truncated_mean(mode: float, std: float, low: float, high: float) -> float:
    normal, a, b = NormalDist(), (low - mode) / std, (high - mode) / std
    return mode + std * (normal.pdf(a) - normal.pdf(b)) / (normal.cdf(b) - normal.cdf(a))


def test_the_expected_ratio_of_schedule_c_is_that_of_its_two_normals():
    expected = (truncated_mean(0.7, 0.1, 0.4, 0.95) + truncated_mean(0.7, 0.35, 0.0, 0.7)) / 2
    assert mean(quantiles(MaskingConfig(schedule="c"))) == pytest.approx(expected, abs=1e-4)
    assert mean(quantiles(MaskingConfig(schedule="fixed", scale=0.7))) == pytest.approx(0.7)
    assert lowest(MaskingConfig(schedule="c")) == 0.0
    assert lowest(MaskingConfig(schedule="a")) == pytest.approx(0.4)


# --- memory


def test_stage_0_in_float32_is_the_bytes_of_a_model_its_optimizer_and_its_averages(make_model):
    model = make_model()
    optimizer = build_optimizer(model, OptimConfig())
    ema = EMA({name: p.detach() for name, p in model.named_parameters()}, 0.99)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    parameters = list(model.parameters())
    state = state_bytes(sum(p.numel() for p in parameters), "0", 1, "float32")
    assert state.weights == sum(p.nbytes for p in parameters)
    assert state.gradients == sum(p.grad.nbytes for p in parameters)
    assert state.optimizer == sum(t.nbytes for t in [*moments, *ema.averages.values()])
    assert state.host == 0


@pytest.mark.parametrize(
    ("precision", "stage", "bytes_per_parameter"),
    [  # on 4 GPUs: weights, gradients, optimizer, host
        ("bf16", "0", (6, 4, 12, 0)),
        ("bf16", "1", (2, 6, 4, 0)),
        ("bf16", "2", (2, 1, 4, 0)),
        ("bf16", "3", (2.5, 1, 4, 0)),
        ("bf16", "3_offload", (2, 0, 0, 5.5)),
        ("float32", "0", (4, 4, 12, 0)),
        ("float32", "1", (4, 4, 4, 0)),
        ("float32", "2", (4, 1, 4, 0)),
        ("float32", "3", (5, 1, 4, 0)),
        ("float32", "3_offload", (4, 0, 0, 6)),
    ],
)
def test_stages_hold_their_shares(precision, stage, bytes_per_parameter):
    state = state_bytes(1000, stage, 4, precision)
    found = (state.weights, state.gradients, state.optimizer, state.host)
    assert found == tuple(1000 * x for x in bytes_per_parameter)


def test_zero_3_gathers_no_more_than_it_may_keep():
    state = state_bytes(10 * LIVE_PARAMETERS, "3", 10, "bf16")
    assert state.weights == 2 * LIVE_PARAMETERS + 2 * LIVE_PARAMETERS


def kept_bytes(model, batch) -> int:
    """Sum the tensors that autograd keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch, torch.Generator().manual_seed(0))
    return sum(kept.values())


@pytest.mark.parametrize("head", ["ddpm", "flow"])
def test_activations_are_what_autograd_keeps(special, family, head):
    config = override(
        get_preset("base_193m"),
        [
            f"backbone.family={family}", "backbone.hidden_size=96", "backbone.num_layers=3",
            "backbone.num_heads=4", "backbone.dropout=0", "audio.max_tokens=64",
            f"audio.head.name={head}", "audio.head.width=128", "audio.head.num_blocks=2",
            "train.precision=float32",
        ],
    )  # fmt: skip
    model = build_model(config, 300).cpu().train()
    with torch.no_grad():  # a weight that is zero would be kept as well
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    batch = text_and_audio(special, 4, 15, 0, 64, end_of_audio=False)
    found = kept_bytes(model, batch)
    expected = activation_bytes(config, batch.counts.elements, batch.counts.latents, False)
    assert expected == pytest.approx(found, rel=0.02)


def test_checkpointing_keeps_a_block_and_the_inputs_of_the_others():
    config = get_preset("base_193m")
    whole, less = (activation_bytes(config, 1, 0, checkpointing) for checkpointing in (False, True))
    block = block_bytes(config.backbone, "bf16")
    assert block == 768 * (8 + 28 + 2)
    assert whole - less == 23 * block - 24 * 2 * 768


# --- messages


@pytest.mark.parametrize(
    ("precision", "sent"),
    [  # bytes per parameter and (N - 1) / N, of 3 micro-batches
        ("bf16", {"0": 8, "1": 6, "2": 14, "3": 18, "3_offload": 18}),
        ("float32", {"0": 8, "1": 12, "2": 28, "3": 36, "3_offload": 36}),
    ],
)
def test_rings_send_their_volume(precision, sent):
    for stage in STAGES:
        assert sent_bytes(1000, stage, 4, 3, precision) == 1000 * 3 / 4 * sent[stage]
        assert sent_bytes(1000, stage, 1, 3, precision) == 0


# --- GPUs


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_found_by_the_words_of_their_names(device, name):
    assert find_gpu(device) is (GPUS[name] if name else None)


def test_every_gpu_names_its_source():
    for gpu in GPUS.values():
        assert "data sheet" in gpu.source
        assert "network" in gpu.source
    assert get_gpu("H100").memory_gib == pytest.approx(74.5, abs=0.01)


# --- the command


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mllm_audio", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_prints_one_page_whose_parameters_are_those_of_info():
    done = command("plan", "--preset", "base_193m", "--gpus", 64, "--batch", 2048)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100
    total = command("info", "base_193m").stdout.splitlines()[-1].split()[1]
    assert f"{total} parameters" in done.stdout
    assert "1,000 epochs = 175,000 steps" in done.stdout
    assert "64 GPUs x 32 at once x 1 in turn" in done.stdout
    assert [line.split()[0] for line in lines if re.match(r"[0-3]", line)] == list(STAGES)


def numbers(text: str, pattern: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(value.replace(",", "")) for value in found.groups()]


def test_the_page_is_the_formulas():
    config = get_preset("base_193m")
    given = Assumptions(gpus=64)
    page = plan(config, given)
    flops = model_flops(sketch(config))
    steps = []
    for ratio in quantiles(config.masking):
        kept = 256 - round(256 * ratio)
        counts = StepCounts(rows=2048, elements=2048 * (17 + kept), latents=2048 * kept)
        steps.append(flops.step(counts))
    (petaflops,) = numbers(page, r"step +([\d.]+) PFLOP")
    assert petaflops == pytest.approx(mean(steps) / 1e15, rel=2e-3)
    seconds = mean(steps) / (64 * 989e12 * 0.4)
    (hours,) = numbers(page, r"FLOP: ([\d.]+) h")
    assert hours == pytest.approx(175_000 * seconds / 3600, abs=0.05)
    rate, gigabytes = numbers(page, r"read up to ([\d,]+) clips/s, ([\d.]+) GB/s")
    assert rate == pytest.approx(2048 / seconds, rel=1e-4)
    assert gigabytes == pytest.approx(rate * 256 * 128 * 2 / 1e9, rel=1e-2)
    assert "360,000 clips x 256 x 128 in float16: 22.0 GiB" in page
    # The largest step drops nothing: 32 rows of 16 words, a start and 256 latents.
    activations = activation_bytes(config, 32 * 273, 32 * 256, False)
    parameters = count_components(sketch(config))["total"]
    row = next(line for line in page.splitlines() if line.startswith("2 "))
    total = state_bytes(parameters, "2", 64, "bf16")
    held = total.weights + total.gradients + total.optimizer + activations
    assert float(row.split("|")[1].split()[0]) == pytest.approx(held / 2**30, abs=0.005)
    sent, sending, hours = map(float, row.split("|")[-1].split())
    assert sent == pytest.approx(sent_bytes(parameters, "2", 64, 1, "bf16") / 1e9, abs=0.005)
    assert sending == pytest.approx(sent / 50, abs=5e-4)
    assert hours == pytest.approx(175_000 * max(seconds, sending) / 3600, abs=0.06)


def test_the_page_follows_the_settings():
    config = get_preset("base_193m")
    few, many = (plan(config, Assumptions(gpus=n, gpu="l4", mfu=0.3)) for n in (4, 64))
    assert "NO" in few
    assert "at 32 GB/s" in few
    assert "at 12.5 GB/s" in many
    small = override(config, ["train.micro_batch_size=4", "train.precision=float32"])
    page = plan(small, Assumptions(gpus=64))
    assert "64 GPUs x 4 at once x 8 in turn" in page
    assert "in float32" in page
    assert "x 1 in turn" in plan(override(config, ["train.batch_size=64"]), Assumptions(gpus=64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", 64, "--gpu", "h10"], "unknown GPU 'h10'; did you mean 'h100'?"),
        (["--gpus", 48], r"2048 is not a multiple of 48 processes.*set train.batch_size=2016"),
        (["--gpus", 64, "--micro-batch", 5], r"set train.micro_batch_size=4"),
        (["--gpus", 64, "--clips", 100], "100 clips for a batch of 2048; type --batch 100 or less"),
        (["--gpus", 64, "--mfu", 40], "an MFU of 40, expected a share in (0, 1]"),
        (["--gpus", 64, "train.batchsize=3"], "unknown key 'batchsize'"),
        (["--preset", "voice", "--gpus", 8], "preset 'voice' takes the size of a trained"),
        (["--preset", "base", "--gpus", 8], "unknown preset 'base'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    from mllm_audio.cli import main

    line = ["mllm-audio", "plan", "--preset", "base_193m", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert re.search(message.replace("(", r"\(").replace("?", r"\?"), error[0]), error[0]
