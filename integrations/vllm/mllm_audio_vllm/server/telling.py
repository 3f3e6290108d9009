"""Ids and latents of one reply to events: text as it is certain, sound as it is decoded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.generation.stream import StreamingDecoder
from mllm_audio.generation.text import TextStream
from mllm_audio.text import SpecialIds
from mllm_audio.tokenizers import AudioTokenizer
from mllm_audio.types import AudioChunk, TextDelta

Run = Callable[..., Awaitable[Any]]  # calls a function with arguments, away from the event loop


class Sound:
    """One span of audio on its way to samples."""

    def __init__(
        self,
        tokenizer: AudioTokenizer,
        index: int,
        given: Tensor,
        seconds: float | None,
        run: Run,
    ) -> None:
        """Begin a span.

        Args:
            tokenizer: of the model.
            index: of the span in the reply.
            given: (N, D) latents that it goes on from; their sound is not told again.
            seconds: its exact duration, `given` counted; None: as long as its latents last.
            run: for the decoder.
        """
        self.tokenizer, self.index, self.run = tokenizer, index, run
        self.decoder = StreamingDecoder(tokenizer)
        self.waiting = [*given]  # latents of a column that is not complete
        columns = len(given) // tokenizer.tokens_per_column
        self.skip = columns * tokenizer.samples_per_column
        self.left = None if seconds is None else round(seconds * tokenizer.sample_rate) - self.skip
        self.latents: list[Tensor] = []  # since the last chunk
        self.num_new = 0

    def add(self, latent: Tensor) -> None:
        """Take the next (D,) latent."""
        self.waiting.append(latent)
        self.latents.append(latent)
        self.num_new += 1

    async def chunk(self) -> AudioChunk | None:
        """Decode what is complete; None while there are no samples of it."""
        whole = len(self.waiting) // self.tokenizer.tokens_per_column
        whole *= self.tokenizer.tokens_per_column
        if not whole:
            return None
        latents, self.waiting = torch.stack(self.waiting[:whole]), self.waiting[whole:]
        waveform = self._cut(await self.run(_decode, self.decoder.push, latents))
        return self._chunk(waveform, last=False) if len(waveform) else None

    async def end(self) -> AudioChunk:
        """Decode the rest; a column that lacks latents is dropped."""
        waveform = await self.run(_decode, self.decoder.finish)
        return self._chunk(self._cut(waveform), last=True)

    def _cut(self, waveform: Tensor) -> Tensor:
        """Leave out the sound that was given, and what is longer than asked for."""
        skipped = min(self.skip, len(waveform))
        self.skip -= skipped
        waveform = waveform[skipped:]
        if self.left is not None:
            waveform = waveform[: self.left]
            self.left -= len(waveform)
        return waveform

    def _chunk(self, waveform: Tensor, *, last: bool) -> AudioChunk:
        latents, self.latents = self.latents, []
        dim = self.tokenizer.latent_dim
        stacked = torch.stack(latents) if latents else torch.zeros(0, dim)
        return AudioChunk(waveform, self.tokenizer.sample_rate, self.index, stacked, last)


class Teller:
    """Turns the ids of a reply into events.

    Attributes:
        num_text, num_audio: ids said so far, markers among the text.
        num_chosen: of the text, those that the model chose: all but the ends of spans.
        stopped: at a stop string.
    """

    def __init__(
        self,
        special: SpecialIds,
        text_tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str],
        new_sound: Callable[[int, Tensor], Sound],
        before: int,
        open_latents: Tensor | None,
        nothing: Tensor,
    ) -> None:
        """Begin behind the id `before`, within a span if `open_latents`, (N, D), are given."""
        self.special, self.text_tokenizer, self.stops = special, text_tokenizer, stop_strings
        self.new_sound, self.nothing = new_sound, nothing
        self.num_text, self.num_chosen, self.num_audio, self.stopped = 0, 0, 0, False
        self.num_spans = 0
        self.sound: Sound | None = None
        if open_latents is not None:
            self._open(open_latents)
        self.stream = self._stream(before)

    def _stream(self, before: int) -> TextStream:
        return TextStream(self.text_tokenizer, before, self.stops)

    def _open(self, given: Tensor) -> None:
        self.sound = self.new_sound(self.num_spans, given)
        self.num_spans += 1

    @property
    def in_audio(self) -> bool:
        """Tell whether a span is open."""
        return self.sound is not None

    async def tell(
        self, ids: Sequence[int], position: int, take: Callable[[int], Awaitable[Tensor]]
    ) -> AsyncIterator[TextDelta | AudioChunk]:
        """Tell what the next `ids` say; `take` fetches the latent of a position.

        Latents of several ids that came together are decoded together.
        """
        for offset, token in enumerate(ids):
            if self.sound is not None and token == self.special.audio:
                self.num_audio += 1
                self.sound.add(await take(position + offset))
                continue
            self.num_text += 1
            self.num_chosen += int(token != self.special.audio_end)
            if self.sound is not None and token == self.special.audio_end:
                async for event in self._close():
                    yield event
                self.stream = self._stream(token)
            elif token == self.special.audio_start:
                if text := self.stream.flush():
                    yield TextDelta(text)
                self._open(self.nothing)
            elif text := self.stream.push(token):
                yield TextDelta(text)
            if self.stream.stopped:
                self.stopped = True
                return
        if self.sound is not None and (chunk := await self.sound.chunk()):
            yield chunk

    async def finish(self) -> AsyncIterator[TextDelta | AudioChunk]:
        """Tell what was held back, at the end of the reply."""
        if self.sound is not None:
            async for event in self._close():
                yield event
        elif not self.stopped and (text := self.stream.flush()):
            yield TextDelta(text)

    async def _close(self) -> AsyncIterator[AudioChunk]:
        """End the span; nothing is told of one that nothing was added to."""
        sound, self.sound = self.sound, None
        assert sound is not None
        if not sound.num_new:
            return
        if chunk := await sound.chunk():
            yield chunk
        yield await sound.end()


def _decode(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    with torch.inference_mode():
        return function(*arguments)
