"""What the HTTP side asks of the engine, and the events that come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mllm_audio.data.messages import Message
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.text import TextConfig
from mllm_audio.types import AudioChunk, TextDelta


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of a reply."""

    reason: str  # "stop", or "length" where max_tokens or the context ended it
    prompt_tokens: int
    text_tokens: int  # of the reply, markers counted
    audio_tokens: int  # of the reply: latents


Event = TextDelta | AudioChunk | Finished


class Engine(Protocol):
    """Makes replies; every method raises ValueError, with one line, for what a client got wrong.

    Iterators raise it at their first step, before any event. Closing an iterator (`aclose`, or
    cancelling the task that waits for it) aborts the request and frees all that belongs to it.
    """

    model_name: str  # as clients call it
    sample_rate: int  # Hz, of every chunk
    frame_rate: float  # latents per second of sound
    max_seconds: float  # of one span of audio
    chats: bool  # false for models that make sounds of captions alone: `reply` refuses
    defaults: GenerationConfig  # of the checkpoint

    def reply(
        self,
        messages: Sequence[Message],
        config: GenerationConfig,
        text: TextConfig,
        *,
        seed: int,
        max_tokens: int | None = None,
        continue_final_message: bool = False,
    ) -> AsyncIterator[Event]:
        """Reply to a conversation with text and audio, as `Voice.generate_interleaved` does.

        Args:
            messages: audio in them is a `Clip` or (N, D) latents.
            config: of each span of audio.
            text: how text is chosen.
            seed: of the text and the sound.
            max_tokens: of text and audio together; None: what the context holds.
            continue_final_message: go on with the last message, the assistant's.

        Yields:
            `TextDelta`s and `AudioChunk`s in order, chunks while their span goes on; the chunk
            that ends a span has `last` set, and may hold no samples. Then `Finished`, once.
        """

    def speak(
        self, caption: str, config: GenerationConfig, *, seed: int
    ) -> AsyncIterator[AudioChunk | Finished]:
        """Make the sound of a caption, as `Voice.generate` does: one span."""

    async def stats(self) -> dict[str, int]:
        """Count what the workers hold: live_states, and since the start: steps, latents, ..."""
