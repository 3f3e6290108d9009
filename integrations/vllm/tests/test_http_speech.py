"""Sounds of captions over HTTP, and what the server tells of itself."""

from __future__ import annotations

import base64
import io
import re

import httpx
import numpy as np
import openai
import pytest
import soundfile
from fake_engine import RATE, FakeEngine, tone
from http_client import ask, expected
from http_server import serve
from prometheus_client import REGISTRY

from mllm_audio.generation.decode import GenerationConfig

SOUND = expected(tone(0, 5))


@pytest.fixture(scope="module")
def server():
    """Serve with metrics in the registry that vLLM's own /metrics shows."""
    with serve(registry=REGISTRY) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made


def say(client, caption="rain", **options):
    given = {"model": "fake", "voice": "any", "response_format": "wav", "input": caption}
    return client.audio.speech.create(**{**given, **options})


@pytest.mark.parametrize("seconds", [len(SOUND) / RATE, None])
@pytest.mark.parametrize("audio_format", ["wav", "flac", "pcm"])
def test_sound_is_that_of_the_engine(client, server, audio_format, seconds):
    """Any reader reads it, whether its length was known before it was made or not."""
    own = {"guidance_weight": 1, "num_inference_steps": 8, "seconds": seconds}
    options = {"extra_body": {"seed": 3, "mllm_audio": own}}
    response = say(client, response_format=audio_format, **options)
    assert response.response.headers["content-type"] == f"audio/{audio_format}"
    assert response.response.headers["x-sample-rate"] == str(RATE)
    data = response.content
    if audio_format == "wav":
        size = b"\xff" * 4 if seconds is None else (2 * len(SOUND)).to_bytes(4, "little")
        assert data[40:44] == size
    if audio_format == "pcm":
        samples = np.frombuffer(data, "<i2")
    else:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
        assert rate == RATE
    assert np.array_equal(samples, SOUND)
    asked = server.engine.requests[-1]
    assert (asked["caption"], asked["seed"]) == ("rain", 3)
    expected_config = GenerationConfig(guidance_weight=1, num_inference_steps=8, seconds=seconds)
    assert asked["config"] == expected_config


@pytest.mark.parametrize("audio_format", ["wav", "pcm"])
def test_sound_is_sent_while_it_is_made(server, audio_format):
    server.engine.gate.clear()
    body = {"input": "gate", "response_format": audio_format}
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json=body) as response:
        pieces = response.iter_raw()
        first = next(pieces)
        assert len(first) >= 2000  # the engine waits for us: all of its first chunk is here
        server.engine.gate.set()
        data = first + b"".join(pieces)
    assert data[-2 * len(SOUND) :] == SOUND.tobytes()


@pytest.mark.parametrize("name", ["silent", "no samples"])
def test_caption_without_sound_is_an_error(client, name):
    with pytest.raises(openai.InternalServerError, match="no sound of this caption; try another"):
        say(client, name)


def test_captions_and_models_that_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="leaves no room"):
        say(client, "refuse")
    with pytest.raises(openai.InternalServerError, match="the engine failed"):
        say(client, "break")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; ask for 'fake'"):
        say(client, model="gpt")


def test_model_of_captions_alone_does_not_chat():
    with serve(FakeEngine(chats=False)) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="captions alone; use /v1/audio/speech"):
            ask(client)
        assert say(client, response_format="pcm").content == SOUND.tobytes()
        assert not httpx.get(f"{server.url}/v1/audio/model").json()["chats"]


def test_model_says_what_it_is(server):
    said = httpx.get(f"{server.url}/v1/audio/model").json()
    assert said.pop("defaults")["num_inference_steps"] == 8
    expected_values = {"model": "fake", "sample_rate": RATE, "frame_rate": 25.0}
    assert said == {**expected_values, "max_seconds": 10.0, "chats": True}


def test_stats_count_requests_and_states(server):
    def stats():
        return httpx.get(f"{server.url}/v1/audio/stats").json()

    assert (stats()["live_requests"], stats()["live_states"]) == (0, 0)
    with httpx.stream("POST", f"{server.url}/v1/audio/speech", json={"input": "endless"}):
        assert (stats()["live_requests"], stats()["live_states"]) == (1, 1)
    server.wait_until(lambda: stats()["live_requests"] == 0)


def metric(server, name, **labels):
    """Read a value of vLLM's /metrics; 0 where there is none yet."""
    text = httpx.get(f"{server.url}/metrics").text
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    for line in text.splitlines():
        if re.match(rf"{name}[ {{]", line) and all(w in line for w in wanted):
            return float(line.rpartition(" ")[2])
    return 0.0


def test_metrics_count_audio_among_vllms_own(client, server):
    names = ("ok", "400", "500", "disconnect")

    def read():
        outcomes = [
            metric(server, "mllm_audio_requests_total", endpoint="speech", outcome=outcome)
            for outcome in names
        ]
        return np.array(
            [
                *outcomes,
                metric(server, "mllm_audio_seconds_total", endpoint="speech"),
                metric(server, "mllm_audio_tokens_total", kind="audio"),
                metric(server, "mllm_audio_time_to_first_audio_seconds_count", endpoint="speech"),
                metric(server, "mllm_audio_real_time_factor_count", endpoint="speech"),
            ]
        )

    before = read()
    say(client)
    say(client)
    for name in ("refuse", "break"):
        with pytest.raises(openai.APIStatusError):
            say(client, name)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/audio/speech", json={"input": "wait"}, timeout=0.3)
    server.wait_until(lambda: read()[3] > before[3])
    assert (read() - before).tolist() == [2, 1, 1, 1, 2 * len(SOUND) / RATE, 10, 2, 2]
    assert metric(server, "mllm_audio_live_requests") == 0
    assert "process_cpu_seconds_total" in httpx.get(f"{server.url}/metrics").text


def test_time_to_first_audio_is_before_the_end(client, server):
    def read():
        names = ("time_to_first_audio_seconds_sum", "real_time_factor_sum")
        return np.array([metric(server, f"mllm_audio_{n}", endpoint="speech") for n in names])

    before = read()
    say(client, "slow")
    first, factor = read() - before
    last = factor * len(SOUND) / RATE
    assert first >= 0.05
    assert last - first >= 0.19  # four chunks later


def test_recording_of_the_answer_can_be_sent_back(client, server):
    """A WAV stream is a file that this server reads itself."""
    data = base64.b64encode(say(client).content).decode()
    sound = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    ask(client, messages=[{"role": "user", "content": [sound]}])
    [part] = server.engine.requests[-1]["messages"][0].parts
    assert np.array_equal(expected(part.audio.waveform * 32768 / 32767), SOUND)
