"""POST /v1/chat/completions with audio: whole answers, and streams of their pieces."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from mllm_audio.data.messages import AudioPart, Message, TextPart
from mllm_audio.types import AudioChunk, TextDelta
from mllm_audio_vllm.server.answering import Sender, told
from mllm_audio_vllm.server.base import Engine, Event, Finished
from mllm_audio_vllm.server.conversation import earlier_answers, to_messages, whole_answer
from mllm_audio_vllm.server.encode import encode, to_int16
from mllm_audio_vllm.server.errors import RequestError
from mllm_audio_vllm.server.history import History, new_id
from mllm_audio_vllm.server.metrics import Record
from mllm_audio_vllm.server.protocol import ChatRequest


@dataclass
class Chat:
    """The answer to one request."""

    request: ChatRequest
    seed: int
    engine: Engine
    history: History
    record: Record
    audio_id: str = field(default_factory=new_id)
    completion_id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    events: list[TextDelta | AudioChunk] = field(default_factory=list)  # so far
    num_parts: int = 0  # stretches of text and spans of audio so far
    given: tuple[TextPart | AudioPart, ...] = ()  # of the message that the answer goes on from

    async def answer(self, sender: Sender) -> None:
        """Answer at once, when all of it is there."""
        finished = None
        async with aclosing(self._reply(await self._messages())) as events:
            async for event in events:
                finished = self._take(event)
        assert finished is not None
        await sender.json(await asyncio.to_thread(self._completion, finished, self._keep()))

    async def stream(self, sender: Sender) -> None:
        """Answer piece by piece."""
        finished = None
        async with aclosing(self._reply(await self._messages())) as events:
            async for event in events:
                if not sender.started:
                    await sender.start("text/event-stream; charset=utf-8")
                    await sender.write(self._chunk({"role": "assistant"}))
                finished = self._take(event)
                if not isinstance(event, Finished):
                    await sender.write(self._chunk(self._delta(event)))
        assert finished is not None
        expires_at = self._keep()
        if expires_at is not None:
            said = {"id": self.audio_id, "transcript": self._text(), "expires_at": expires_at}
            await sender.write(self._chunk({"audio": said}))
        await sender.write(self._chunk({}, finished.reason))
        if self._tells_usage:
            await sender.write(to_event({**self._head("chunk"), **_usage(finished), "choices": []}))
        await sender.write(b"data: [DONE]\n\n")
        await sender.end()

    async def _messages(self) -> list[Message]:
        """Read the conversation, away from the event loop.

        Raises:
            RequestError: if it refers to what is not kept, or cannot be read.
        """
        answers = earlier_answers(self.request.messages, self.history)
        messages = await asyncio.to_thread(
            to_messages,
            self.request.messages,
            answers,
            self.engine.sample_rate,
            self.engine.max_seconds,
        )
        if self.request.mllm_audio.continue_final_message:
            if messages[-1].role != "assistant":
                raise RequestError(
                    400,
                    f"the last message is of {messages[-1].role!r}, expected the assistant's to "
                    "go on from; leave continue_final_message out",
                    "mllm_audio.continue_final_message",
                )
            self.given = messages[-1].parts
        return messages

    def _reply(self, messages: list[Message]) -> AsyncGenerator[Event, None]:
        options = self.request.mllm_audio
        source = self.engine.reply(
            messages,
            options.to_config(self.engine.defaults),
            self.request.to_text_config(),
            seed=self.seed,
            max_tokens=self.request.most_tokens,
            continue_final_message=options.continue_final_message,
        )
        return told(source, self.record)

    def _take(self, event: Event) -> Finished | None:
        """Remember an event; return it if it is the last."""
        if isinstance(event, Finished):
            return event
        if not self.events or _stretch(event) != _stretch(self.events[-1]):
            self.num_parts += 1
        self.events.append(event)
        return None

    def _keep(self) -> int | None:
        """Keep the finished answer for later requests, if it has sound; say until when."""
        if not any(isinstance(e, AudioChunk) and len(e.waveform) for e in self.events):
            return None
        return self.history.put(self.audio_id, whole_answer(self.events, self.given))

    def _text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TextDelta))

    @property
    def _tells_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _head(self, kind: str = "") -> dict[str, Any]:
        name = f"chat.completion.{kind}" if kind else "chat.completion"
        return {
            "id": self.completion_id,
            "object": name,
            "created": self.created,
            "model": self.engine.model_name,
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._tells_usage else {}
        return to_event({**self._head("chunk"), "choices": [choice], **usage})

    def _delta(self, event: TextDelta | AudioChunk) -> dict[str, Any]:
        """Write the event that came last."""
        index = self.num_parts - 1
        if isinstance(event, TextDelta):
            part = {"index": index, "type": "text", "text": event.text}
            return {"content": event.text, "content_parts": [part]}
        sound: dict[str, Any] = {"id": self.audio_id, "sample_rate": event.sample_rate}
        if len(event.waveform):
            sound["data"] = base64.b64encode(to_int16(event.waveform).tobytes()).decode()
        part = {"index": index, "type": "audio", "span": event.span, "last": event.last}
        return {"audio": sound, "content_parts": [part]}

    def _completion(self, finished: Finished, expires_at: int | None) -> dict[str, Any]:
        """Write the whole answer."""
        text = self._text()
        message: dict[str, Any] = {"role": "assistant", "content": text, "audio": None}
        if expires_at is not None:
            chunks = [e for e in self.events if isinstance(e, AudioChunk)]
            message["audio"] = {
                "id": self.audio_id,
                "data": self._encoded(chunks),
                "expires_at": expires_at,
                "transcript": text,
                "sample_rate": self.engine.sample_rate,
            }
        stretches = [list(events) for _, events in groupby(self.events, _stretch)]
        parts = [self._part(events) for events in stretches]
        message["content_parts"] = [p for p in parts if p.get("seconds") != 0]
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = finished.reason
        return {**self._head(), "choices": [choice], **_usage(finished)}

    def _part(self, stretch: list[TextDelta | AudioChunk]) -> dict[str, Any]:
        texts = [e.text for e in stretch if isinstance(e, TextDelta)]
        if texts:
            return {"type": "text", "text": "".join(texts)}
        chunks = [e for e in stretch if isinstance(e, AudioChunk)]
        num_samples = sum(len(chunk.waveform) for chunk in chunks)
        return {
            "type": "audio",
            "span": chunks[0].span,
            "data": self._encoded(chunks),
            "seconds": num_samples / self.engine.sample_rate,
        }

    def _encoded(self, chunks: list[AudioChunk]) -> str:
        waveform = torch.cat([chunk.waveform.cpu() for chunk in chunks])
        audio_format = self.request.audio.format or "wav"
        return base64.b64encode(encode(waveform, audio_format, self.engine.sample_rate)).decode()


def _stretch(event: TextDelta | AudioChunk) -> int | None:
    """Tell what an event is part of: a span by its number, or text."""
    return event.span if isinstance(event, AudioChunk) else None


def to_event(values: dict[str, Any]) -> bytes:
    """Write a server-sent event."""
    return f"data: {json.dumps(values)}\n\n".encode()


def broken_event(error: RequestError) -> bytes:
    """Write the event that ends a stream which cannot go on."""
    return to_event(error.body())


def _usage(finished: Finished) -> dict[str, Any]:
    made = finished.text_tokens + finished.audio_tokens
    details = {"audio_tokens": finished.audio_tokens, "text_tokens": finished.text_tokens}
    usage = {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": finished.prompt_tokens + made,
        "completion_tokens_details": details,
    }
    return {"usage": usage}
