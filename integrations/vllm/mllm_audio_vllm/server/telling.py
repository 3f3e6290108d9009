"""Ids and latents of one reply to events: text as it is certain, sound as it is decoded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.generation.stream import SpanDecoder
from mllm_audio.generation.text import TextStream
from mllm_audio.text import SpecialIds
from mllm_audio.types import AudioChunk, TextDelta

Run = Callable[..., Awaitable[Any]]  # calls a function with arguments, away from the event loop


class Sound:
    """One span of audio on its way to samples, decoded away from the event loop."""

    def __init__(self, decoder: SpanDecoder, tokens_per_column: int, run: Run) -> None:
        self.decoder, self.column, self.run = decoder, tokens_per_column, run
        self.latents: list[Tensor] = []  # that are not decoded yet

    def add(self, latent: Tensor) -> None:
        """Take the next (D,) latent."""
        self.latents.append(latent)

    async def chunk(self) -> AudioChunk | None:
        """Decode what makes up whole columns; None while there are no samples."""
        whole = len(self.latents) // self.column * self.column
        return await self._decode(whole) if whole else None

    async def end(self) -> AudioChunk | None:
        """Decode the rest; a column that lacks latents is dropped. None of an empty span."""
        if self.latents:
            await self._decode(len(self.latents))
        chunk: AudioChunk | None = await self.run(self.decoder.finish)
        return chunk

    async def _decode(self, count: int) -> AudioChunk | None:
        latents, self.latents = torch.stack(self.latents[:count]), self.latents[count:]
        chunk: AudioChunk | None = await self.run(self.decoder.push, latents)
        return chunk


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
        for decode in (sound.chunk, sound.end):
            if chunk := await decode():
                yield chunk
