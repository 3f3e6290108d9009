"""Answers that end at once when their client goes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mllm_audio.types import AudioChunk
from mllm_audio_vllm.server.base import Event, Finished
from mllm_audio_vllm.server.errors import RequestError
from mllm_audio_vllm.server.metrics import Record

logger = logging.getLogger(__name__)
PIECE = 2**18  # bytes of a whole answer that are sent at once
FAILED = "the engine failed on this request; try again, or read the server's log"


class ClientGoneError(Exception):
    """The client went away, or does not take its answer."""


class Sender:
    """Writes one response; waits for its client, and only so long."""

    def __init__(self, send: Send, seconds: float) -> None:
        self.send, self.seconds = send, seconds
        self.started = False

    async def start(self, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Begin a successful response whose length is not known."""
        named = {"content-type": content_type, "cache-control": "no-store", **(headers or {})}
        pairs = [(name.lower().encode(), value.encode()) for name, value in named.items()]
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": pairs})

    async def write(self, data: bytes) -> None:
        """Send a piece of the body, if there is any."""
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """End the body."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def json(self, values: dict[str, Any]) -> None:
        """Send a whole response, in pieces that a slow client can take in their time."""
        data = await asyncio.to_thread(lambda: json.dumps(values).encode())
        await self.start("application/json", {"content-length": str(len(data))})
        for begin in range(0, len(data), PIECE):
            await self.write(data[begin : begin + PIECE])
        await self.end()

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await self.send(message)
        except (TimeoutError, OSError) as error:
            raise ClientGoneError from error


Work = Callable[[Sender], Awaitable[None]]


class Answer(Response):
    """A response that is made while its client listens; the work is cancelled when it goes.

    An error before the response has started is sent as one. After that `broken` may tell of it
    within the body, which then ends; without it the connection breaks, so that nobody takes a part
    for the whole.
    """

    def __init__(
        self,
        work: Work,
        record: Record,
        send_seconds: float,
        broken: Callable[[RequestError], bytes] | None = None,
    ) -> None:
        self.work, self.record, self.seconds, self.broken = work, record, send_seconds, broken
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work, and listen for the client's end of the connection."""
        with self.record:
            task = asyncio.create_task(self._run(Sender(send, self.seconds), scope, receive, send))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    task.result()
                else:
                    self.record.outcome = "disconnect"
            finally:
                task.cancel()
                gone.cancel()
                await asyncio.gather(task, gone, return_exceptions=True)

    async def _run(self, sender: Sender, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.work(sender)
        except ClientGoneError:
            self.record.outcome = "disconnect"
        except Exception as error:
            refusal = _refusal(error)
            self.record.outcome = str(refusal.status)
            if not sender.started:
                await refusal.response()(scope, receive, send)
            elif self.broken is not None:
                with suppress(ClientGoneError):
                    await sender.write(self.broken(refusal))
                    await sender.end()


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _refusal(error: Exception) -> RequestError:
    """Say to a client what went wrong; what is not its own doing stays in the log."""
    if isinstance(error, RequestError):
        return error
    logger.error("the engine failed on a request", exc_info=error)
    status = getattr(error, "status_code", 500)  # vLLM's errors have it
    return RequestError(503 if status == 503 else 500, FAILED)


async def told(events: AsyncIterator[Event], record: Record) -> AsyncGenerator[Event, None]:
    """Pass on the events of a reply, and measure them; close the engine's iterator at the end.

    Raises:
        RequestError: if the engine refuses what the client asked for.
    """
    has_begun = False
    last: Event | None = None
    async with aclosing(events) as source:  # type: ignore[type-var]
        try:
            async for event in source:
                has_begun, last = True, event
                if isinstance(event, AudioChunk):
                    record.heard(len(event.waveform) / event.sample_rate)
                elif isinstance(event, Finished):
                    record.finished(event)
                yield event
        except ValueError as error:
            if has_begun:
                raise RuntimeError("the engine refused a request that it had begun") from error
            raise RequestError(400, str(error)) from error
    if not isinstance(last, Finished):
        raise RuntimeError(f"the engine ended a reply with {type(last).__name__}")
