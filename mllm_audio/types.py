"""The shape legend, and the frozen values that cross packages.

Shape legend, used in every docstring and trailing comment:

    B  rows of a batch                 H  hidden width of the language model
    T  positions of a row              D  channels of one latent (128)
    S  waveform samples                Z  width of the head's condition (= H)
    F  spectrogram frames              N  latents (audio tokens) of one clip
    C  time columns of a clip          M  audio tokens in the whole batch
    R  rows being decoded              P  sequence elements that predict a latent or the end
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """How much a batch, or an optimizer step over all processes, holds."""

    rows: int = 0
    elements: int = 0  # text ids and audio tokens that enter the backbone, without padding
    latents: int = 0  # predicted
    targets: int = 0  # predicted latents and ends
    words: int = 0  # learned text ids

    def __add__(self, other: StepCounts) -> StepCounts:
        """Count two batches together."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return StepCounts(**sums)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """An interleaved batch: text ids beside continuous latents.

    Each audio token carries two integers: the *content position* of the latent it holds and the
    *target position* it must predict. The model does not know why those were chosen: next-token
    prediction, masked next-token prediction and generation differ only in these two.
    """

    input_ids: Tensor  # (B, T) int64, `<|audio|>` marks the place of a latent
    position_ids: Tensor  # (B, T) int64, keep the gaps of dropped tokens
    is_null: Tensor  # (B, T) bool, text and prompt embeddings that the null prompt replaces
    is_audio: Tensor  # (B, T) bool, elements that hold a latent; M are true
    predicts: Tensor  # (B, T) bool, elements that predict a latent or the end; P are true
    text_labels: Tensor  # (B, T) int64, the text id to say next, -100 where none is learned
    segment_ids: (
        Tensor | None
    )  # (B, T) int64, from 1 along a packed row, 0 is padding; None: padded
    latents: Tensor  # (M, D) float, in row-major order of `is_audio`
    content_positions: Tensor  # (M,) int64
    target_positions: Tensor  # (P,) int64, in row-major order of `predicts`
    target_latents: Tensor  # (P, D) float, zeros where `target_is_end`
    target_is_end: Tensor  # (P,) bool, the target is `<|audio_end|>`
    end_weight: Tensor  # (P,) float, importance weight of "is the target the end?" under masking
    masking_ratio: float  # share of latents dropped from each row
    names: tuple[str, ...]  # one per row, before packing: where it came from
    num_elements: int  # of all rows, without padding
    is_prompt: Tensor | None = (
        None  # (B, T) bool, elements that hold a prompt embedding; None: none
    )
    # Elements at the position of the one before them are copies, which nothing but they see.
    has_copies: bool = False
    # Of each of the conditioner's streams (B', L, D_s), B' rows before packing; a row's elements
    # hold those of all streams behind one another. Empty where captions are text ids.
    prompts: tuple[Tensor, ...] = ()

    @property
    def counts(self) -> StepCounts:
        """Count what the batch holds."""
        ends = int(self.target_is_end.sum())
        return StepCounts(
            rows=len(self.names),
            elements=self.num_elements,
            latents=len(self.target_is_end) - ends,
            targets=len(self.target_is_end),
            words=int((self.text_labels >= 0).sum()),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Move every tensor to `device`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        prompts = tuple(prompt.to(device) for prompt in self.prompts)
        return Batch(**{**values, **moved, "prompts": prompts})


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What one training step reports. Scalars unless a shape is given."""

    total: Tensor  # what is differentiated
    text: Tensor  # mean cross-entropy over learned text ids, 0 without any
    audio: Tensor  # mean head loss over predicted latents
    end: Tensor  # weighted end-of-audio cross-entropy, 0 without that output
    per_latent: Tensor  # head loss of each predicted latent, ends left out; detached


@dataclass(frozen=True)
class Clip:
    """One piece of sound."""

    waveform: Tensor  # (S,) float32, mono, nominally in [-1, 1]
    sample_rate: int  # Hz


@dataclass(frozen=True)
class TextDelta:
    """The next characters of a reply."""

    text: str


@dataclass(frozen=True)
class AudioChunk:
    """The next piece of a span of audio, or all of it where nothing is streamed."""

    waveform: Tensor  # (S,) float32, mono, nominally in [-1, 1]
    sample_rate: int  # Hz
    span: int  # number of the span in the reply, from 0
    # (N, D) that came since the last piece, as the tokenizer makes them; while a span goes on they
    # are ahead of its samples by the decoder's look-ahead
    latents: Tensor
    last: bool = True  # nothing more of the span follows
