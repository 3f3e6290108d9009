"""The autoregressive iterator: prompts in, one latent per row and step out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from mllm_audio.config import check_range
from mllm_audio.data.layout import Prompt
from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.graph import GraphedStep
from mllm_audio.generation.parallel import asked_targets
from mllm_audio.generation.prompt_batch import prompt_batch, prompt_length
from mllm_audio.generation.rows import Rows
from mllm_audio.heads.base import SamplingConfig, check_eta
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds

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
    # latents drawn at once, independently of each other: 4 are one column of our tokenizers. For
    # models that were trained with `masking.max_distance` as large
    tokens_per_step: int = 1
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
        check_range("generation", self, 1, 10_000, "decoding_steps", "tokens_per_step")
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

    def sampling_over(self, asked: range, scales: Tensor) -> SamplingConfig:
        """Resolve how the latents at `asked` positions are drawn at once: with the steps of the
        first of them, each with a scale of its own, of the (N, 1) of all.
        """
        num_tokens = len(scales)
        sampling = self.sampling_at(asked.start, num_tokens)
        if {self.scale_at(index, num_tokens) for index in asked} == {sampling.guidance_scale}:
            return sampling
        return replace(sampling, guidance_scale=scales[asked.start : asked.stop])

    def scales(self, num_tokens: int, device: torch.device) -> Tensor:
        """Tabulate `scale_at` of all latents, (N, 1)."""
        scales = [self.scale_at(position, num_tokens) for position in range(num_tokens)]
        return torch.tensor(scales, device=device)[:, None]

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
        ValueError: if the model cannot make a clip that long, or so guided.
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
    if audio.guidance_distilled and config.is_guided(longest):
        raise ValueError(
            f"found a guidance scale of {config.scale_at(0, longest):g}, but guidance is distilled "
            "into the head of this model, which has no other branch; use guidance_scale=1 and no "
            "guidance_weight, as the folder's defaults do"
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
    longest = max(map(prompt_length, prompts))
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
    batch, mask = prompt_batch(prompts, special, guided, model.audio.config.latent_dim)
    batch, mask = batch.to(model.device), mask.to(model.device)
    asked = asked_targets(0, config.tokens_per_step, longest)
    rows = Rows.begin(model, special, guided, model.embed(batch), batch.position_ids, mask, asked)
    # What follows the last latent is not asked for, so the step that feeds it is not taken.
    yield from islice(audio_span(rows, seeds, config, longest), longest)


def audio_span(
    rows: Rows, seeds: Sequence[int], config: GenerationConfig, longest: int, first: int = 0
) -> Iterator[DecodeStep]:
    """Decode the latents of one span in every row, `tokens_per_step` at a time.

    Each is fed before what follows is asked for; what is left over when it ends, too. Nothing is
    read back from the device but at columns where the span may end.

    Args:
        rows: fed up to `<|audio_start|>`, or up to the latent before `first`; the element fed last
            is asked for the targets of the first step, `asked_targets(first, ...)`.
        seeds: one per row, of the noise.
        config: durations, guidance, steps.
        longest: latents after which the span ends in any case.
        first: content position to begin at, whole columns.

    Yields:
        A `DecodeStep` per latent, until every row has ended.

    Raises:
        ValueError: if the model cannot be asked for several latents at once.
    """
    audio = rows.model.audio
    fewest, _ = token_limits(audio.config, config)
    if config.tokens_per_step > 1 and audio.target_positions is None:
        raise ValueError(
            f"tokens_per_step is {config.tokens_per_step}, but the model is not told which latent "
            "to predict (audio.target_positions=false); set it to 1"
        )
    row_seeds = torch.tensor(seeds, dtype=torch.long, device=rows.hidden.device)  # (R,)
    scales = config.scales(longest, rows.hidden.device)  # of all latents, copied there once
    active = torch.ones(len(seeds), dtype=torch.bool, device=rows.hidden.device)
    samplings = [config.sampling_at(index, longest) for index in range(first, longest)]
    asked = asked_targets(first, config.tokens_per_step, longest)
    graphed = GraphedStep.begin(rows, row_seeds, samplings, scales, asked)
    try:
        while first < longest:
            asked = asked_targets(first, config.tokens_per_step, longest)
            following = asked_targets(asked.stop, config.tokens_per_step, longest)
            # In models without an end, the last latent of a span predicts nothing.
            if asked.stop == longest and not audio.config.end_of_audio:
                following = range(0)
            alive = []  # (R,) of each latent that some row goes on to
            for number, index in enumerate(asked):
                if index >= fewest and index % audio.config.tokens_per_column == 0:
                    noise = Noise(
                        row_seeds, torch.full_like(row_seeds, index), audio.config.latent_dim
                    )
                    cond = rows.states[0][:, number]
                    active = active & ~audio.ends(cond, noise, config.end_threshold)
                    if not bool(active.any()):
                        break
                alive.append(active)
            if not alive:
                break
            drawn = asked[: len(alive)]
            whole = len(drawn) == len(asked) == len(following) == config.tokens_per_step
            if graphed is not None and not whole:
                graphed.end()
                graphed = None
            sampling = config.sampling_over(drawn, scales)
            # (R, k, D); a graph has fed them already
            latents = graphed.take() if graphed else rows.draw(row_seeds, sampling, drawn)
            for number, is_active in enumerate(alive):
                yield DecodeStep(latents[:, number], is_active)
            if len(drawn) < len(asked):
                rows.feed_latents(latents, first, range(drawn.stop, drawn.stop + 1))
                break
            if graphed is None:
                rows.feed_latents(latents, first, following)
            first = asked.stop
    finally:  # also where the caller stops half-way
        if graphed is not None:
            graphed.end()
