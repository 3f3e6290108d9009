"""Middleware before all of vLLM's paths and ours: what no client may send."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mllm_audio.listening.server import is_loopback
from mllm_audio_vllm.server.bounds import Bounds
from mllm_audio_vllm.server.errors import RequestError

# Fields of vLLM's requests that name requests, divide its prefix cache, order or route requests,
# reach into its transfers, or carry options and tensors past the checks of ours.
OWN_FIELDS = frozenset(
    {
        *("request_id", "session_id", "cache_salt", "priority", "extra_args", "sampling_params"),
        *("vllm_xargs", "kv_transfer_params", "ec_transfer_params", "prompt_embeds"),
        *("data_parallel_rank", "lora_request"),
    }
)
OWN_HEADERS = frozenset(
    {b"x-request-id", b"x-session-id", b"x-data-parallel-rank", b"x-vllm-priority"}
)
# vLLM asks for an API key under /v1 alone, but also generates under /invocations and /inference.
POST_PATHS = ("/v1/", "/tokenize", "/detokenize")
METHODS = ("GET", "HEAD", "OPTIONS", "POST")
LARGE = 2**20  # bytes of JSON that are read in a thread


class Guard:
    """ASGI middleware that refuses, or bounds, requests before anything else reads them."""

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self.app, self.bounds = app, bounds
        self.max_body = bounds.max_body_mib * 2**20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body read, or answer it with an error."""
        if scope["type"] == "websocket":  # nothing of ours speaks it
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            if self.bounds.is_local:
                check_site(headers)
            check_path(scope)
            if scope["method"] == "POST":
                receive = await self._checked(headers, receive)
        except RequestError as refusal:
            await refusal.response()(scope, receive, send)
            return
        except ConnectionError:  # it went before its request was complete
            return
        own = [(name, value) for name, value in scope["headers"] if name not in OWN_HEADERS]
        await self.app({**scope, "headers": own}, receive, send)

    async def _checked(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body, check it, and return what gives it out again.

        Raises:
            RequestError: if it is too large, too slow, or not what a client may send.
            ConnectionError: if the client goes.
        """
        try:
            async with asyncio.timeout(self.bounds.read_seconds):
                body = await self._body(headers, receive)
        except TimeoutError as error:
            seconds = f"{self.bounds.read_seconds:g} s"
            raise RequestError(408, f"the request took more than {seconds} to come") from error
        if body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestError(415, f"found content type {kind!r}, expected application/json")
            check_fields(await load_json(body))
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read a body of at most `max_body` bytes.

        One up to twice as large is read, and dropped: a client that sends does not hear a refusal.
        """
        declared = headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        is_large, received = size > self.max_body, 0
        pieces: list[bytes] = []
        more = size <= 2 * self.max_body
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            pieces.append(message.get("body", b""))
            received += len(pieces[-1])
            is_large = is_large or received > self.max_body
            if is_large:
                pieces.clear()
            more = message.get("more_body", False) and received <= 2 * self.max_body
        if is_large:
            limit = f"{self.bounds.max_body_mib} MiB"
            raise RequestError(413, f"the request is larger than {limit}; send shorter recordings")
        return b"".join(pieces)


def check_site(headers: Headers) -> None:
    """Refuse names of other domains that point here, and requests of other sites' pages.

    Raises:
        RequestError: saying which.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise RequestError(
            421, f"the host {host[:80]!r} is not served on this address; use localhost"
        )
    if origin is not None and urlsplit(origin).netloc != host:
        raise RequestError(403, "requests of other sites are refused")


def check_path(scope: Scope) -> None:
    """Refuse methods and paths that neither OpenAI's clients nor our page use.

    Raises:
        RequestError: naming it.
    """
    method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
    if method not in METHODS:
        raise RequestError(405, f"found {method[:20]}, expected one of {', '.join(METHODS)}")
    if method == "POST" and not path.startswith(POST_PATHS):
        raise RequestError(404, f"POST {path[:80]} is not served; use a path under /v1")


def check_fields(values: Any) -> None:
    """Refuse fields that the server sets itself.

    Raises:
        RequestError: naming the first, or if it is no JSON object.
    """
    if not isinstance(values, dict):
        raise RequestError(400, "the body is no JSON object")
    for key in values:
        if key in OWN_FIELDS:
            raise RequestError(400, f"{key} is set by the server alone; leave it out", key)


async def load_json(body: bytes) -> Any:
    """Read JSON, a large one away from the event loop.

    Raises:
        RequestError: if it is none.
    """
    try:
        return await asyncio.to_thread(json.loads, body) if len(body) > LARGE else json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not JSON") from error
