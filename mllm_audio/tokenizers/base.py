"""The protocol every audio tokenizer follows: waveform <-> latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mllm_audio.config import check_range


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How sound is decoded while its latents arrive; None is what the tokenizer recommends."""

    chunk_columns: int | None = None  # that samples are handed out by, but for the last
    look_ahead: int | None = None  # columns that must have come behind those handed out

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("stream", self, 1, 10_000, "chunk_columns")
        check_range("stream", self, 0, 10_000, "look_ahead")


AS_RECOMMENDED = StreamConfig()


class ColumnDecoder(Protocol):
    """Decode a clip, or a batch of clips of one length, whose columns arrive in time.

    The samples that come out do not depend on how columns are portioned, and are as many as
    `AudioTokenizer.decode` gives. What is kept does not grow with the clip.
    """

    def push(self, latents: Tensor) -> Tensor:
        """Take (B, N, D) latents of whole columns; return the (B, S) samples they settle."""

    def finish(self) -> Tensor:
        """Return the (B, S) samples that are left; at least one column must have been pushed."""


class AudioTokenizer(Protocol):
    """Turn waveforms into a sequence of continuous latents, and back.

    Latents come in time columns of `tokens_per_column`, low frequencies first, so a clip of N
    latents lasts N / tokens_per_column columns of `samples_per_column` samples each.
    """

    name: str  # the key in `TOKENIZERS`
    weights_license: str  # SPDX id of the licence of its weights; "" where it has none
    sample_rate: int  # Hz
    hop_length: int  # samples per spectrogram frame
    latent_dim: int  # D
    tokens_per_column: int  # latents that share one time column
    samples_per_column: int  # samples of one time column

    @property
    def fingerprint(self) -> str:
        """Short hash of everything that changes latents: settings and weights."""

    def encode(self, waveforms: Tensor) -> Tensor:
        """Encode (B, S) float32 waveforms to (B, N, D) float32 latents.

        S is zero-padded to a whole number of columns. The level is taken as it is: `prepare`
        normalises with `wav.normalize_level` beforehand.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, N, D) latents to (B, N / tokens_per_column * samples_per_column) samples.

        Raises:
            ValueError: if N is not a whole number of columns.
        """

    def decode_in(self, dtype: torch.dtype) -> None:
        """Hold the weights that decode in `dtype`; samples stay float32, encoding does too."""

    def stream(self, config: StreamConfig = AS_RECOMMENDED) -> ColumnDecoder:
        """Begin to decode latents that arrive in time."""


def num_columns(tokenizer: AudioTokenizer, num_samples: int) -> int:
    """Count the columns that `num_samples` samples fill, the last one padded; at least one."""
    return max(1, math.ceil(num_samples / tokenizer.samples_per_column))
