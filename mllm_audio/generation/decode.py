"""The autoregressive iterator: prompts in, one latent per row and step out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from mllm_audio.config import check_range
from mllm_audio.diffusion.noise import Noise
from mllm_audio.heads.base import SamplingConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch

GUIDANCE_SCHEDULES = ("constant", "linear")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How clips are generated.

    Guidance has two conventions in the field. `guidance_scale` is MAR's s in
    uncond + s (cond - uncond), where 1 is no guidance; `guidance_weight` is the paper's w (eq. 4)
    in cond + w (cond - uncond), where 0 is no guidance: s = 1 + w. The `linear` schedule is the
    paper's eq. 5: from the given value at the first latent to 1 at the last. We default to s,
    because there the schedule's end value of 1 means what it says: no guidance.
    """

    num_inference_steps: int = 100  # head calls per latent (midpoint: two a step)
    sampler: str | None = None  # key in SAMPLERS; None = the head's own
    guidance_scale: float = 7.0  # MAR's s
    guidance_weight: float | None = None  # the paper's w; takes the place of guidance_scale
    guidance_schedule: str = "linear"  # constant, or linear to 1 over the clip
    temperature: float = 1.0  # scales the standard deviation of the sampling noise
    seconds: float | None = None  # exact duration; None lets the end-of-audio output decide
    min_seconds: float = 0.16  # never end before
    max_seconds: float | None = None  # always end by; None = the model's longest clip
    end_threshold: float | None = None  # end where its probability exceeds this; None samples it

    def __post_init__(self) -> None:
        """Check ranges and names."""
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"unknown guidance schedule {self.guidance_schedule!r}, "
                f"expected one of {', '.join(GUIDANCE_SCHEDULES)}"
            )
        check_range("generation", self, 1, 10_000, "num_inference_steps")
        check_range("generation", self, 0, 10, "temperature")
        check_range("generation", self, -1000, 1000, "guidance_scale", "guidance_weight")
        check_range("generation", self, 0, 86_400, "seconds", "max_seconds", open_low=True)
        check_range("generation", self, 0, 86_400, "min_seconds")
        check_range("generation", self, 0, 1, "end_threshold")

    def scale_at(self, position: int, num_tokens: int) -> float:
        """Return MAR's s for the latent at `position` of `num_tokens`."""
        extra, first = (0.0, self.guidance_scale)
        if self.guidance_weight is not None:
            extra, first = 1.0, self.guidance_weight
        if self.guidance_schedule == "linear" and num_tokens > 1:
            first += (1.0 - first) * position / (num_tokens - 1)
        return extra + first


@dataclass(frozen=True)
class DecodeStep:
    """One decoded position of every row."""

    latents: Tensor  # (R, D) float32, as the tokenizer makes them
    active: Tensor  # (R,) bool, false for rows whose clip has ended


def token_limits(model: AudioLanguageModel, config: GenerationConfig) -> tuple[int, int]:
    """Turn the duration settings into (fewest, most) latents, whole columns.

    Raises:
        ValueError: if the model cannot make a clip that long.
    """
    audio = model.audio.config

    def tokens(seconds: float) -> int:
        columns = max(1, math.ceil(seconds / audio.column_seconds - 1e-6))
        return columns * audio.tokens_per_column

    longest = tokens(config.seconds or config.max_seconds or audio.max_seconds)
    if longest > audio.max_tokens:
        raise ValueError(
            f"asked for {config.seconds or config.max_seconds} s, this model makes at most "
            f"{audio.max_seconds:g} s; lower --seconds, or train with a larger audio.max_tokens"
        )
    fewest = longest if config.seconds else min(tokens(config.min_seconds), longest)
    return fewest, longest


def check_prompts(model: AudioLanguageModel, prompts: Sequence[Tensor], num_tokens: int) -> None:
    """Refuse a prompt that leaves no room for `num_tokens` latents among the positions.

    Raises:
        ValueError: with the length found and the room there is.
    """
    room = model.backbone.config.max_position_embeddings - num_tokens - 1
    longest = max(len(prompt) for prompt in prompts)
    if longest > room:
        raise ValueError(
            f"a caption has {longest} text tokens, the model has room for {room} beside "
            f"{num_tokens} latents; shorten it (unknown words are spelled in bytes), or lower "
            "--seconds"
        )


@torch.inference_mode()
def decode(
    model: AudioLanguageModel,
    prompts: Sequence[Tensor],
    special: SpecialIds,
    seeds: Sequence[int],
    config: GenerationConfig,
) -> Iterator[DecodeStep]:
    """Generate one span of audio per prompt, a latent of every row at a time.

    A row's latents are a function of its prompt, its seed and `config` alone: not of the other
    rows, nor of how often it was restarted.

    Args:
        model: in evaluation mode.
        prompts: R tensors of text ids, each (L,).
        special: ids of the audio tokens.
        seeds: one per prompt.
        config: durations, guidance, steps.

    Yields:
        A `DecodeStep` per latent, until every row has ended.
    """
    audio, device = model.audio, model.device
    fewest, longest = token_limits(model, config)
    check_prompts(model, prompts, longest)
    guided = config.scale_at(0, longest) != 1 or config.scale_at(longest - 1, longest) != 1
    batch, mask = _prompt_batch(prompts, special, guided, device, audio.config.latent_dim)
    positions = batch.position_ids[:, -1:]  # (R', 1) of `<|audio_start|>`; R' = 2R with guidance
    cache = DynamicCache(config=model.backbone.config)
    hidden = model.step(model.embed(batch), batch.position_ids, mask, cache)  # (R', H)
    rows = len(prompts)
    row_seeds = torch.tensor(seeds, dtype=torch.long, device=device)  # (R,)
    active = torch.ones(rows, dtype=torch.bool, device=device)
    for index in range(longest):
        noise = Noise(row_seeds, torch.full_like(row_seeds, index), audio.config.latent_dim)
        if index >= fewest and index % audio.config.tokens_per_column == 0:
            active = active & ~audio.ends(hidden[:rows], noise, config.end_threshold)
            if not bool(active.any()):
                return
        sampling = SamplingConfig(
            sampler=config.sampler,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.scale_at(index, longest),
            temperature=config.temperature,
        )
        uncond = hidden[rows:] if guided else None
        latents = audio.sample(hidden[:rows], uncond, sampling, noise)  # (R, D)
        yield DecodeStep(latents, active)
        if index + 1 == longest:
            return
        embeds = _next_embeds(model, latents, index)  # (R, 1, H)
        embeds = embeds.repeat(len(hidden) // rows, 1, 1)  # (R', 1, H), the same in both branches
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = model.step(embeds, positions + 1 + index, mask, cache)


def _next_embeds(model: AudioLanguageModel, latents: Tensor, index: int) -> Tensor:
    """Embed (R, D) latents at content position `index`, predicting the next; return (R, 1, H)."""
    position = torch.full((len(latents),), index, device=latents.device)
    embeds = model.audio.embed(latents, position) + model.audio.embed_targets(position + 1)
    return embeds[:, None].to(model.backbone.dtype)


def _prompt_batch(
    prompts: Sequence[Tensor],
    special: SpecialIds,
    guided: bool,
    device: torch.device,
    latent_dim: int,
) -> tuple[Batch, Tensor]:
    """Lay prompts and `<|audio_start|>` out, padded on the left, unconditional twins below.

    Left padding puts every row's next element in the same cache slot; position ids and the
    attention mask hide it from the model.
    """
    rows, longest = len(prompts), max(len(prompt) for prompt in prompts) + 1
    input_ids = torch.full((rows, longest), special.audio_start)
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - 1 - len(prompt) : -1] = prompt
        mask[row, longest - 1 - len(prompt) :] = True
    is_prompt = mask.clone()
    is_prompt[:, -1] = False
    predicts = torch.zeros_like(mask)
    predicts[:, -1] = True
    copies = 2 if guided else 1

    def both(value: Tensor) -> Tensor:
        return value.repeat(copies, *[1] * (value.dim() - 1)).to(device)

    batch = Batch(
        input_ids=both(input_ids),
        position_ids=both((mask.long().cumsum(dim=1) - 1).clamp_min(0)),
        is_prompt=both(is_prompt),
        is_audio=both(torch.zeros_like(mask)),
        predicts=both(predicts),
        latents=torch.zeros(0, latent_dim, device=device),
        content_positions=torch.zeros(0, dtype=torch.long, device=device),
        target_positions=torch.zeros(copies * rows, dtype=torch.long, device=device),
        target_latents=torch.zeros(0, latent_dim, device=device),
        target_is_end=torch.zeros(copies * rows, dtype=torch.bool, device=device),
        end_weight=torch.ones(copies * rows, device=device),
        unconditional=torch.arange(copies * rows, device=device) >= rows,
        masking_ratio=0.0,
        names=(),
    )
    return batch, both(mask)
