"""Decoding a clip in passes over all its places, each pass fixing some of the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mllm_audio.audiomar.model import AudioMAR
from mllm_audio.diffusion.noise import Noise, uniform
from mllm_audio.heads.base import SamplingConfig


class DecodingConfig(Protocol):
    """What of a `GenerationConfig` matters here."""

    @property
    def decoding_order(self) -> str:
        """Key in ORDERS."""

    @property
    def decoding_steps(self) -> int:
        """Passes over a clip, at most one per latent."""

    @property
    def tokens_per_step(self) -> int:
        """Of causal models; here decoding_steps decides."""

    def sampling_at(self, position: int, num_tokens: int) -> SamplingConfig:
        """Resolve how the latent is drawn that is decoded `position`-th, from 0."""


def random_order(seeds: Tensor, num_tokens: int) -> Tensor:
    """Shuffle the places of each row by its seed: (R,) to (R, N) int64."""
    places = torch.arange(num_tokens, device=seeds.device)  # (N,)
    keys = uniform(seeds[:, None], places, -2)  # (R, N); no sampling step uses -2
    return keys.argsort(dim=1, stable=True)


def raster_order(seeds: Tensor, num_tokens: int) -> Tensor:
    """List the places of each row as they stand: (R,) to (R, N) int64."""
    return torch.arange(num_tokens, device=seeds.device).expand(len(seeds), -1)


def cosine_sizes(num_tokens: int, num_passes: int) -> list[int]:
    """Count the latents of each pass: few at first, as MAR.

    After pass i of K, floor(N cos(pi / 2 i / K)) latents are left, but at least one fewer than
    before and at least one for the last pass.
    """
    left = [num_tokens]
    for number in range(1, num_passes):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * number / num_passes))
        left.append(max(1, min(left[-1] - 1, cosine)))
    return [before - after for before, after in zip(left, [*left[1:], 0], strict=True)]


def even_sizes(num_tokens: int, num_passes: int) -> list[int]:
    """Count the latents of each pass: as many in each, up to one."""
    bounds = [num_tokens * number // num_passes for number in range(num_passes + 1)]
    return [after - before for before, after in pairwise(bounds)]


# Of the names in `GenerationConfig.decoding_order`: in which order, and how many in each pass.
ORDERS = {"random": (random_order, cosine_sizes), "causal": (raster_order, even_sizes)}


@torch.inference_mode()
def decode_order(
    model: AudioMAR,
    prompts: Sequence[Tensor],
    seeds: Sequence[int],
    config: DecodingConfig,
    num_tokens: int | None = None,
    on_pass: Callable[[int], None] | None = None,
) -> Tensor:
    """Generate one clip per prompt, some latents of every row in each pass.

    A row's latents are a function of its prompt, its seed, `config` and `num_tokens` alone. A pass
    takes the steps and the guidance of the last latent it decodes: with MAR's rising schedule that
    is 1 + (s - 1) times the share that is decoded after it (MAR counts one less in its last pass).

    Args:
        model: in evaluation mode.
        prompts: of each of the conditioner's streams (R, L_s, D_s).
        seeds: one per row.
        config: order, passes, guidance, steps.
        num_tokens: latents of each clip; None is the longest the model makes.
        on_pass: called after each pass with the number of latents it decoded in a row.

    Returns:
        (R, N, D) float32 latents as the tokenizer makes them.

    Raises:
        ValueError: if the model cannot make a clip that long, or so.
    """
    if config.tokens_per_step != 1:
        raise ValueError(
            f"tokens_per_step is {config.tokens_per_step}, but AudioMAR draws as many latents in a "
            "pass as decoding_steps leaves for it; leave tokens_per_step at 1"
        )
    longest = model.audio.config.max_tokens
    num_tokens = longest if num_tokens is None else num_tokens
    if not 0 < num_tokens <= longest:
        raise ValueError(f"asked for {num_tokens} latents, this model makes 1 to {longest}")
    order_of, sizes_of = ORDERS[config.decoding_order]
    row_seeds = torch.tensor(seeds, dtype=torch.long, device=model.device)  # (R,)
    cond, uncond = _branches(model, [prompt.to(model.device) for prompt in prompts])
    latents = cond.new_zeros(len(seeds), num_tokens, model.audio.config.latent_dim).float()
    is_known = torch.zeros(latents.shape[:2], dtype=torch.bool, device=model.device)  # (R, N)
    order, done = order_of(row_seeds, num_tokens), 0
    rows = torch.arange(len(order), device=model.device)[:, None]  # (R, 1)
    for size in sizes_of(num_tokens, min(config.decoding_steps, num_tokens)):
        places = order[:, done : done + size]  # (R, k)
        done += size
        sampling = config.sampling_at(done - 1, num_tokens)
        embeds = (
            cond if sampling.guidance_scale == 1 else torch.cat([cond, uncond])
        )  # (R or 2R, L, H)
        states = _states(model, embeds, latents, is_known, places)  # (R k or 2R k, H)
        first, *second = states.split(places.numel())
        noise = Noise(row_seeds.repeat_interleave(size), places.flatten(), latents.shape[2])
        drawn = model.audio.sample(first, second[0] if second else None, sampling, noise)
        latents[rows, places] = drawn.view(*places.shape, -1)
        is_known[rows, places] = True
        if on_pass is not None:
            on_pass(size)
    return latents


def _branches(model: AudioMAR, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embed the prompts, and the null prompt in their place, (R, L, H) each."""
    shape = (len(prompts[0]), model.audio.config.prompt_length)
    is_null = torch.zeros(shape, dtype=torch.bool, device=model.device)
    return model.embed_prompts(prompts, is_null), model.embed_prompts(prompts, ~is_null)


def _states(
    model: AudioMAR, prompts: Tensor, latents: Tensor, is_known: Tensor, places: Tensor
) -> Tensor:
    """Run both branches in one batch; return the states at (R, k) places, with their positions.

    Args:
        model: in evaluation mode.
        prompts: (R, L, H), or (2R, L, H) with the unconditional branch below.
        latents: (R, N, D).
        is_known: (R, N) bool, which of them are decoded, as many in each row.
        places: (R, k) int64.

    Returns:
        (R k, H), or (2R k, H).
    """
    copies = len(prompts) // len(latents)
    known = latents[is_known].repeat(copies, 1)  # (M, D)
    states = model.hidden_states(prompts, known, is_known.repeat(copies, 1))  # (R', N, H)
    index = places.repeat(copies, 1)  # (R', k)
    rows = torch.arange(len(index), device=index.device)[:, None]  # (R', 1)
    return states[rows, index].flatten(0, 1).float() + model.audio.embed_targets(index.flatten())
