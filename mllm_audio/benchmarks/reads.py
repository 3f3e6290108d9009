"""Bytes that decoding must read, and the time that reading alone would take: its floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm_audio.backbone import blocks
from mllm_audio.diffusion.samplers import SAMPLERS
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.hardware import find_gpu
from mllm_audio.heads.adaln_mlp import MODULATED_ROWS, AdaLNMLP
from mllm_audio.model import AudioLanguageModel


def weight_bytes(module: nn.Module) -> int:
    """Add up what the weights of a module take; int8 ones are buffers."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def chain_bytes(network: AdaLNMLP, calls: int, rows: int) -> int:
    """Count the bytes of weights that one chain of a head reads.

    Modulations are read once for every `MODULATED_ROWS`, the embeddings of timesteps and condition
    once, and the rest at every call.

    Args:
        network: whose weights.
        calls: of the network.
        rows: R', of both branches together.
    """
    layers = [*network.blocks, network.output]
    modulations = sum(weight_bytes(layer.modulation) for layer in layers)
    once = weight_bytes(network.condition_projection) + weight_bytes(network.timestep_embedding)
    chunks = math.ceil(calls / max(1, MODULATED_ROWS // rows))
    return once + chunks * modulations + calls * (weight_bytes(network) - once - modulations)


def cache_bytes(model: AudioLanguageModel, elements: float, rows: int) -> float:
    """Count the bytes of keys and values of (R',) rows of so many elements."""
    config = model.backbone.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * heads * width
    return values * model.backbone.dtype.itemsize * elements * rows


@dataclass(frozen=True)
class Reads:
    """What decoding one batch of clips reads, on average."""

    step: float  # bytes of a step of the backbone: its blocks and the cache
    chain: float  # bytes of a chain of the head

    @classmethod
    def of(
        cls, model: AudioLanguageModel, config: GenerationConfig, rows: int, num_tokens: int
    ) -> Reads:
        """Count what decoding `rows` clips of `num_tokens` latents reads."""
        branches = 2 if config.is_guided(num_tokens) else 1
        calls = sum(config.steps_at(index, num_tokens) for index in range(num_tokens)) / num_tokens
        if config.sampler is not None:
            calls *= SAMPLERS[config.sampler].calls_per_step
        head: Any = model.audio.head
        network: AdaLNMLP = head.network
        cache = cache_bytes(model, num_tokens / 2, branches * rows)  # half of it, on average
        return cls(
            step=weight_bytes(blocks(model.backbone)) + cache,
            chain=chain_bytes(network, round(calls), branches * rows * config.tokens_per_step),
        )

    def figures(self, parts: dict[str, float], device: torch.device) -> dict[str, float]:
        """Set it against the time of the parts, and that of a known GPU's data sheet."""
        read = {"backbone": self.step, "head": self.chain}
        figures = {f"{name}.read_bytes": size for name, size in read.items()}
        for name, size in read.items():
            figures[f"{name}.read_gb_s"] = size / 1e6 / parts[f"{name}.ms"]
        gpu = None if device.type != "cuda" else find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None:
            everything = sum(size * parts[f"{name}.calls"] for name, size in read.items())
            figures["floor.seconds"] = everything / 1e9 / gpu.memory_gb_s
            figures["floor.ratio"] = parts["span.seconds"] / figures["floor.seconds"]
        return figures


def read_lines(figures: dict[str, float]) -> list[str]:
    """Say what was read."""
    said = [
        f"{name} {figures[f'{name}.read_bytes'] / 1e6:.0f} MB a call, "
        f"{figures[f'{name}.read_gb_s']:.1f} GB/s"
        for name in ("backbone", "head")
    ]
    lines = [f"reads     {'; '.join(said)}"]
    if "floor.seconds" in figures:
        lines.append(
            f"floor     {figures['floor.seconds']:.4f} s to read that at the memory bandwidth of "
            f"the GPU's data sheet; the model takes {figures['floor.ratio']:.1f} times as long"
        )
    return lines
