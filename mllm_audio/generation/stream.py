"""Turn latents into sound as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from mllm_audio.generation.interleaved import SpanLatents
from mllm_audio.tokenizers.base import AS_RECOMMENDED, AudioTokenizer, StreamConfig
from mllm_audio.types import AudioChunk, Clip, TextDelta


class StreamingDecoder:
    """Decode one span of audio whose latents arrive in any portions.

    How they are portioned changes no sample. The samples are as many as those of `decode`, and the
    same ones where the tokenizer's `stream` says so. It keeps no more than a few columns, however
    long the span. It has no thread of its own, and one thread may use it at a time.
    """

    def __init__(self, tokenizer: AudioTokenizer, config: StreamConfig = AS_RECOMMENDED) -> None:
        """Begin a span."""
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream(config)
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


class SpanDecoder:
    """Turn the latents of one span of a reply into chunks of sound.

    What streams sound does it through this: `Voice.stream`, `generate_interleaved` and servers.
    """

    def __init__(
        self,
        tokenizer: AudioTokenizer,
        index: int = 0,
        given: Tensor | None = None,
        seconds: float | None = None,
        config: StreamConfig = AS_RECOMMENDED,
    ) -> None:
        """Begin a span.

        Args:
            tokenizer: of the model.
            index: of the span in the reply.
            given: (N, D) latents that it goes on from; their sound is not told again.
            seconds: its exact duration, `given` counted; None: as long as its latents last.
            config: chunks and look-ahead.
        """
        self._decoder, self._index = StreamingDecoder(tokenizer, config), index
        self._given = given = torch.zeros(0, tokenizer.latent_dim) if given is None else given
        self._sample_rate = tokenizer.sample_rate
        columns = len(given) // tokenizer.tokens_per_column
        self._skip = columns * tokenizer.samples_per_column
        self._left = None if seconds is None else round(seconds * self._sample_rate) - self._skip
        self._latents = [given[:0]]  # since the last chunk
        self._any = False  # latent was added

    def push(self, latents: Tensor) -> AudioChunk | None:
        """Take the next (M, D) latents; return what sounds now, None while there are no samples."""
        self._any |= bool(len(latents))
        self._latents.append(latents)
        both = torch.cat([self._given, latents])
        self._given = self._given[:0]
        waveform = self._cut(self._decoder.push(both))
        return self._chunk(waveform, last=False) if len(waveform) else None

    def finish(self) -> AudioChunk | None:
        """End the span; return its last chunk, which may be silent, or None of an empty one."""
        return self._chunk(self._cut(self._decoder.finish()), last=True) if self._any else None

    def _cut(self, waveform: Tensor) -> Tensor:
        """Leave out the sound that was given, and what is longer than asked for."""
        skipped = min(self._skip, len(waveform))
        self._skip -= skipped
        waveform = waveform[skipped:]
        if self._left is not None:
            waveform = waveform[: self._left]
            self._left -= len(waveform)
        return waveform

    def _chunk(self, waveform: Tensor, *, last: bool) -> AudioChunk:
        latents, self._latents = torch.cat(self._latents), self._latents[:1]
        return AudioChunk(waveform, self._sample_rate, self._index, latents, last)


def tell_audio(
    events: Iterable[TextDelta | SpanLatents],
    tokenizer: AudioTokenizer,
    seconds: float | None,
    config: StreamConfig = AS_RECOMMENDED,
) -> Iterator[TextDelta | AudioChunk]:
    """Decode the spans of a reply while they come.

    Args:
        events: of the reply.
        tokenizer: of the model.
        seconds: exact duration of each span; None: as long as its latents last.
        config: chunks and look-ahead.
    """
    decoder: SpanDecoder | None = None
    for event in events:
        if isinstance(event, TextDelta):
            yield event
            continue
        decoder = decoder or SpanDecoder(tokenizer, event.index, event.given, seconds, config)
        if event.last:
            chunk, decoder = decoder.finish(), None
        else:
            chunk = decoder.push(event.latents)
        if chunk is not None:
            yield chunk


def tell_whole_spans(
    events: Iterable[TextDelta | SpanLatents],
    tokenizer: AudioTokenizer,
    to_clip: Callable[[Tensor], Clip],
) -> Iterator[TextDelta | AudioChunk]:
    """Decode each span of a reply when it ends, all of it at once, and cut off what was given."""
    latents: list[Tensor] = []
    for event in events:
        if isinstance(event, TextDelta):
            yield event
        elif not event.last:
            latents.append(event.latents)
        elif latents:
            new, latents = torch.cat(latents), []
            clip = to_clip(torch.cat([event.given, new]))
            columns = len(event.given) // tokenizer.tokens_per_column
            waveform = clip.waveform[columns * tokenizer.samples_per_column :]
            yield AudioChunk(waveform, clip.sample_rate, event.index, new)
