"""Requests with audio as the stock client of OpenAI makes them, and what comes back."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import soundfile
from fake_engine import RATE, tone

TEXT = "One t\u00f8ne:  and "
BOTH = [*tone(0, 5).numpy(), *tone(1, 3).numpy()]


def ask(client, text="sounds", **options):
    given = {"model": "fake", "modalities": ["text", "audio"]}
    given["messages"] = [{"role": "user", "content": text}]
    return client.chat.completions.create(**{**given, **options})


def samples_of(data, audio_format="wav"):
    raw = base64.b64decode(data)
    if audio_format == "pcm16":
        return np.frombuffer(raw, "<i2")
    samples, rate = soundfile.read(io.BytesIO(raw), dtype="int16")
    assert rate == RATE
    return samples


def audio_of(chunk):
    """Return delta.audio as it was sent, empty where there was none."""
    return chunk.choices[0].delta.model_dump(exclude_unset=True).get("audio", {})


def len_kept(server):
    return httpx.get(f"{server.url}/v1/audio/stats").json()["kept_answers"]


def expected(samples):
    clipped = np.clip(np.asarray(samples, dtype=np.float32), -1, 1)
    return np.round(clipped * 32767).astype(np.int16)
