"""`mllm-audio serve` on the real engine, as the stock OpenAI client meets it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from checkpoints import DEFAULTS, exact

from mllm_audio.data.messages import AudioPart, Message, TextPart
from mllm_audio.generation.text import TextConfig
from mllm_audio.generation.voice import Voice
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.types import Clip

ASK = [{"role": "user", "content": "rain falls on the roof"}]
GREEDY = TextConfig(do_sample=False, max_new_tokens=10_000)
KEY = "sesame"
MODEL = "llama-flow-audible"  # the name of its folder


@contextmanager
def serving(folder: Path, log: Path, *options: str):
    """Start `mllm-audio serve`, wait until it answers, and end it as Ctrl-C does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mllm_audio", "serve", str(folder)),
        *("--port", str(port), "--max-num-seqs", "8", "--cpu-kv-gib", "1", *options),
    ]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    environment.pop("MLLM_AUDIO_LATENTS", None)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def served(voices, tmp_path_factory):
    folder, reference = voices(audible=True)
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(folder, log, "--api-key", KEY) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        yield url, client, reference


@pytest.fixture(scope="module")
def voice(voices):
    """The project's own generation on the same folder."""
    _, reference = voices(audible=True)
    return Voice(reference.model, reference.tokenizer, load_tokenizer("dct"), DEFAULTS)


def chat(client, messages=ASK, **options):
    extra = {"mllm_audio": {"seconds": 0.64, **options.pop("audio_options", {})}}
    given = {"model": MODEL, "modalities": ["text", "audio"], "temperature": 0, "seed": 3}
    given |= {"max_tokens": 60, "messages": messages, "extra_body": extra}
    return client.chat.completions.create(**{**given, **options})


def pcm(data: str) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
    assert rate == 16000
    return samples


def decibels(found: np.ndarray, wanted: np.ndarray) -> float:
    """Give the error relative to the signal, as loud as 16 bits can be."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    wanted = np.clip(wanted, -1, 1)
    error = np.sqrt(np.mean((found - wanted) ** 2))
    return 20 * np.log10(max(error, 1e-9) / np.sqrt(np.mean(wanted**2)))


def stats(url: str) -> dict:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.get(f"{url}/v1/audio/stats", headers=headers).json()


def test_a_reply_is_what_generate_makes(served, voice):
    _, client, _ = served
    answer = chat(client, max_tokens=None, audio_options={"max_audio_spans": 2})
    message = answer.choices[0].message.model_dump()
    text = replace(GREEDY, max_audio_spans=2)
    events = list(voice.generate_interleaved(ASK, exact(0.64), text, seed=3))
    sounds = [event for event in events if hasattr(event, "waveform")]
    assert len(sounds) == 2
    assert message["content"] == "".join(e.text for e in events if hasattr(e, "text"))
    kinds = [part["type"] for part in message["content_parts"]]
    wanted = ["audio" if hasattr(event, "waveform") else "text" for event in events]
    assert kinds == [
        kind for n, kind in enumerate(wanted) if kind == "audio" or wanted[n - 1 : n] != ["text"]
    ]
    heard = [pcm(part["data"]) for part in message["content_parts"] if part["type"] == "audio"]
    for found, sound in zip(heard, sounds, strict=True):
        assert decibels(found, sound.waveform.numpy()) < -40
    whole = pcm(message["audio"]["data"])
    assert np.allclose(whole, np.concatenate(heard), atol=1e-4)
    assert answer.usage.completion_tokens_details.audio_tokens == 32
    assert answer.choices[0].finish_reason in ("stop", "length")


def streamed(client, **options):
    """Collect a streamed reply: text, samples, and (kind, time) of each delta."""
    text, samples, order, ident = "", [], [], None
    stream = chat(client, stream=True, audio={"format": "pcm16", "voice": "own"}, **options)
    for chunk in stream:
        delta = chunk.choices[0].delta.model_dump() if chunk.choices else {}
        if delta.get("content"):
            text += delta["content"]
            order.append(("text", time.monotonic()))
        audio = delta.get("audio") or {}
        ident = audio.get("id", ident)
        if audio.get("data"):
            samples.append(np.frombuffer(base64.b64decode(audio["data"]), "<i2"))
            order.append(("audio", time.monotonic()))
    joined = np.concatenate(samples) if samples else np.zeros(0, "<i2")
    return text, joined.astype(np.float32) / 32767, order, ident


def test_a_streamed_reply_is_the_same_and_sounds_before_it_is_complete(served):
    _, client, _ = served
    # So many steps that what else a machine does is short beside a span.
    own = {"seconds": 2.56, "max_audio_spans": 1, "num_inference_steps": 100}
    whole = chat(client, audio_options=own, max_tokens=90)
    begin = time.monotonic()
    text, samples, order, _ = streamed(client, audio_options=own, max_tokens=90)
    took = time.monotonic() - begin
    message = whole.choices[0].message
    assert text == message.content
    assert decibels(samples, pcm(message.audio.data)) < -40
    assert len(samples) == round(2.56 * 16000)
    times = [at for kind, at in order if kind == "audio"]
    # Sent at the end, all of it would come at once.
    assert len(times) > 4 and times[-1] - times[0] > 0.5 * took


def test_eight_streams_at_once_are_as_each_alone(served):
    _, client, _ = served
    alone = [
        streamed(client, seed=n, audio_options={"guidance_scale": 1 + n % 2}) for n in range(8)
    ]
    together = [None] * 8

    def ask(n):
        together[n] = streamed(client, seed=n, audio_options={"guidance_scale": 1 + n % 2})

    threads = [threading.Thread(target=ask, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, other in zip(alone, together, strict=True):
        assert first[0] == other[0]
        assert not len(first[1]) or decibels(other[1], first[1]) < -40


def test_a_conversation_goes_on_from_an_earlier_answer(served, voice):
    """The answer is referred to by its id; text and latents of it are those of generation."""
    _, client, _ = served
    options = {"max_tokens": 40, "audio_options": {"max_audio_spans": 1}}
    first = chat(client, **options)
    ident = first.choices[0].message.audio.id
    text = replace(GREEDY, max_audio_spans=1, max_new_tokens=40 - 17)  # beside a span and its end
    said = voice.reply(ASK, exact(0.64), text, seed=3)
    assert any(isinstance(part, AudioPart) for part in said.parts)
    user = Message("user", (TextPart(ASK[0]["content"]),))
    follow = Message("user", (TextPart("music plays"),))
    wanted = list(voice.generate_interleaved([user, said, follow], exact(0.64), text, seed=3))
    messages = [
        *ASK,
        {"role": "assistant", "audio": {"id": ident}},
        {"role": "user", "content": "music plays"},
    ]
    answer = chat(client, messages, **options)
    spoken = "".join(e.text for e in wanted if hasattr(e, "text"))
    assert answer.choices[0].message.content == spoken
    with pytest.raises(openai.NotFoundError, match="audio"):
        chat(client, [*ASK, {"role": "assistant", "audio": {"id": "audio_no"}}, *ASK])


def test_sound_of_the_user_is_heard(served, voice):
    _, client, _ = served
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(12800) / 16000).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format="WAV", subtype="FLOAT")
    data = base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "text", "text": "music"},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
    ]
    answer = chat(client, [{"role": "user", "content": parts}], max_tokens=None)
    message = Message("user", (TextPart("music"), AudioPart(Clip(torch.from_numpy(wave), 16000))))
    wanted = list(voice.generate_interleaved([message], exact(0.64), GREEDY, seed=3))
    assert answer.choices[0].message.content == "".join(
        e.text for e in wanted if hasattr(e, "text")
    )


@pytest.mark.parametrize("kind", ["wav", "flac", "pcm"])
def test_the_sound_of_a_caption_is_what_generate_makes(served, voice, kind):
    _, client, _ = served
    with client.audio.speech.with_streaming_response.create(
        model=MODEL,
        voice="own",
        input="a dog barks",
        response_format=kind,
        extra_body={"seed": 9, "mllm_audio": {"seconds": 1.28}},
    ) as response:
        data = response.read()
    if kind == "pcm":
        found = np.frombuffer(data, "<i2").astype(np.float32) / 32767
    else:
        found, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    (clip,) = voice.generate(["a dog barks"], exact(1.28), seed=9)
    assert decibels(found, clip.waveform.numpy()) < -40


def test_text_alone_is_left_to_vllm(served):
    _, client, reference = served
    answer = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=30)
    row = reference.row(ASK[0]["content"])
    expected = reference.reply(row, DEFAULTS, 0, 30, spans=0)
    text = reference.tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert answer.choices[0].message.content == text
    assert answer.object == "chat.completion" and answer.usage.completion_tokens == 30


def test_a_client_that_goes_leaves_nothing_behind(served):
    url, client, _ = served
    long = {"seconds": 2.56}
    stream = chat(
        client,
        stream=True,
        max_tokens=400,
        audio={"format": "pcm16", "voice": "x"},
        audio_options=long,
    )
    for chunk in stream:
        delta = chunk.choices[0].delta.model_dump() if chunk.choices else {}
        if (delta.get("audio") or {}).get("data"):
            break
    stream.close()
    with pytest.raises(httpx.ReadTimeout):  # and one that asks for all at once
        body = {"model": MODEL, "messages": ASK, "modalities": ["text", "audio"]}
        body |= {"max_tokens": 400, "temperature": 0, "mllm_audio": {"num_inference_steps": 200}}
        headers = {"Authorization": f"Bearer {KEY}"}
        httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=0.5)
    end = time.monotonic() + 20
    while (counts := stats(url))["live_states"] or counts["live_requests"]:
        assert time.monotonic() < end, counts
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"n": 2}, "n"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"vllm_xargs": {"mllm_audio": "x"}}, "vllm_xargs"),
        ({"mllm_audio": {"seconds": 60}}, "at most 2.56 s"),
        ({"mllm_audio": {"sampler": "ddpm"}}, "cannot use"),
        ({"mllm_audio": {"num_inference_steps": 5000}}, "this server allows 250"),
        ({"mllm_audio": {"final_inference_steps": 251}}, "this server allows 250"),
        ({"mllm_audio": {"guidance": 3}}, "guidance_scale"),
        ({"temperature": 50}, "temperature"),
    ],
)
def test_what_is_refused_is_one_line(served, body, line):
    url, _, _ = served
    base = {"model": MODEL, "messages": ASK, "modalities": ["text", "audio"]}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json={**base, **body}, headers=headers)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert line in message and "\n" not in message.strip()


def test_the_key_is_asked_for_and_metrics_count(served):
    url, client, _ = served
    chat(client)
    for path in ("/v1/audio/model", "/v1/audio/stats", "/v1/models"):
        assert httpx.get(f"{url}{path}").status_code == 401
    text = httpx.get(f"{url}/metrics").text
    seconds = re.search(r"^mllm_audio_\w*seconds_total\S* ([\d.]+)", text, re.MULTILINE)
    assert seconds and float(seconds[1]) > 0
    assert "vllm:" in text and "time_to_first_audio" in text


def test_the_load_generator_measures_it(served, tmp_path):
    url, _, _ = served
    command = [sys.executable, "-m", "mllm_audio", "bench", "serve", url, "--api-key", KEY]
    command += ["--streams", "1,8", "--rates", "2", "--seconds", "3", "--json", str(tmp_path / "r")]
    command += ["--clip-seconds", "0.64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    levels = json.loads((tmp_path / "r").read_text())["levels"]
    assert len(levels) == 3
    assert all(not sum(level["errors"].values()) for level in levels), levels


def test_the_page_talks_to_it(served):
    from browser import launched_browser

    url, _, _ = served
    with launched_browser() as browser:
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.fill("#key", KEY)
        page.fill("#seed", "3")
        page.fill("#seconds", "0.64")
        page.wait_for_selector("#send:enabled", timeout=30_000)
        page.fill("#prompt", ASK[0]["content"])
        page.click("#send")
        page.wait_for_selector("article[data-state=done]", timeout=60_000)
        assert page.locator("article canvas").count() >= 1
        assert not errors
