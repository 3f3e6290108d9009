"""Our paths on vLLM's app."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm_audio.config import to_dict
from mllm_audio.listening.server import HEADERS
from mllm_audio_vllm.server.answering import Answer, Sender
from mllm_audio_vllm.server.base import Engine
from mllm_audio_vllm.server.bounds import Bounds
from mllm_audio_vllm.server.chat import Chat, broken_event
from mllm_audio_vllm.server.errors import RequestError
from mllm_audio_vllm.server.guard import Guard, load_json
from mllm_audio_vllm.server.history import History
from mllm_audio_vllm.server.metrics import Metrics
from mllm_audio_vllm.server.protocol import ChatRequest, SpeechRequest
from mllm_audio_vllm.server.speech import speak
from mllm_audio_vllm.server.wire import parse, shown

CHAT = "/v1/chat/completions"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}


@dataclass
class Holder:
    """Where the engine will be: vLLM asks for paths before it has one."""

    engine: Engine | None = None

    def get(self) -> Engine:
        """Return the engine.

        Raises:
            RequestError: while there is none.
        """
        if self.engine is None:
            raise RequestError(503, "the model is still loading; try again in a moment")
        return self.engine


@dataclass
class Server:
    """What requests share."""

    holder: Holder
    bounds: Bounds
    metrics: Metrics
    core_chat: ASGIApp | None  # vLLM's own handler of CHAT
    history: History = field(init=False)

    def __post_init__(self) -> None:
        """Begin without answers."""
        self.history = History(self.bounds.history_mib * 2**20, self.bounds.history_seconds)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation; without audio vLLM does, which is given the request as it came."""
        values = await _json(request)
        if not _asks_for_audio(values):
            if self.core_chat is None:
                line = "found no 'audio' in modalities, expected it: this server has no other chat"
                raise RequestError(400, line, "modalities")
            return _Forward(self.core_chat, await request.body())
        engine = self.holder.get()
        if not engine.chats:
            line = "this model makes sounds of captions alone; use /v1/audio/speech"
            raise RequestError(400, line, "model")
        wanted = parse(ChatRequest, values)
        check_model(wanted.model, engine)
        record = self.metrics.record("chat")
        chat = Chat(wanted, _seed(wanted.seed), engine, self.history, record)
        if not wanted.stream:
            return Answer(chat.answer, record, self.bounds.send_seconds)
        return Answer(chat.stream, record, self.bounds.send_seconds, broken_event)

    async def speech(self, request: Request) -> Response:
        """Answer a caption."""
        wanted = parse(SpeechRequest, await _json(request))
        engine = self.holder.get()
        check_model(wanted.model, engine)
        record = self.metrics.record("speech")

        async def work(sender: Sender) -> None:
            await speak(wanted, _seed(wanted.seed), engine, record, sender)

        return Answer(work, record, self.bounds.send_seconds)

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        engine = self.holder.get()
        return JSONResponse(
            {
                "model": engine.model_name,
                "sample_rate": engine.sample_rate,
                "frame_rate": engine.frame_rate,
                "max_seconds": engine.max_seconds,
                "chats": engine.chats,
                "defaults": to_dict(engine.defaults),
            }
        )

    async def stats(self, request: Request) -> Response:
        """Count what is going on."""
        counts = await self.holder.get().stats()
        kept = {"kept_answers": len(self.history), "kept_bytes": self.history.num_bytes}
        return JSONResponse({"live_requests": self.metrics.num_live, **kept, **counts})


def mount(
    app: FastAPI, holder: Holder, bounds: Bounds, registry: CollectorRegistry = REGISTRY
) -> None:
    """Add our paths and middleware to vLLM's app, before it has started.

    Args:
        app: with vLLM's own paths.
        holder: where the engine will be.
        bounds: on requests.
        registry: the one that /metrics shows.
    """
    server = Server(holder, bounds, Metrics(bounds.max_live_requests, registry), find_core(app))
    app.add_middleware(Guard, bounds=bounds)
    for path, handler in {CHAT: server.chat, "/v1/audio/speech": server.speech}.items():
        app.add_api_route(path, _refusing(handler), methods=["POST"], response_model=None)
    for path, handler in {
        "/v1/audio/model": server.model,
        "/v1/audio/stats": server.stats,
    }.items():
        app.add_api_route(path, _refusing(handler), methods=["GET"], response_model=None)
    for path, (content, kind) in page_files().items():
        page = partial(_page, content, kind)
        app.add_api_route(path, page, methods=["GET"], include_in_schema=False)


def find_core(app: FastAPI) -> ASGIApp | None:
    """Find vLLM's own handler of chats, which keeps those without audio."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.path == CHAT and "POST" in (route.methods or ()):
            return route.app
    return None


def page_files() -> dict[str, tuple[bytes, str]]:
    """Read the files of the page: content and type by path, the page itself at /."""
    files = {}
    for file in resources.files("mllm_audio_vllm.server").iterdir():
        kind = KINDS.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "page.html" else f"/{file.name}"
            files[path] = file.read_bytes(), kind
    return files


def check_model(name: str | None, engine: Engine) -> None:
    """Refuse the name of another model.

    Raises:
        RequestError: naming both.
    """
    if name not in (None, "", engine.model_name):
        line = f"the model {shown(name)} is not served here; ask for {engine.model_name!r}"
        raise RequestError(404, line, "model")


async def _json(request: Request) -> Any:
    """Read the body, which the guard has found to be JSON if there is any."""
    body = await request.body()
    if not body:
        raise RequestError(400, "the body is empty, expected a JSON object")
    return await load_json(body)


def _asks_for_audio(values: Any) -> bool:
    modalities = values.get("modalities") if isinstance(values, dict) else None
    return "audio" in modalities if isinstance(modalities, (list, str)) else False


def _seed(given: int | None) -> int:
    """Take the seed that was given, or a new one."""
    return secrets.randbelow(2**31) if given is None else given


def _refusing(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """Let a handler answer with the errors that it raises."""

    async def handle(request: Request) -> Response:
        try:
            response: Response = await handler(request)
        except RequestError as refusal:
            return refusal.response()
        return response

    return handle


async def _page(content: bytes, kind: str) -> Response:
    return Response(content, headers={**HEADERS, "Content-Type": kind})


class _Forward(Response):
    """The answer of another handler to a request whose body was read."""

    def __init__(self, app: ASGIApp, body: bytes) -> None:
        self.app, self.sent = app, False
        self.message: Message = {"type": "http.request", "body": body, "more_body": False}
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request over."""

        async def again() -> Message:
            if self.sent:
                return await receive()
            self.sent = True
            return self.message

        await self.app(scope, again, send)
