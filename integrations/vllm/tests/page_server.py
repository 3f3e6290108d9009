"""A stand-alone server that speaks the wire of the page with sounds made up here.

Run it to look at the page: `python tests/page_server.py [PORT]`.
"""

from __future__ import annotations

import base64
import json
import math
import select
import socket
import sys
import threading
import time
import uuid
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "mllm_audio_vllm" / "server"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
RATE = 16_000


def tone(hertz: float, seconds: float, amplitude: float = 0.5) -> bytes:
    """Return 16-bit little-endian samples of a tone."""
    count = round(seconds * RATE)
    step = 2 * math.pi * hertz / RATE
    samples = (round(32767 * amplitude * math.sin(step * i)) for i in range(count))
    return array("h", samples).tobytes()


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Samples:
    """A span of sound, sent in pieces of `piece` bytes, `pause` seconds apart."""

    pcm: bytes
    piece: int = 3200
    pause: float = 0.02


@dataclass(frozen=True)
class Wait:
    """Wait until the event is set, or the client has gone."""

    event: threading.Event


@dataclass(frozen=True)
class Fail:
    """An error in mid-stream."""

    message: str


@dataclass(frozen=True)
class Cut:
    """The end of the connection, before the answer's."""


Step = Text | Samples | Wait | Fail | Cut
FIRST, SECOND = tone(1000, 0.8), tone(4000, 0.5, 0.25)
REPLY: tuple[Step, ...] = (
    Text("Sure: "),
    Samples(FIRST),
    Text("and "),
    Text("then "),
    Samples(SECOND),
    Text("that is all."),
)


@dataclass
class Script:
    """What the server does, and what it has seen."""

    reply: tuple[Step, ...] = REPLY
    sound: tuple[Step, ...] = (Samples(FIRST, piece=3201),)  # pieces end within a sample
    model: dict = field(
        default_factory=lambda: {
            "model": "made-up",
            "sample_rate": RATE,
            "max_seconds": 2.56,
            "chats": True,
            "defaults": {
                "guidance_scale": 7.0,
                "guidance_weight": None,
                "num_inference_steps": 100,
                "seconds": None,
            },
        }
    )
    key: str | None = None
    refusal: tuple[int, str] | None = None  # status and body of the answer to the next request
    requests: list[tuple[str, dict, str | None]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # of answers with sound
    gone: threading.Event = field(default_factory=threading.Event)  # a client hung up in an answer


class PageServer(ThreadingHTTPServer):
    """Serves one script at a free port of this machine."""

    daemon_threads = True

    def __init__(self, script: Script, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script = script
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about clients that have gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@contextmanager
def serving(script: Script) -> Iterator[PageServer]:
    """Serve in a thread."""
    server = PageServer(script)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        script = self.server.script
        if self.path == "/v1/audio/model":
            if self._allowed():
                self._json(200, script.model)
            return
        name = "page.html" if self.path == "/" else self.path[1:]
        path = FOLDER / name
        if "/" in name or path.suffix not in KINDS or not path.is_file():
            self.send_error(404)
            return
        self._head(200, f"{KINDS[path.suffix]}; charset=utf-8", len(path.read_bytes()))
        self.wfile.write(path.read_bytes())

    def do_POST(self) -> None:
        script = self.server.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        script.requests.append((self.path, body, self.headers["Authorization"]))
        speaks = self.path == "/v1/audio/speech"
        self._head(200, "audio/pcm" if speaks else "text/event-stream", None)
        try:
            if speaks:
                self._speak(script.sound)
            else:
                self._chat(script.reply)
        except OSError:
            script.gone.set()
            self.close_connection = True

    def _allowed(self) -> bool:
        script = self.server.script
        refusal, script.refusal = script.refusal, None
        if refusal:
            self._text(*refusal)
            return False
        key = script.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._json(401, {"error": "Unauthorized"})  # vLLM's form
        return False

    def _head(self, status: int, kind: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _json(self, status: int, values: dict) -> None:
        self._text(status, json.dumps(values))

    def _text(self, status: int, text: str) -> None:
        self._head(status, "application/json", len(text.encode()))
        self.wfile.write(text.encode())

    def _write(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _event(self, values: dict | str) -> None:
        text = values if isinstance(values, str) else json.dumps(values)
        self._write(f"data: {text}\n\n".encode())

    def _delta(self, delta: dict, reason: str | None = None) -> None:
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(0.02):
            ready, _, _ = select.select([self.connection], [], [], 0)
            if ready and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError

    def _cut(self) -> None:
        time.sleep(0.3)  # a browser drops what it has not read when a connection breaks
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _speak(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if isinstance(step, Samples):
                for piece in _pieces(step):
                    self._write(piece)
            elif isinstance(step, Wait):
                self._wait(step.event)
            else:
                self._cut()
                return
        self.wfile.write(b"0\r\n\r\n")

    def _chat(self, steps: tuple[Step, ...]) -> None:
        identity, text, span = f"audio-{uuid.uuid4().hex}", "", 0
        self._delta({"role": "assistant"})
        index = -1
        for before, step in zip((None, *steps), steps, strict=False):
            if isinstance(step, Wait):
                self._wait(step.event)
                continue
            if isinstance(step, Fail):
                self._event({"error": {"message": step.message, "code": 500}})
                self._write(b"")
                return
            if isinstance(step, Cut):
                self._cut()
                return
            index += not (isinstance(before, Text) and isinstance(step, Text))
            if isinstance(step, Text):
                text += step.text
                part = {"index": index, "type": "text", "text": step.text}
                self._delta({"content": step.text, "content_parts": [part]})
                continue
            part = {"index": index, "type": "audio", "span": span, "last": False}
            for piece in _pieces(step):
                data = base64.b64encode(piece).decode()
                audio = {"id": identity, "data": data, "sample_rate": RATE}
                self._delta({"audio": audio, "content_parts": [part]})
            self._delta({"audio": {"id": identity}, "content_parts": [{**part, "last": True}]})
            span += 1
        self._finish(identity, text, span)

    def _finish(self, identity: str, text: str, spans: int) -> None:
        if spans:
            self.server.script.ids.append(identity)
            end = {"transcript": text, "expires_at": int(time.time()) + 3600}
            self._delta({"audio": {"id": identity, **end}})
        self._delta({}, "stop")
        details = {"text_tokens": 9, "audio_tokens": 64}
        counts = {"prompt_tokens": 12, "completion_tokens": 73, "total_tokens": 85}
        self._event({"choices": [], "usage": {**counts, "completion_tokens_details": details}})
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")


def _pieces(samples: Samples) -> Iterator[bytes]:
    for start in range(0, len(samples.pcm), samples.piece):
        time.sleep(samples.pause)
        yield samples.pcm[start : start + samples.piece]


if __name__ == "__main__":
    demo = PageServer(Script(), int(sys.argv[1]) if len(sys.argv) > 1 else 8765)
    print(demo.url, flush=True)
    demo.serve_forever()
