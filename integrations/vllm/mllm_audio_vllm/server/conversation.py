"""Messages of a request to those that models answer, and replies to what is kept of them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import torch

from mllm_audio import wav
from mllm_audio.data.messages import AudioPart, Message, TextPart
from mllm_audio.generation.interleaved import join
from mllm_audio.types import AudioChunk, Clip, TextDelta
from mllm_audio_vllm.server.errors import RequestError
from mllm_audio_vllm.server.history import History, Parts
from mllm_audio_vllm.server.protocol import ChatMessage, Sound, TextContent


def earlier_answers(messages: Sequence[ChatMessage], history: History) -> list[Parts | None]:
    """Look up the answers that messages stand for; None for those that hold their own content.

    Raises:
        RequestError: if one is not kept.
    """
    found: list[Parts | None] = []
    for number, message in enumerate(messages):
        answer = history.get(message.audio.id) if message.audio else None
        if message.audio and answer is None:
            raise RequestError(
                404,
                f"no answer is kept under the audio.id of message {number + 1}: it is unknown, "
                "expired, or was cut short; send the text of that answer as content",
                f"messages.{number}.audio.id",
            )
        found.append(answer)
    return found


def to_messages(
    messages: Sequence[ChatMessage],
    answers: Sequence[Parts | None],
    sample_rate: int,
    max_seconds: float,
) -> list[Message]:
    """Decode the recordings, at `sample_rate` and of `max_seconds` at most.

    Raises:
        RequestError: naming the part that is not such a recording.
    """
    return [
        Message(m.role, _parts(m, f"messages.{n}", sample_rate, max_seconds) if a is None else a)
        for n, (m, a) in enumerate(zip(messages, answers, strict=True))
    ]


def _parts(message: ChatMessage, where: str, sample_rate: int, max_seconds: float) -> Parts:
    parts: list[TextPart | AudioPart] = []
    for number, part in enumerate(message.content):
        if isinstance(part, TextContent):
            if part.text:
                parts.append(TextPart(part.text))
            continue
        name = f"{where}.content.{number}.input_audio"
        try:
            parts.append(AudioPart(_clip(part.input_audio, sample_rate, max_seconds)))
        except ValueError as error:
            raise RequestError(400, f"{name}: {error}", name) from error
    return tuple(parts)


def _clip(sound: Sound, sample_rate: int, max_seconds: float) -> Clip:
    try:
        data = base64.b64decode(sound.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"data is not base64 ({error}); encode the file's bytes") from error
    return wav.read_bytes(data, sound.format, sample_rate, max_seconds)


def whole_answer(
    events: Sequence[TextDelta | AudioChunk], given: Sequence[TextPart | AudioPart]
) -> Parts:
    """Join a reply to the parts of the message that it goes on from, if any."""
    last = given[-1] if given else None
    if not isinstance(last, AudioPart):
        return join(events, given)
    if not isinstance(last.audio, Clip):
        return join(events, given, open_span=True)
    # A recording that goes on stays one recording: its latents are known to the engine alone.
    new = [e.waveform for e in events if isinstance(e, AudioChunk) and e.span == 0]
    rest = [e for e in events if isinstance(e, TextDelta) or e.span > 0]
    longer = Clip(torch.cat([last.audio.waveform, *new]), last.audio.sample_rate)
    return (*given[:-1], AudioPart(longer), *join(rest))
