"""The paper's own models, prompted by embeddings of captions, as they are served."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from checkpoints import write_prompted
from test_server import decibels, serving

from mllm_audio.generation.voice import Voice

CAPTIONS = ["a dog barks", "rain falls on the roof", "music", "a dog barks while rain falls"]


def encoders():
    """Load the tiny CLAP and T5 of the main package's tests."""
    path = Path(__file__).parents[3] / "tests" / "tiny_encoders.py"
    spec = importlib.util.spec_from_file_location("tiny_encoders", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["words", "clap_t5"])
def served(request, tmp_path_factory):
    """Serve a model prompted by words, and one by 78 embeddings as the paper's."""
    place = tmp_path_factory.mktemp("prompted")
    spec = request.param
    if spec == "clap_t5":
        tiny = encoders()
        clap, t5 = tiny.write_clap(place / "clap"), tiny.write_t5(place / "t5")
        spec = f"clap_t5:clap={clap},t5={t5}"
    folder = write_prompted(place / "paper", spec)
    with serving(folder, folder.parent / "log.txt") as url:
        yield url, Voice.load(folder)


def say(url, caption, seed):
    body = {"model": "paper", "input": caption, "voice": "own", "response_format": "pcm"}
    answer = httpx.post(f"{url}/v1/audio/speech", json={**body, "seed": seed}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "<i2").astype(np.float32) / 32767


def test_captions_side_by_side_are_what_generate_makes(served):
    """Guidance is annealed to the very last latent of clips that have no end of their own."""
    url, voice = served
    found = [None] * len(CAPTIONS)

    def ask(n):
        found[n] = say(url, CAPTIONS[n], 30 + n)

    threads = [threading.Thread(target=ask, args=[n]) for n in range(len(CAPTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = voice.generate(CAPTIONS, seed=30)
    for sound, clip in zip(found, wanted, strict=True):
        assert len(sound) == 4 * 2560  # 16 latents
        assert decibels(sound, clip.waveform.numpy()) < -40
    assert not np.allclose(found[0], found[2])


def test_it_does_not_chat(served):
    url, _ = served
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "paper", "messages": messages, "modalities": ["text", "audio"]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "captions alone" in answer.json()["error"]["message"]
    assert not httpx.get(f"{url}/v1/audio/model").json()["chats"]
