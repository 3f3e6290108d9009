"""Turn latents into sound as they arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_audio.tokenizers import AudioTokenizer


class StreamingDecoder:
    """Decode one span of audio whose latents arrive in any portions.

    How they are portioned changes no sample. The samples are as many as those of `decode`, and the
    same ones where the tokenizer's `stream` says so. It keeps no more than a few columns, however
    long the span. It has no thread of its own, and one thread may use it at a time.
    """

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        """Begin a span."""
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._waiting = torch.zeros(0, tokenizer.latent_dim)  # (M, D) of an incomplete column
        self._any = False  # column was complete
        self._finished = False

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Take the next latents; return the samples that can no longer change.

        Args:
            latents: (M, D), M from 0.

        Returns:
            (S,) samples on the device of the latents, S from 0.

        Raises:
            ValueError: if the latents have another shape, or the span has ended.
        """
        self._check_open()
        dim = self._tokenizer.latent_dim
        if latents.ndim != 2 or latents.shape[1] != dim:
            raise ValueError(f"push takes (M, {dim}) latents, not {tuple(latents.shape)}")
        waiting = torch.cat([self._waiting.to(latents), latents])
        whole = len(waiting) - len(waiting) % self._tokenizer.tokens_per_column
        self._waiting = waiting[whole:].clone()
        if not whole:
            return waiting.new_zeros(0, dtype=torch.float32)
        self._any = True
        waveform: Tensor = self._decoder.push(waiting[None, :whole])[0]
        return waveform

    @torch.no_grad()
    def finish(self) -> Tensor:
        """End the span; return its last (S,) samples.

        Latents of an incomplete column are dropped: a column lacks bands without them.

        Raises:
            ValueError: if the span has ended already.
        """
        self._check_open()
        self._finished = True
        if not self._any:
            return torch.zeros(0)
        waveform: Tensor = self._decoder.finish()[0]
        return waveform

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("this span has ended; make a StreamingDecoder for each span")
