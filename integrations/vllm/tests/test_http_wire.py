"""What clients get wrong: each mistake is refused in one line that says what to change."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
import soundfile
from http_server import serve

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running
        assert not running.engine.requests  # not one of these reached the engine


def refusal(server, path, body, status=400):
    headers = {"Content-Type": "application/json"}
    url, content = f"{server.url}/v1/{path}", json.dumps(body)  # as escapes, half pairs too
    response = httpx.post(url, content=content, headers=headers)
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert (error["code"], "\n" in error["message"]) == (status, False)
    assert len(error["message"]) < 800
    return error


def part(data, audio_format="wav"):
    return {"type": "input_audio", "input_audio": {"data": data, "format": audio_format}}


def recording(seconds, sample_rate=8000, channels=1, audio_format="WAV"):
    file = io.BytesIO()
    samples = np.zeros((round(seconds * sample_rate), channels), dtype=np.int16)
    soundfile.write(file, samples, sample_rate, format=audio_format)
    return base64.b64encode(file.getvalue()).decode()


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def assistant(**message):
    return [*HELLO, {"role": "assistant", **message}]


CHATS = [
    ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?", None),
    ({"model": "gpt"}, None, None),
    ({"messages": None}, "messages is missing", "messages"),
    ({"messages": []}, "messages is a list: list should have at least 1 item", "messages"),
    ({"messages": HELLO * 257}, "list should have at most 256 items", "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0: content is missing", "messages.0"),
    ({"messages": [{"content": "x"}]}, "messages.0.role is missing", "messages.0.role"),
    ({"messages": user() * 1 + [{"role": "user", "content": 5}]}, "found 5, expected text", None),
    ({"messages": user({"type": "image"})}, "'image' found using 'type'", None),
    ({"messages": user({"type": "text", "txt": "x"})}, "field 'txt'; did you mean 'text'?", None),
    ({"messages": user(*[{"type": "text", "text": "x"}] * 65)}, "at most 64 items", None),
    ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "found 200001 characters", None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair", None),
    ({"messages": user(*[part("AAAA")] * 33)}, "found 33 sounds, expected 32 at most", None),
    ({"messages": user(part("AAAA", "mp3"))}, "content.0.input_audio.format is 'mp3'", None),
    ({"messages": user(part(""))}, "content.0.input_audio.data is ''", None),
    ({"messages": user(part("no base64!"))}, "data is not base64", None),
    ({"messages": user(part("AAAA"))}, "messages.0.content.0.input_audio: the wav data is", None),
    ({"messages": user(part(recording(1), "flac"))}, "found WAV data, expected flac", None),
    ({"messages": user(part(recording(10.1)))}, "lasts 10.10 s, expected at most 10 s", None),
    ({"messages": user(part(recording(1, channels=3)))}, "found 3 channels at 8000 Hz", None),
    (
        {"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]},
        "audio.id is in a message of 'user', expected the assistant's",
        None,
    ),
    ({"messages": assistant(content="x", audio={"id": "a"})}, "leave content out", None),
    (
        {"messages": assistant(audio={"id": "a", "data": "AAAA"})},
        "messages.1.audio: unknown field 'data'; known: id",
        None,
    ),
    ({"modalities": ["audio", "video"]}, "modalities.1 is 'video'", None),
    ({"audio": {"format": "mp3"}}, "audio.format is 'mp3'", "audio.format"),
    ({"audio": {"voice": 3}}, "audio.voice is 3", None),
    ({"stream": True, "audio": {"format": "wav"}}, "audio.format is 'wav', streams hold", None),
    ({"stream_options": {"include_usage": True}}, "without stream; add stream=true", None),
    ({"n": 2}, "n is 2, expected 1 with audio; send more requests", None),
    ({"tools": [{}]}, "tools is not supported with audio; leave it out", None),
    ({"logprobs": True}, "logprobs is not supported with audio", None),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported", None),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported", None),
    ({"seed": 1.5}, "seed is 1.5: input should be a valid integer", "seed"),
    ({"seed": 2**63}, "seed is 9223372036854775808", "seed"),
    ({"temperature": "hot"}, "temperature is 'hot'", None),
    ({"temperature": 101}, "text.temperature=101.0, expected (0, 100]", None),
    ({"top_p": 0}, "text.top_p=0.0, expected (0, 1]", None),
    ({"top_k": -1}, "text.top_k=-1, expected [0, 1e+07]", None),
    ({"max_tokens": 0}, "max_tokens is 0", None),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "are both given; leave one out", None),
    ({"stop": 5}, "stop is 5: input should be a valid list", "stop"),
    ({"\ud800": 5}, "unknown field '\\ud800'", None),
    ({"stop": [""]}, "text.stop_strings=('',), expected", None),
    ({"stop": ["x"] * 17}, "at most 16 items", None),
    ({"mllm_audio": {"guidance": 3}}, "did you mean 'guidance_scale'?", "mllm_audio"),
    ({"mllm_audio": {"guidance_scale": 2000}}, "generation.guidance_scale=2000.0, expected", None),
    ({"mllm_audio": {"guidance_scale": 2, "guidance_weight": 1}}, "are both given", None),
    ({"mllm_audio": {"guidance_schedule": "up"}}, "unknown guidance schedule 'up'", None),
    ({"mllm_audio": {"num_inference_steps": 0}}, "num_inference_steps=0, expected", None),
    ({"mllm_audio": {"seconds": -1}}, "generation.seconds=-1.0, expected (0, 86400]", None),
    ({"mllm_audio": {"max_audio_spans": -1}}, "text.max_audio_spans=-1", None),
    ({"mllm_audio": {"repetition_penalty": 0}}, "text.repetition_penalty=0", None),
    ({"mllm_audio": {"as_request": True}}, "unknown field 'as_request'", None),
    (
        {"mllm_audio": {"continue_final_message": True}},
        "the last message is of 'user', expected the assistant's",
        "mllm_audio.continue_final_message",
    ),
]


@pytest.mark.parametrize(("change", "line", "param"), CHATS)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_conversation_that_is_wrong_is_refused(server, change, line, param, is_streamed):
    body = {"model": "fake", "modalities": ["text", "audio"], "messages": HELLO, **change}
    if is_streamed and "stream_options" not in change:
        body.setdefault("stream", True)
    if "model" in change:
        error = refusal(server, "chat/completions", body, 404)
        assert error["message"] == "the model 'gpt' is not served here; ask for 'fake'"
        return
    error = refusal(server, "chat/completions", body)
    assert line in error["message"], error["message"]
    assert param is None or error["param"] == param


def test_unknown_answer_is_not_found(server):
    body = {"modalities": ["audio"], "messages": assistant(audio={"id": "audio_x"})}
    error = refusal(server, "chat/completions", body, 404)
    assert error["message"].startswith("no answer is kept under the audio.id of message 2: it is")
    assert error["param"] == "messages.1.audio.id"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"input": ""}, "input is '': string should have at least 1 character"),
        ({"input": "x" * 4097}, "string should have at most 4096 characters"),
        ({"input": None}, "input is missing"),
        ({"input": 5}, "input is 5: input should be a valid string"),
        ({"response_format": "mp3"}, "response_format is 'mp3'"),
        ({"stream_format": "sse"}, "stream_format is 'sse'"),
        ({"speed": 2}, "speed: found 2, expected 1; ask for mllm_audio.seconds"),
        ({"instructions": "softly"}, "instructions is not supported with audio"),
        ({"sed": 1}, "unknown field 'sed'; did you mean 'seed'?"),
        ({"mllm_audio": {"max_audio_spans": 1}}, "unknown field 'max_audio_spans'"),
        ({"mllm_audio": {"sampler": "x" * 257}}, "at most 256 characters"),
    ],
)
def test_caption_that_is_wrong_is_refused(server, change, line):
    error = refusal(server, "audio/speech", {"model": "fake", "input": "rain", **change})
    assert line in error["message"], error["message"]


@pytest.mark.parametrize("path", ["chat/completions", "audio/speech"])
@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[1]", "no JSON object"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_body_that_is_no_object_is_refused(server, path, body, line):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/{path}", content=body, headers=headers)
    assert response.status_code == 400
    assert line in response.json()["error"]["message"]


def test_numbers_that_are_none_are_refused(server):
    body = b'{"input": "rain", "mllm_audio": {"temperature": NaN}}'
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/audio/speech", content=body, headers=headers)
    assert response.status_code == 400
    assert "mllm_audio.temperature is nan" in response.json()["error"]["message"]
