"""`mllm-audio bench head`: a latent by the head's `sample`, and by the plain way, in turns.

The plain way is that of MAR's published code: every step runs the whole network, timestep embedding
and modulations included, on the rows of both branches. It embeds the condition once, where MAR's
does at every step, and both ways share the arithmetic of the chain and its noise.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm_audio.benchmarks.reads import chain_bytes, weight_bytes
from mllm_audio.benchmarks.report import Check, Header, Machine, Report
from mllm_audio.benchmarks.subject import fill_zeros, known_preset
from mllm_audio.benchmarks.timing import Stopwatch
from mllm_audio.config import check_range
from mllm_audio.data.dataset import seeded
from mllm_audio.diffusion.noise import Noise
from mllm_audio.diffusion.samplers import ddpm
from mllm_audio.generation.precision import check_dtype, convert
from mllm_audio.heads.adaln_mlp import AdaLNMLP
from mllm_audio.heads.base import SamplingConfig
from mllm_audio.heads.ddpm import DDPMHead
from mllm_audio.model import default_device

GUIDANCE_SCALE = 4.0  # of both ways, so there are two rows a latent
WARM_STEPS = 4  # of both, before anything is measured


@dataclass(frozen=True, kw_only=True)
class HeadBenchConfig:
    """What is sampled, and how."""

    dtype: str = "float32"  # of our weights, in DTYPES; the plain way's are float32
    num_inference_steps: int = 100
    batch_size: int = 1  # latents at once
    repetitions: int = 3  # of each way

    def __post_init__(self) -> None:
        """Check ranges and the type."""
        check_range("bench", self, 1, 10_000, "batch_size", "repetitions")
        check_range("bench", self, 2, 1000, "num_inference_steps")
        check_dtype(self.dtype)


@dataclass(frozen=True)
class Question:
    """What one latent of each row is drawn for."""

    condition: Tensor  # (R, Z) float32
    unconditional: Tensor  # (R, Z) float32
    noise: Noise


def plain_sample(head: DDPMHead, question: Question, num_inference_steps: int) -> Tensor:
    """Draw (R, D) latents, with the whole network at every step."""
    network, dim = head.network, question.noise.dim
    both = torch.cat([question.condition, question.unconditional])
    condition_embedding = network.condition_projection(both)  # (2R, W)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        output = _plain_network(network, torch.cat([noisy, noisy]), timesteps, condition_embedding)
        first, second = output.chunk(2)  # (R, 2D) each
        noise_pred = second[:, :dim] + GUIDANCE_SCALE * (first[:, :dim] - second[:, :dim])
        return torch.cat([noise_pred, first[:, dim:]], dim=-1)

    schedule = head.schedule(num_inference_steps, both.device)
    return ddpm(predict, question.noise.draw, schedule)


def _plain_network(
    network: AdaLNMLP, noisy: Tensor, timesteps: Tensor, condition_embedding: Tensor
) -> Tensor:
    """Map (2R, D) to (2R, 2D), reading every weight."""
    hidden = network.input_projection(noisy)  # (2R, W)
    embedding = F.silu(network.timestep_embedding(timesteps) + condition_embedding)
    for block in network.blocks:
        shift, scale, gate = block.modulation(embedding).chunk(3, dim=-1)  # type: ignore[operator]
        update = block.norm(hidden) * (1 + scale) + shift  # type: ignore[operator]
        update = block.linear_out(F.silu(block.linear_in(update)))  # type: ignore[operator]
        hidden = hidden + gate * update
    output = network.output
    shift, scale = output.modulation(embedding).chunk(2, dim=-1)
    projected: Tensor = output.projection(output.norm(hidden) * (1 + scale) + shift)
    return projected


def our_sample(head: DDPMHead, question: Question, num_inference_steps: int) -> Tensor:
    """Draw (R, D) latents by `head.sample`; conditions come in the head's type, as from a model."""
    config = SamplingConfig(num_inference_steps=num_inference_steps, guidance_scale=GUIDANCE_SCALE)
    dtype = head.network.condition_projection.bias.dtype
    condition, unconditional = question.condition.to(dtype), question.unconditional.to(dtype)
    return head.sample(condition, unconditional, config, question.noise)


def plain_bytes(network: AdaLNMLP, num_inference_steps: int) -> int:
    """Count the bytes of weights that the plain way reads: all each step but the condition's."""
    once = weight_bytes(network.condition_projection)
    return once + num_inference_steps * (weight_bytes(network) - once)


@torch.inference_mode()
def bench_head(
    preset: str, config: HeadBenchConfig, threads: int, check: Check
) -> tuple[Report, list[str]]:
    """Time both ways of sampling from a preset's head at random weights.

    Args:
        preset: name; its head is `ddpm`.
        config: what to sample.
        threads: that torch uses.
        check: called with machine and settings before anything is measured.

    Raises:
        ValueError: for an unknown preset, or one with another head.
    """
    device = default_device()
    settings = {
        "model": preset,
        "dtype": config.dtype,
        "threads": threads,
        "batch_size": config.batch_size,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": GUIDANCE_SCALE,
    }
    plain = _random_head(preset).to(device)
    check(Header(benchmark="head", settings=settings, machine=Machine.here(device)))
    ours, steps = copy.deepcopy(plain), config.num_inference_steps
    convert(ours, config.dtype)
    ways = {"plain": partial(plain_sample, plain), "ours": partial(our_sample, ours)}
    for way in ways.values():
        way(_question(plain, 0, config.batch_size, device), min(WARM_STEPS, steps))
    watch, errors = Stopwatch(device), []
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(config.repetitions):
        question, found = _question(plain, number, config.batch_size, device), {}
        for name, way in ways.items():
            started = time.process_time()
            with watch.part(name):
                found[name] = way(question, steps)
            cpu[name].append(time.process_time() - started)
        difference = found["ours"] - found["plain"]
        errors.append(float(difference.norm() / found["plain"].norm()))
    figures: dict[str, float] = {}
    reads = {
        "plain": plain_bytes(plain.network, steps),
        "ours": chain_bytes(ours.network, steps, 2 * config.batch_size),
    }
    for name, head in (("plain", plain), ("ours", ours)):
        read = reads[name]
        figures[f"{name}.ms"] = 1e3 * watch.typical(name)
        figures[f"{name}.cpu_ms"] = 1e3 * median(cpu[name])
        figures[f"{name}.read_bytes"] = read
        figures[f"{name}.read_gb_s"] = read / 1e9 / watch.typical(name)
        figures[f"{name}.weights_bytes"] = weight_bytes(head)
    figures["speedup.ratio"] = figures["plain.ms"] / figures["ours.ms"]
    figures["speedup.cpu_ratio"] = figures["plain.cpu_ms"] / figures["ours.cpu_ms"]
    figures["error.ratio"] = max(errors)
    header = Header(benchmark="head", settings=settings, machine=Machine.here(device))
    report = Report(header=header, repetitions=config.repetitions, figures=figures)
    return report, _lines(report, config)


def _random_head(preset: str) -> DDPMHead:
    """Build the head of a preset, with no layer left at zero, the same at every call."""
    run = known_preset(preset)
    audio, backbone = run.audio, run.backbone
    assert backbone is not None
    if audio.head.name != "ddpm":
        raise ValueError(
            f"preset {preset!r} has the head {audio.head.name!r}, bench head compares with a chain "
            "of the head 'ddpm'; name a preset that has it, as --preset audiomntp_base"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DDPMHead(audio.head, audio.latent_dim, backbone.hidden_size)
        fill_zeros(head)
    return head.eval()


def _question(head: DDPMHead, number: int, rows: int, device: torch.device) -> Question:
    """Make random conditions of so many rows, and their noise."""
    generator, network = seeded("benchmark head", number), head.network
    size = network.condition_projection.in_features
    condition, unconditional = torch.randn(2, rows, size, generator=generator).to(device)
    seeds, position = torch.arange(rows, device=device), torch.full((rows,), number, device=device)
    noise = Noise(seeds, position, network.input_projection.in_features)
    return Question(condition, unconditional, noise)


def _lines(report: Report, config: HeadBenchConfig) -> list[str]:
    """Say what was found."""
    figures, lines = report.figures, []
    for name, dtype in (("plain", "float32"), ("ours", config.dtype)):
        ms, cpu = figures[f"{name}.ms"], figures[f"{name}.cpu_ms"]
        lines.append(
            f"{name:<9} {ms / config.batch_size:.1f} ms a latent "
            f"({cpu / config.batch_size:.1f} ms of CPU time), {dtype}, "
            f"{figures[f'{name}.weights_bytes'] / 1e6:.1f} MB of weights; reads "
            f"{figures[f'{name}.read_bytes'] / 1e9:.2f} GB of them a chain, "
            f"{figures[f'{name}.read_gb_s']:.1f} GB/s"
        )
    lines.append(
        f"speed     {figures['speedup.ratio']:.2f} times that of the plain way "
        f"({figures['speedup.cpu_ratio']:.2f} by CPU time)"
    )
    lines.append(
        f"error     {figures['error.ratio']:.1e} of the latents' norm, at most, against the plain "
        "way in float32"
    )
    return lines
