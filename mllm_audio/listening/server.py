"""Serve the page of a listening test over HTTP, for people whom the network lets in.

There are no passwords: by default only this machine is served. Browsers of other sites are kept out
by the Host and Origin headers (DNS rebinding, cross-site requests) and by the content type.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib import resources
from ipaddress import ip_address
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

from mllm_audio.listening.panel import Panel

MAX_BODY = 4096  # bytes of a request
TIMEOUT = 30.0  # seconds that a client may keep a thread waiting
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


class ListeningServer(ThreadingTCPServer):
    """Answers for one panel at one address."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64  # a browser opens several connections at once

    def __init__(self, panel: Panel, host: str, port: int, *, allow_remote: bool = False) -> None:
        """Bind to the address; `serve_forever` then answers.

        Args:
            panel: that raters meet.
            host: address or name to listen on.
            port: to listen on; 0 takes a free one.
            allow_remote: let `host` be one that other machines reach.

        Raises:
            ValueError: if the address is taken, is not this machine's, or reaches beyond it.
        """
        if not (allow_remote or is_loopback(host)):
            raise ValueError(
                f"--host {host} lets other machines in, and there is no password; type "
                "--allow-remote if they may, or --host 127.0.0.1"
            )
        self.panel, self.allow_remote = panel, allow_remote
        own = (host, socket.gethostname()) if allow_remote else ()
        self.names = {"localhost", *map(str.lower, own)}
        folder = resources.files("mllm_audio.listening")
        self.pages = {
            path: (folder.joinpath(file).read_bytes(), kind) for path, (file, kind) in PAGES.items()
        }
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"cannot listen on {host} port {port} ({reason}); type another --port, or 0 for "
                "any that is free"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self.server_address[:2]
        host = socket.gethostname() if host in ("0.0.0.0", "::") else str(host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def knows(self, host: str) -> bool:
        """Tell whether a Host header names this server, and not a domain that points here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _is_address(name, loopback=not self.allow_remote)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless the browser just went away."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Tell whether a host is reached from this machine alone."""
    return host == "localhost" or _is_address(host, loopback=True)


def _is_address(host: str, *, loopback: bool) -> bool:
    """Tell whether a host is an IP address, and of the loopback if that is asked for."""
    try:
        return ip_address(host).is_loopback or not loopback
    except ValueError:
        return False


class _RequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ListeningServer
    timeout = TIMEOUT
    server_version, sys_version = "mllm-audio", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Callable[[], tuple[bytes, str]]) -> None:
        """Send what `respond` gives, or the error; what it says about files stays on this side."""
        status = HTTPStatus.OK
        try:
            self._check_origin()
            body, kind = respond()
        except _RequestError as refusal:
            status, body, kind = refusal.status, *_json({"error": str(refusal)})
        except (ValueError, OSError, sqlite3.Error) as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            message = "the server has a problem; tell who runs the test"
            status, body, kind = HTTPStatus.INTERNAL_SERVER_ERROR, *_json({"error": message})
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _check_origin(self) -> None:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.server.knows(host):
            raise _RequestError(HTTPStatus.MISDIRECTED_REQUEST, "this host name is not served here")
        if origin is not None and urlsplit(origin).netloc != host:
            raise _RequestError(HTTPStatus.FORBIDDEN, "requests of other sites are refused")

    def _get(self) -> tuple[bytes, str]:
        if self.path in self.server.pages:
            return self.server.pages[self.path]
        if self.path.startswith("/clip/"):
            sound = self.server.panel.sound(self.path.removeprefix("/clip/"))
            if sound is not None:
                return sound, "audio/wav"
        raise _RequestError(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> tuple[bytes, str]:
        if self.path not in ("/next", "/rate"):
            raise _RequestError(HTTPStatus.NOT_FOUND, "there is nothing here")
        request = self._body()
        panel = self.server.panel
        try:
            if self.path == "/rate":
                panel.rate(
                    _field(request, "rater", str),
                    _field(request, "clip", str),
                    _field(request, "question", str),
                    _field(request, "score", int),
                    _field(request, "plays", int),
                )
                return _json({"stored": True})
            return _json(panel.next_clip(_field(request, "rater", str)))
        except ValueError as error:
            raise _RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error

    def _body(self) -> dict[str, Any]:
        """Read a JSON object of at most `MAX_BODY` bytes."""
        if self.headers.get_content_type() != "application/json":
            raise _RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _RequestError(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 6 or int(length) > MAX_BODY:
            raise _RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected {MAX_BODY} bytes at most"
            )
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _RequestError(HTTPStatus.BAD_REQUEST, "expected JSON") from error
        if not isinstance(request, dict):
            raise _RequestError(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return request

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request: the page tells its rater."""


def _field(request: dict[str, Any], name: str, kind: type) -> Any:
    """Take a value of exactly one type out of a request."""
    value = request.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} is {type(value).__name__}, expected {kind.__name__}")
    return value


def _json(values: dict[str, Any]) -> tuple[bytes, str]:
    return json.dumps(values).encode(), "application/json"
