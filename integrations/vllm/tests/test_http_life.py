"""Requests that end otherwise: engines that break, clients that leave or do not read."""

from __future__ import annotations

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from http_client import BOTH, TEXT, ask, audio_of, expected
from http_server import serve

from mllm_audio_vllm.server.bounds import Bounds


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made


@pytest.mark.parametrize("is_streamed", [False, True])
def test_request_that_the_engine_refuses_is_a_bad_request(client, is_streamed):
    with pytest.raises(openai.BadRequestError, match="leaves no room; shorten it") as caught:
        ask(client, "refuse", stream=is_streamed)
    assert caught.value.body["code"] == 400


@pytest.mark.parametrize("is_streamed", [False, True])
def test_engine_that_breaks_is_an_error_without_its_details(client, is_streamed):
    with pytest.raises(openai.InternalServerError, match="the engine failed") as caught:
        ask(client, "break", stream=is_streamed)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["break later", "unfinished"])
def test_engine_that_breaks_within_a_stream_is_told_there(client, server, name):
    seen = []
    with pytest.raises(openai.APIError, match="the engine failed on this request"):
        seen.extend(ask(client, name, stream=True))
    assert seen[1].choices[0].delta.content == "One "
    with pytest.raises(openai.InternalServerError):
        ask(client, name)
    server.wait_until_idle()


def test_client_that_leaves_a_stream_cancels_it_at_once_and_nothing_is_kept(server):
    with server.client() as client:
        stream = ask(client, "endless", stream=True)
        audio_id = next(sound["id"] for sound in map(audio_of, stream) if sound)
        stream.close()
    server.wait_until_idle()
    made = server.engine.num_chunks
    time.sleep(0.1)
    assert server.engine.num_chunks == made
    with server.client() as client, pytest.raises(openai.NotFoundError, match="was cut short"):
        ask(client, messages=[{"role": "assistant", "audio": {"id": audio_id}}])


@pytest.mark.parametrize(
    ("name", "is_streamed"), [("wait", True), ("wait", False), ("endless", False)]
)
def test_client_that_leaves_while_it_waits_cancels_its_request(server, name, is_streamed):
    with server.client(timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        ask(client, name, stream=is_streamed)
    server.wait_until_idle()


def test_client_that_does_not_read_holds_up_nobody_and_is_let_go():
    with serve(bounds=Bounds(send_seconds=2.0)) as server:
        body = {"model": "fake", "modalities": ["audio"], "stream": True}
        body["messages"] = [{"role": "user", "content": "flood"}]
        url = f"{server.url}/v1/chat/completions"
        with httpx.Client() as slow, slow.stream("POST", url, json=body, timeout=60) as response:
            assert response.status_code == 200
            server.wait_until(lambda: server.engine.num_chunks > 10)
            with server.client() as client:
                assert ask(client).choices[0].message.content == TEXT
                assert server.engine.open == 1
            made = -1
            while server.engine.num_chunks != made:  # until what it may be sent ahead is full
                made = server.engine.num_chunks
                time.sleep(0.5)
            server.wait_until(lambda: server.engine.open == 0, 5.0)
        assert server.engine.num_chunks < 20_000


def test_eight_streams_at_once_hold_their_own_sound(server):
    server.engine.most_open = 0
    barrier = threading.Barrier(8)

    def one(_):
        with server.client() as client:
            barrier.wait()
            sounds = [audio_of(chunk) for chunk in ask(client, "slow", stream=True)]
        return b"".join(base64.b64decode(sound.get("data", "")) for sound in sounds)

    with ThreadPoolExecutor(8) as pool:
        sounds = list(pool.map(one, range(8)))
    assert server.engine.most_open == 8
    assert all(np.array_equal(np.frombuffer(s, "<i2"), expected(BOTH)) for s in sounds)


@pytest.mark.parametrize("audio_format", ["wav", "flac", "pcm"])
def test_client_that_leaves_a_sound_cancels_it_at_once(server, audio_format):
    body = {"input": "endless", "response_format": audio_format, "mllm_audio": {"seconds": 9}}
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json=body) as response:
        assert response.status_code == 200
        next(response.iter_bytes(100))
    server.wait_until_idle()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/audio/speech", json={"input": "wait"}, timeout=0.3)
    server.wait_until_idle()


@pytest.mark.parametrize("name", ["break after", "unfinished"])
def test_sound_that_breaks_does_not_look_whole(server, name):
    body = {"input": name, "response_format": "pcm"}
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{server.url}/v1/audio/speech", json=body)
    server.wait_until_idle()


def test_more_requests_than_the_server_answers_at_once_are_turned_away():
    with serve(bounds=Bounds(max_live_requests=1)) as server, server.client() as client:
        stream = ask(client, "endless", stream=True)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="1 requests with audio are") as caught:
            ask(client)
        assert caught.value.status_code == 503
        stream.close()
        server.wait_until_idle()
        assert ask(client).choices[0].message.content == TEXT


def test_requests_before_the_engine_is_there_are_turned_away():
    with serve(is_loaded=False) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError, match="still loading") as caught:
            ask(client)
        assert caught.value.status_code == 503
        assert httpx.get(f"{server.url}/v1/audio/model").status_code == 503
        server.holder.engine = server.engine
        assert ask(client).choices[0].message.content == TEXT
