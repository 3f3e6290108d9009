"""What no client may send, on any path of vLLM's or ours, and what browsers are kept from."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import openai
import pytest
from http_client import TEXT, ask
from http_server import KEY, serve

from mllm_audio_vllm.server.bounds import Bounds
from mllm_audio_vllm.server.guard import OWN_FIELDS

MIB = 2**20
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def server():
    with serve(bounds=Bounds(max_body_mib=1, read_seconds=0.7)) as running:
        yield running


@pytest.mark.parametrize("field", sorted(OWN_FIELDS))
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/audio/speech", "/v1/responses"]
)
def test_fields_that_the_server_sets_are_refused_everywhere(server, field, path):
    asked = len(server.core.requests)
    response = httpx.post(server.url + path, json={**HELLO, "prompt": "x", field: "mine"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == f"{field} is set by the server alone; leave it out"
    assert error["param"] == field
    assert len(server.core.requests) == asked


def test_every_field_of_vllms_requests_that_carries_such_options_is_known():
    """A new version of vLLM may add one: this fails then, for somebody to look."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import (
        BatchChatCompletionRequest,
        ChatCompletionRequest,
    )
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    kinds = [ChatCompletionRequest, BatchChatCompletionRequest, CompletionRequest]
    kinds += [ResponsesRequest, AnthropicMessagesRequest]
    names = {name for kind in kinds for name in kind.model_fields}
    words = ("xargs", "salt", "request_id", "session", "transfer", "priority", "embeds", "extra_")
    assert {n for n in names if any(word in n for word in words)} <= OWN_FIELDS


def test_fields_within_content_are_the_clients_own(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"priority": 1}}}]
    response = httpx.post(f"{server.url}/v1/chat/completions", json={**HELLO, "tools": tools})
    assert response.status_code == 200


def test_headers_that_name_or_route_requests_are_dropped(server):
    names = ("X-Request-Id", "X-Session-ID", "X-data-parallel-rank", "X-Vllm-Priority")
    headers = {**dict.fromkeys(names, "5"), "X-Other": "5"}
    httpx.post(f"{server.url}/v1/chat/completions", json=HELLO, headers=headers)
    _, seen = server.core.requests[-1]
    assert seen["x-other"] == "5"
    assert not {name.lower() for name in names} & seen.keys()


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("size", [MIB + 1, 3 * MIB // 2])
def test_large_body_is_refused(server, is_chunked, size):
    body = json.dumps({**HELLO, "user": ""}).encode()
    body += b" " * (size - len(body))
    content = (body[i : i + 65536] for i in range(0, size, 65536)) if is_chunked else body
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["message"].startswith("the request is larger than 1 MiB")


def test_body_of_exactly_the_limit_is_taken(server):
    body = json.dumps(HELLO).encode()
    body += b" " * (MIB - len(body))
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 200


def raw(server, text, wait=5.0):
    """Send bytes, and return the status line that comes back."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(text.encode())
        return connection.recv(4096).decode().partition("\r\n")[0]


def head(server, *more, path="/v1/chat/completions"):
    host = server.url.removeprefix("http://")
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *more]
    return "\r\n".join(lines) + "\r\n\r\n"


def test_body_that_says_it_is_huge_is_not_waited_for(server):
    assert "413" in raw(server, head(server, f"Content-Length: {10**15}"))


def test_body_without_end_is_not_read_for_ever(server):
    piece = f"{65536:x}\r\n{' ' * 65536}\r\n"
    assert "413" in raw(server, head(server, "Transfer-Encoding: chunked") + piece * 33)


def test_body_that_does_not_come_is_not_waited_for_long(server):
    began = time.monotonic()
    assert "408" in raw(server, head(server, "Content-Length: 100") + "{")
    assert time.monotonic() - began >= 0.7


@pytest.mark.parametrize(
    "path", ["/invocations", "/inference/v1/generate", "/ping", "/scale_elastic_ep", "/"]
)
def test_paths_beyond_the_api_key_are_not_served(path):
    with serve(key=KEY) as server:
        headers = {"Authorization": f"Bearer {KEY}"}
        response = httpx.post(server.url + path, json=HELLO, headers=headers)
        assert response.status_code == 404
        assert response.json()["error"]["message"] == (
            f"POST {path} is not served; use a path under /v1"
        )


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_body_of_another_type_is_refused(server, kind):
    """A page of another site can send these without being asked for leave."""
    headers = {"Content-Type": kind}
    body = json.dumps(HELLO)
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 415


def test_methods_that_nothing_has_are_refused(server):
    assert httpx.delete(f"{server.url}/v1/models").status_code == 405


@pytest.mark.parametrize("path", ["/", "/health", "/v1/audio/model", "/v1/models", "/metrics"])
def test_names_of_other_domains_are_not_served(server, path):
    response = httpx.get(server.url + path, headers={"Host": "evil.example:8000"})
    assert response.status_code == 421
    assert "'evil.example:8000' is not served" in response.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8000", "127.8.8.8"])
def test_names_of_this_machine_are_served(server, host):
    assert httpx.get(f"{server.url}/v1/audio/model", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["", "[", "a b", "127.0.0.1.evil.example", "[::1"])
def test_names_that_are_none_are_not_served(server, host):
    line = raw(server, f"GET /v1/audio/model HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert "421" in line or "400" in line


def test_pages_of_other_sites_are_refused(server):
    url = f"{server.url}/v1/audio/speech"
    for origin in ("https://evil.example", "null", f"{server.url}0"):
        response = httpx.post(url, json={"input": "rain"}, headers={"Origin": origin})
        assert response.status_code == 403
    assert httpx.post(url, json={"input": "rain"}, headers={"Origin": server.url}).is_success


def test_other_addresses_have_other_names():
    with serve(bounds=Bounds(is_local=False)) as server:
        headers = {"Host": "models.example", "Origin": "https://models.example"}
        assert httpx.get(f"{server.url}/v1/audio/model", headers=headers).status_code == 200


def test_api_key_is_asked_for_on_our_paths():
    with serve(key=KEY) as server:
        for path in ("chat/completions", "audio/speech"):
            assert httpx.post(f"{server.url}/v1/{path}", json=HELLO).status_code == 401
        for path in ("audio/model", "audio/stats"):
            assert httpx.get(f"{server.url}/v1/{path}").status_code == 401
            headers = {"Authorization": f"Bearer {KEY}"}
            assert httpx.get(f"{server.url}/v1/{path}", headers=headers).status_code == 200
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong")
        with wrong, pytest.raises(openai.AuthenticationError):
            ask(wrong)
        with server.client() as client:
            assert ask(client).choices[0].message.content == TEXT
        assert httpx.get(server.url).status_code == 200  # the page has a field for it
        assert not [r for r in server.engine.requests if "caption" in r]


def test_page_is_served_with_a_strict_policy(server):
    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = ["/page.css", "/page.js", "/player.js", "/wire.js"]
    kinds = ["text/css", *["text/javascript"] * 3]
    files = [httpx.get(server.url + name) for name in names]
    assert [file.headers["content-type"].partition(";")[0] for file in files] == kinds
    for response in (page, *files):
        assert response.is_success
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    for name in ("/guard.py", "/../guard.py", "/page.html"):
        assert httpx.get(server.url + name).status_code == 404


def test_websockets_are_refused(server):
    more = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    more.append("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    text = head(server, *more, path="/v1/realtime").replace("POST", "GET")
    assert "403" in raw(server, text) or "404" in raw(server, text)


def test_clients_that_leave_within_their_request_are_forgotten(server):
    port = int(server.url.rpartition(":")[2])
    threads = threading.active_count()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall((head(server, "Content-Length: 100") + "{").encode())
    assert httpx.get(f"{server.url}/v1/audio/stats").json()["live_requests"] == 0
    assert threading.active_count() <= threads
