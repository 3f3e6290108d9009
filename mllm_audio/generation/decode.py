"""The autoregressive iterator: prompts in, one latent per row and step out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from mllm_audio.config import check_range
from mllm_audio.data.layout import Prompt, stacked
from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.rows import Rows, text_batch
from mllm_audio.heads.base import SamplingConfig, check_eta
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch

GUIDANCE_SCHEDULES = ("constant", "linear", "annealed")
DECODING_ORDERS = ("random", "causal")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How clips are generated.

    Guidance has two conventions in the field. `guidance_scale` is MAR's s in
    uncond + s (cond - uncond), where 1 is no guidance; `guidance_weight` is the paper's w (eq. 4)
    in cond + w (cond - uncond), where 0 is no guidance: s = 1 + w. The `annealed` schedule is the
    paper's eq. 5: from the given value at the first latent to 1 at the last. We default to s,
    because there the schedule's end value of 1 means what it says: no guidance. The `linear`
    schedule is MAR's: it rises from no guidance to the given value with the share that is decoded.
    """

    num_inference_steps: int = 100  # head calls per latent (midpoint, heun: two a step)
    # the same at the last latent of a span, and evenly in between: later latents need fewer
    # (DiSA, Zhao et al. 2025, arXiv:2505.20297); None = num_inference_steps
    final_inference_steps: int | None = None
    sampler: str | None = None  # key in SAMPLERS; None = the head's own
    eta: float = 0.0  # of sampler ddim: share of ddpm's noise that a step adds
    guidance_scale: float = 7.0  # MAR's s
    guidance_weight: float | None = None  # the paper's w; takes the place of guidance_scale
    guidance_schedule: str = "annealed"  # in GUIDANCE_SCHEDULES
    # scales the standard deviation of the sampling noise: where the chain starts and what it adds;
    # of ddpm only what it adds
    temperature: float = 1.0
    seconds: float | None = None  # exact duration; None lets the end-of-audio output decide
    min_seconds: float = 0.16  # never end before
    max_seconds: float | None = None  # always end by; None = the model's longest clip
    end_threshold: float | None = None  # end where its probability exceeds this; None samples it
    as_request: bool = False  # `generate` puts captions through the chat template, as a user's
    decoding_order: str = "random"  # of AudioMAR, in DECODING_ORDERS
    decoding_steps: int = 64  # of AudioMAR: passes over a clip, at most one per latent

    def __post_init__(self) -> None:
        """Check ranges and names."""
        if self.guidance_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(
                f"unknown guidance schedule {self.guidance_schedule!r}, "
                f"expected one of {', '.join(GUIDANCE_SCHEDULES)}"
            )
        if self.decoding_order not in DECODING_ORDERS:
            raise ValueError(
                f"unknown decoding order {self.decoding_order!r}, "
                f"expected one of {', '.join(DECODING_ORDERS)}"
            )
        check_range("generation", self, 1, 10_000, "num_inference_steps", "final_inference_steps")
        check_range("generation", self, 1, 10_000, "decoding_steps")
        check_eta(self.eta, self.sampler)
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
        if self.guidance_schedule == "annealed" and num_tokens > 1:
            first += (1.0 - first) * position / (num_tokens - 1)
        if self.guidance_schedule == "linear":
            share = (position + 1) / num_tokens
            return 1.0 + (extra + first - 1.0) * share
        return extra + first

    def steps_at(self, position: int, num_tokens: int) -> int:
        """Return the sampling steps for the latent at `position` of `num_tokens`."""
        if self.final_inference_steps is None or num_tokens < 2:
            return self.num_inference_steps
        change = self.final_inference_steps - self.num_inference_steps
        return self.num_inference_steps + round(change * position / (num_tokens - 1))

    def sampling_at(self, position: int, num_tokens: int) -> SamplingConfig:
        """Resolve how the latent at `position` of `num_tokens` is drawn."""
        return SamplingConfig(
            sampler=self.sampler,
            num_inference_steps=self.steps_at(position, num_tokens),
            guidance_scale=self.scale_at(position, num_tokens),
            temperature=self.temperature,
            eta=self.eta,
        )

    def is_guided(self, num_tokens: int) -> bool:
        """Tell whether a span of `num_tokens` needs the unconditional branch."""
        return any(self.scale_at(position, num_tokens) != 1 for position in (0, num_tokens - 1))


@dataclass(frozen=True)
class DecodeStep:
    """One decoded position of every row."""

    latents: Tensor  # (R, D) float32, as the tokenizer makes them
    active: Tensor  # (R,) bool, false for rows whose clip has ended


def token_limits(audio: AudioConfig, config: GenerationConfig) -> tuple[int, int]:
    """Turn the duration settings into (fewest, most) latents, whole columns.

    Raises:
        ValueError: if the model cannot make a clip that long.
    """

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


def check_prompts(
    model: AudioLanguageModel, prompts: Sequence[Tensor | Prompt], num_tokens: int
) -> None:
    """Refuse a prompt that leaves no room for `num_tokens` latents among the positions.

    Raises:
        ValueError: with the length found and the room there is.
    """
    room = model.backbone.config.max_position_embeddings - num_tokens - 1
    longest = max(map(_length, prompts))
    if longest > room:
        raise ValueError(
            f"a caption has {longest} text tokens, the model has room for {room} beside "
            f"{num_tokens} latents in max_position_embeddings="
            f"{model.backbone.config.max_position_embeddings}; shorten it (unknown words are "
            "spelled in bytes), or lower --seconds"
        )


@torch.inference_mode()
def decode(
    model: AudioLanguageModel,
    prompts: Sequence[Tensor | Prompt],
    special: SpecialIds,
    seeds: Sequence[int],
    config: GenerationConfig,
) -> Iterator[DecodeStep]:
    """Generate one span of audio per prompt, a latent of every row at a time.

    A row's latents are a function of its prompt, its seed and `config` alone: not of the other
    rows, nor of how often it was restarted.

    Args:
        model: in evaluation mode.
        prompts: R tensors of text ids, each (L,), or embedded captions.
        special: ids of the audio tokens.
        seeds: one per prompt.
        config: durations, guidance, steps.

    Yields:
        A `DecodeStep` per latent, until every row has ended.
    """
    _, longest = token_limits(model.audio.config, config)
    check_prompts(model, prompts, longest)
    guided = config.is_guided(longest)
    batch, mask = _prompt_batch(prompts, special, guided, model.audio.config.latent_dim)
    batch, mask = batch.to(model.device), mask.to(model.device)
    rows = Rows.begin(model, special, guided, model.embed(batch), batch.position_ids, mask)
    # What follows the last latent is not asked for, so the step that feeds it is not taken.
    yield from islice(audio_span(rows, seeds, config, longest), longest)


def audio_span(
    rows: Rows, seeds: Sequence[int], config: GenerationConfig, longest: int, first: int = 0
) -> Iterator[DecodeStep]:
    """Decode the latents of one span in every row; each is fed before the next one is asked for.

    Args:
        rows: fed up to `<|audio_start|>`, or up to the latent before `first`.
        seeds: one per row, of the noise.
        config: durations, guidance, steps.
        longest: latents after which the span ends in any case.
        first: content position to begin at, whole columns.

    Yields:
        A `DecodeStep` per latent, until every row has ended.
    """
    audio = rows.model.audio
    fewest, _ = token_limits(audio.config, config)
    row_seeds = torch.tensor(seeds, dtype=torch.long, device=rows.hidden.device)  # (R,)
    active = torch.ones(len(seeds), dtype=torch.bool, device=rows.hidden.device)
    for index in range(first, longest):
        noise = Noise(row_seeds, torch.full_like(row_seeds, index), audio.config.latent_dim)
        cond, uncond = rows.states
        if index >= fewest and index % audio.config.tokens_per_column == 0:
            active = active & ~audio.ends(cond, noise, config.end_threshold)
            if not bool(active.any()):
                return
        latents = audio.sample(cond, uncond, config.sampling_at(index, longest), noise)  # (R, D)
        yield DecodeStep(latents, active)
        # In models without an end, the last latent of a span predicts nothing.
        rows.feed_latents(latents, index, audio.config.end_of_audio or index + 1 < longest)


def _length(prompt: Tensor | Prompt) -> int:
    """Count the elements of a prompt."""
    return sum(map(len, prompt.embeddings)) if isinstance(prompt, Prompt) else len(prompt)


def _prompt_batch(
    prompts: Sequence[Tensor | Prompt], special: SpecialIds, guided: bool, latent_dim: int
) -> tuple[Batch, Tensor]:
    """Lay prompts and `<|audio_start|>` out, padded on the left, unconditional twins below.

    Left padding puts every row's next element in the same cache slot; position ids and the
    attention mask hide it from the model.
    """
    rows, longest = len(prompts), max(map(_length, prompts)) + 1
    input_ids = torch.full((rows, longest), special.audio_start)
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        begin = longest - 1 - _length(prompt)
        input_ids[row, begin:-1] = special.cond if isinstance(prompt, Prompt) else prompt
        mask[row, begin:] = True
    is_null = mask.repeat(2, 1)  # (2R, T)
    is_null[:, -1] = False
    is_null[:rows] = False
    predicts = torch.zeros_like(mask)
    predicts[:, -1] = True
    copies = 2 if guided else 1

    def both(value: Tensor) -> Tensor:
        return value.repeat(copies, *[1] * (value.dim() - 1))

    batch = text_batch(
        both(input_ids),
        both((mask.long().cumsum(dim=1) - 1).clamp_min(0)),
        is_null[: copies * rows],
        both(predicts),
        latent_dim,
    )
    embedded = stacked([prompt for prompt in prompts if isinstance(prompt, Prompt)])
    if embedded:
        is_prompt = both(input_ids == special.cond)
        batch = replace(batch, is_prompt=is_prompt, prompts=tuple(map(both, embedded)))
    return batch, both(mask)
