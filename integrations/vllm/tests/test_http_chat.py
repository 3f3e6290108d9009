"""Conversations over HTTP, as the stock client of OpenAI sees them."""

from __future__ import annotations

import base64
import io
import json
import time

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from fake_engine import CHUNK, RATE, tone
from http_client import BOTH, TEXT, ask, audio_of, expected, len_kept, samples_of
from http_server import serve

from mllm_audio.data.messages import AudioPart, TextPart
from mllm_audio.types import Clip
from mllm_audio_vllm.server.bounds import Bounds


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made


@pytest.mark.parametrize("audio_format", ["wav", "flac", "pcm16"])
def test_whole_answer_holds_text_and_sound_in_order(client, audio_format):
    answer = ask(client, audio={"format": audio_format, "voice": "any"})
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert choice.message.content == choice.message.audio.transcript == TEXT
    assert choice.message.audio.sample_rate == RATE
    assert 3500 < choice.message.audio.expires_at - time.time() <= 3600
    assert np.array_equal(samples_of(choice.message.audio.data, audio_format), expected(BOTH))
    first, sound, between, last = choice.message.content_parts
    assert (first["text"], between["text"]) == ("One t\u00f8ne: ", " and ")
    assert (sound["span"], sound["seconds"], last["span"]) == (0, 5 * CHUNK / RATE, 1)
    assert np.array_equal(samples_of(sound["data"], audio_format), expected(tone(0, 5)))
    assert np.array_equal(samples_of(last["data"], audio_format), expected(tone(1, 3)))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 12, 19)
    assert usage.completion_tokens_details.audio_tokens == 8
    assert usage.completion_tokens_details.text_tokens == 4


def test_stream_holds_what_the_whole_answer_does(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, audio={"format": "pcm16"}, **options))
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant"}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    parts = [delta["content_parts"][0] for delta in deltas if "content_parts" in delta]
    assert [part["index"] for part in parts] == [0, 0, *[1] * 6, 2, *[3] * 4]
    assert [part.get("last") for part in parts if part["index"] == 1] == [False] * 5 + [True]
    audio = [delta["audio"] for delta in deltas if "audio" in delta]
    assert [sorted(a) for a in audio[4:7]] == [
        ["data", "id", "sample_rate"],
        ["id", "sample_rate"],  # the chunk that ends the span holds no samples
        ["data", "id", "sample_rate"],
    ]
    pcm = b"".join(base64.b64decode(a["data"]) for a in audio if "data" in a)
    assert np.array_equal(np.frombuffer(pcm, "<i2"), expected(BOTH))
    assert len({a["id"] for a in audio}) == 1
    assert audio[-1]["transcript"] == TEXT
    assert abs(audio[-1]["expires_at"] - time.time() - 3600) < 10
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 19)


def test_stream_comes_while_it_is_made(client, server):
    server.engine.gate.clear()
    stream = ask(client, "gate", stream=True)
    assert any("data" in audio_of(chunk) for chunk in stream)  # the engine waits for us
    server.engine.gate.set()
    assert sum("data" in audio_of(chunk) for chunk in stream) == 7


@pytest.mark.parametrize("name", ["silent", "no samples"])
def test_reply_without_sound_has_no_audio(client, server, name):
    kept = len_kept(server)
    answer = ask(client, name).choices[0]
    assert answer.message.audio is None
    assert answer.finish_reason == ("length" if name == "silent" else "stop")
    assert [part["type"] for part in answer.message.content_parts] == ["text"]
    sounds = [audio_of(chunk) for chunk in ask(client, name, stream=True)]
    assert not any("data" in sound or "expires_at" in sound for sound in sounds)
    assert any(sounds) == (name == "no samples")
    assert len_kept(server) == kept


def test_options_reach_the_engine(client, server):
    own = {"guidance_scale": 1.5, "num_inference_steps": 3, "seconds": 2, "max_audio_spans": 1}
    own |= {"temperature": 0.5, "end_threshold": None, "repetition_penalty": 1.2}
    ask(
        client,
        seed=5,
        temperature=0,
        top_p=0.9,
        stop=["a", "b"],
        max_completion_tokens=50,
        n=1,
        user="someone",
        extra_body={"mllm_audio": own, "top_k": 3},
    )
    asked = server.engine.requests[-1]
    config, text = asked["config"], asked["text"]
    # The model's default is a weight, which a scale takes the place of.
    assert (config.guidance_scale, config.guidance_weight) == (1.5, None)
    assert (config.num_inference_steps, config.seconds, config.temperature) == (3, 2, 0.5)
    assert (asked["seed"], asked["max_tokens"]) == (5, 50)
    assert not asked["continue_final_message"]
    assert (text.do_sample, text.top_p, text.top_k, text.stop_strings) == (
        False,
        0.9,
        3,
        ("a", "b"),
    )
    assert (text.max_audio_spans, text.repetition_penalty, text.max_new_tokens) == (1, 1.2, 50)


def test_without_options_the_model_has_its_defaults_and_every_request_a_seed_of_its_own(
    client, server
):
    for _ in range(2):
        ask(client)
    first, second = server.engine.requests[-2:]
    assert first["config"] == server.engine.defaults
    assert (first["text"].temperature, first["max_tokens"]) == (1.0, None)
    assert first["seed"] != second["seed"]


def test_recordings_are_heard_at_the_rate_of_the_model(client, server):
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(0, 4).numpy() * 0.5] * 2, 1), RATE // 2, format="FLAC")
    data = base64.b64encode(file.getvalue()).decode()
    sound = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    ask(client, [{"type": "text", "text": "what is "}, sound, {"type": "text", "text": "?"}])
    [message] = server.engine.requests[-1]["messages"]
    before, heard, after = message.parts
    assert (before, after) == (TextPart("what is "), TextPart("?"))
    assert isinstance(heard.audio, Clip)
    assert (heard.audio.sample_rate, len(heard.audio.waveform)) == (RATE, 8 * CHUNK)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_audio_id_stands_for_the_whole_earlier_answer(client, server, is_streamed):
    if is_streamed:
        sounds = [audio_of(chunk) for chunk in ask(client, stream=True)]
        audio_id = next(sound["id"] for sound in sounds if sound)
    else:
        audio_id = ask(client).choices[0].message.audio.id
    messages = [
        {"role": "user", "content": "sounds"},
        {"role": "assistant", "audio": {"id": audio_id}},
        {"role": "user", "content": "again"},
    ]
    ask(client, messages=messages)
    answer = server.engine.requests[-1]["messages"][1]
    first, sound, between, last = answer.parts
    assert answer.role == "assistant"
    assert (first, between) == (TextPart("One t\u00f8ne: "), TextPart(" and "))
    assert torch.equal(sound.audio, torch.arange(5.0)[:, None].expand(5, 4))
    assert torch.equal(last.audio, torch.arange(3.0)[:, None].expand(3, 4))


def test_continued_answer_is_kept_as_one_message(client, server):
    own = {"mllm_audio": {"continue_final_message": True}}
    turns = [{"role": "user", "content": "no text"}]
    audio_id = ask(client, messages=turns).choices[0].message.audio.id
    turns.append({"role": "assistant", "audio": {"id": audio_id}})
    longer = ask(client, messages=turns, extra_body=own).choices[0].message.audio.id
    assert server.engine.requests[-1]["continue_final_message"]
    ask(client, messages=[turns[0], {"role": "assistant", "audio": {"id": longer}}, turns[0]])
    [sound] = server.engine.requests[-1]["messages"][1].parts
    assert sound.audio[:, 0].tolist() == [0, 1, 2, 3, 4] * 2


def test_continued_recording_is_kept_as_one_recording(client, server):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(2 * CHUNK), RATE, format="WAV", subtype="PCM_16")
    sound = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
    turns = [
        {"role": "user", "content": "no text"},
        {"role": "assistant", "content": [{"type": "input_audio", "input_audio": sound}]},
    ]
    turns[1]["content"].append({"type": "text", "text": ""})  # nothing: the recording is the end
    own = {"mllm_audio": {"continue_final_message": True}}
    longer = ask(client, messages=turns, extra_body=own).choices[0].message.audio.id
    ask(client, messages=[turns[0], {"role": "assistant", "audio": {"id": longer}}, turns[0]])
    [part] = server.engine.requests[-1]["messages"][1].parts
    assert isinstance(part, AudioPart)
    silence, new = part.audio.waveform[: 2 * CHUNK], part.audio.waveform[2 * CHUNK :]
    assert not silence.any()
    assert torch.equal(new, tone(0, 5))


def test_expired_answer_is_not_found(server):
    with serve(bounds=Bounds(history_seconds=0.2)) as short, short.client() as client:
        audio_id = ask(client).choices[0].message.audio.id
        time.sleep(0.3)
        messages = [{"role": "assistant", "audio": {"id": audio_id}}]
        with pytest.raises(openai.NotFoundError, match=r"audio\.id of message 1: it is unknown"):
            ask(client, messages=messages)


@pytest.mark.parametrize("modalities", [None, ["text"]])
def test_requests_without_audio_are_vllms_own(client, server, modalities):
    given = len(server.engine.requests)
    options = {} if modalities is None else {"modalities": modalities}
    answer = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        top_logprobs=2,
        logprobs=True,
        **options,
    )
    assert answer.choices[0].message.content == "core"
    request, _ = server.core.requests[-1]
    assert (request.top_logprobs, request.messages[0]["content"]) == (2, "hi")
    stream = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert [chunk.object for chunk in stream] == ["chat.completion.chunk"]
    assert len(server.engine.requests) == given


def test_vllms_own_errors_stay_as_they_are(server):
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "fake", "n": "x"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("Bad Request", 400)
    assert "messages" in json.dumps(error)


def test_null_is_as_if_left_out_but_where_it_means_something(client, server):
    nothing = dict.fromkeys(("audio", "stop", "n", "top_p", "seed", "tools", "stream_options"))
    own = {"guidance_scale": None, "seconds": None, "guidance_weight": None}
    ask(client, extra_body={**nothing, "mllm_audio": own})
    config = server.engine.requests[-1]["config"]
    assert config.guidance_scale == server.engine.defaults.guidance_scale
    assert (config.guidance_weight, server.engine.defaults.guidance_weight) == (None, 2.0)
