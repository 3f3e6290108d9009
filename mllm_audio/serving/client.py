"""One request for sound, and when each piece of it came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

BYTES_PER_SAMPLE = 2  # of 16 bit mono PCM
MAX_RATE = 1_000_000  # Hz, of a server's answer


@dataclass(frozen=True)
class Arrival:
    """A piece of sound that came."""

    at: float  # seconds since the request was sent
    seconds: float  # of sound in it


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request."""

    sent: float  # seconds since the level began
    seconds: float  # from sending it to the end of the answer, or to the error
    arrivals: tuple[Arrival, ...] = ()
    audio_tokens: int | None = None  # latents, where the server says how many
    error: str | None = None  # its kind

    @property
    def audio_seconds(self) -> float:
        """Duration of the sound that came."""
        return sum(arrival.seconds for arrival in self.arrivals)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What requests ask for."""

    mode: str = "speech"  # in MODES
    model: str = ""  # as the server calls it
    sample_rate: int = 16000  # Hz, of its sound
    options: dict[str, Any] = field(default_factory=dict)  # the field `mllm_audio`
    timeout: float = 120.0  # seconds for a whole answer
    max_bytes: int = 64 * 2**20  # of an answer


class _AnswerError(Exception):
    """An answer that is no sound; its text is the kind of error."""


@dataclass
class _Answer:
    """What has come so far."""

    started: float
    rate: int
    arrivals: list[Arrival] = field(default_factory=list)
    audio_tokens: int | None = None
    num_bytes: int = 0  # of sound
    counted: int = 0  # samples in `arrivals`

    def add(self, num_bytes: int) -> None:
        """Count bytes of PCM; half a sample waits for its other half."""
        self.num_bytes += num_bytes
        samples = self.num_bytes // BYTES_PER_SAMPLE - self.counted
        if samples:
            self.counted += samples
            at = time.perf_counter() - self.started
            self.arrivals.append(Arrival(at, samples / self.rate))


async def send(
    client: httpx.AsyncClient,
    ask: Ask,
    caption: str,
    seed: int,
    *,
    since: float,
    record: Callable[[Outcome], None],
) -> Outcome:
    """Send one request and read its answer to the end; whatever goes wrong is an outcome too.

    Args:
        client: at the server.
        ask: what is asked for.
        caption: of the sound, or what the user says.
        seed: of the request.
        since: `time.perf_counter()` when the level began.
        record: takes the outcome, also when this is cancelled.
    """
    answer = _Answer(time.perf_counter(), ask.sample_rate)
    error: str | None = "interrupted"
    try:
        error = await _read(client, ask, caption, seed, answer)
    finally:
        outcome = Outcome(
            sent=answer.started - since,
            seconds=time.perf_counter() - answer.started,
            arrivals=tuple(answer.arrivals),
            audio_tokens=answer.audio_tokens,
            error=error,
        )
        record(outcome)
    return outcome


async def _read(
    client: httpx.AsyncClient, ask: Ask, caption: str, seed: int, answer: _Answer
) -> str | None:
    """Fill `answer`; return the kind of error, if one happened."""
    try:
        async with asyncio.timeout(ask.timeout):
            await MODES[ask.mode](client, ask, caption, seed, answer)
    except _AnswerError as failure:
        return str(failure)
    except (TimeoutError, httpx.TimeoutException):
        return "timeout"
    except httpx.ConnectError:
        return "no connection"
    except httpx.HTTPError:  # among them an answer that ends before it said it would
        return "cut short"
    return None if answer.arrivals else "no sound"


async def _speech(
    client: httpx.AsyncClient, ask: Ask, caption: str, seed: int, answer: _Answer
) -> None:
    """Ask for the sound of a caption, raw samples as they are made."""
    body = {
        "model": ask.model,
        "input": caption,
        "voice": "default",
        "response_format": "pcm",
        "seed": seed,
        "mllm_audio": ask.options,
    }
    async with client.stream("POST", "/v1/audio/speech", json=body) as response:
        _check(response)
        answer.rate = _rate(response.headers.get("X-Sample-Rate"), ask.sample_rate)
        async for piece in response.aiter_bytes():
            answer.add(len(piece))
            if answer.num_bytes > ask.max_bytes:
                raise _AnswerError("answer too long")


async def _chat(
    client: httpx.AsyncClient, ask: Ask, caption: str, seed: int, answer: _Answer
) -> None:
    """Ask for a reply in text and sound, as server-sent events."""
    body = {
        "model": ask.model,
        "messages": [{"role": "user", "content": caption}],
        "modalities": ["text", "audio"],
        "audio": {"format": "pcm16", "voice": "default"},
        "stream": True,
        "stream_options": {"include_usage": True},
        "seed": seed,
        "mllm_audio": ask.options,
    }
    done = False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        _check(response)
        async for data in _events(response, ask.max_bytes):
            if data == "[DONE]":
                done = True
                break
            _take(data, answer)
    if not done:
        raise _AnswerError("cut short")


def _take(data: str, answer: _Answer) -> None:
    """Count the sound and the usage of one event."""
    try:
        event = json.loads(data)
        if event.get("error"):
            raise _AnswerError("error in the stream")
        for choice in event.get("choices") or ():
            audio = (choice.get("delta") or {}).get("audio") or {}
            if "sample_rate" in audio:
                answer.rate = _rate(audio["sample_rate"], answer.rate)
            encoded = audio.get("data") or ""
            answer.add(len(encoded) * 3 // 4 - encoded[-2:].count("="))  # base64
        details = (event.get("usage") or {}).get("completion_tokens_details") or {}
        if "audio_tokens" in details:
            answer.audio_tokens = int(details["audio_tokens"])
    except (ValueError, TypeError, AttributeError) as error:
        raise _AnswerError("not the answer expected") from error


async def _events(response: httpx.Response, max_bytes: int) -> AsyncIterator[str]:
    """Yield the data of server-sent events, one line each, of an answer within bounds."""
    waiting, total = b"", 0
    async for piece in response.aiter_bytes():
        total += len(piece)
        if total > max_bytes:
            raise _AnswerError("answer too long")
        *lines, waiting = (waiting + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise _AnswerError(f"HTTP {response.status_code}")


def _rate(value: Any, default: int) -> int:
    """Read a sample rate that the server tells; `default` where it tells none."""
    if value is None:
        return default
    try:
        rate = int(value)
    except (ValueError, TypeError):
        rate = 0
    if not 0 < rate <= MAX_RATE:
        raise _AnswerError("not the answer expected")
    return rate


MODES = {"speech": _speech, "chat": _chat}
