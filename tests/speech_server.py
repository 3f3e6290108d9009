"""A server that speaks the wire of `mllm-audio serve` with known delays, for tests of load."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

RATE = 8000  # Hz
CHUNK_SECONDS = 0.1  # of sound in each chunk


@dataclass
class SpeechServer:
    """How it answers, and what it was asked."""

    first: float = 0.1  # seconds before the first chunk
    gap: float = 0.05  # seconds between chunks
    chunks: int = 4
    frame_rate: float | None = 25.0  # latents a second, told of the model and in usage
    key: str | None = None
    failing: dict[str, str] = field(default_factory=dict)  # kind of failure by caption
    asked: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0  # requests at once
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self.respond(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def respond(self, head, reader, writer) -> None:
        lines = head.split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            await self.say(writer, 401, b"{}")
        elif lines[0].startswith("GET /v1/audio/model"):
            info = {"model": "fake", "sample_rate": RATE, "frame_rate": self.frame_rate}
            await self.say(writer, 200, json.dumps(info).encode())
        elif lines[0].startswith("POST /v1/"):
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await self.speak(json.loads(body), "chat" in lines[0], writer)
            finally:
                self.running -= 1
        else:
            await self.say(writer, 404, b"{}")

    async def speak(self, request, chat, writer) -> None:
        self.asked.append(request)
        caption = request["messages"][0]["content"] if chat else request["input"]
        failure = self.failing.get(caption)
        if failure == "503":
            await self.say(writer, 503, b"{}")
            return
        kind = "text/event-stream" if chat else "audio/pcm"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nX-Sample-Rate: {RATE}\r\n"
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        pieces = 0 if failure == "silent" else self.chunks
        for number in range(pieces):
            await asyncio.sleep(self.gap if number else self.first)
            sound = bytes(2 * round(RATE * CHUNK_SECONDS))
            await self.chunk(writer, self.event(sound) if chat else sound)
            if failure == "cut":
                writer.close()
                return
            if failure == "hang":
                await asyncio.sleep(60)
        if chat:
            await self.chunk(writer, self.ending())
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    @staticmethod
    def event(sound: bytes) -> bytes:
        audio = {"data": base64.b64encode(sound).decode(), "sample_rate": RATE}
        return b"data: %s\n\n" % json.dumps({"choices": [{"delta": {"audio": audio}}]}).encode()

    def ending(self) -> bytes:
        tokens = round(self.chunks * CHUNK_SECONDS * (self.frame_rate or 0))
        usage = {"usage": {"completion_tokens_details": {"audio_tokens": tokens}}, "choices": []}
        return b"data: %s\n\ndata: [DONE]\n\n" % json.dumps(usage).encode()

    @staticmethod
    async def chunk(writer, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()

    @staticmethod
    async def say(writer, status: int, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


@contextmanager
def serving(server: SpeechServer) -> Iterator[SpeechServer]:
    """Answer in a thread of its own."""
    loop = asyncio.new_event_loop()
    listening = threading.Event()

    async def main() -> None:
        opened = await asyncio.start_server(server.answer, "127.0.0.1", 0, backlog=1024)
        server.port = opened.sockets[0].getsockname()[1]
        listening.set()
        await opened.serve_forever()

    async def until_cancelled() -> None:
        try:
            await main()
        except asyncio.CancelledError:
            answers = asyncio.all_tasks() - {asyncio.current_task()}
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    task = loop.create_task(until_cancelled())
    thread = threading.Thread(target=loop.run_until_complete, args=[task])
    thread.start()
    assert listening.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()
