"""An engine without a model: the caption, or the last text of the user, names what comes."""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import contextmanager

import torch

from mllm_audio.data.messages import TextPart
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.types import AudioChunk, TextDelta
from mllm_audio_vllm.server.base import Finished

RATE = 16_000
CHUNK = 1_000  # samples; one latent stands for them
HERTZ = (440.0, 880.0)  # of the spans


def tone(span: int, num_chunks: int) -> torch.Tensor:
    """Return the samples of a span: too loud, so that clipping shows."""
    time = torch.arange(num_chunks * CHUNK) / RATE
    return 1.1 * torch.sin(2 * math.pi * HERTZ[span % 2] * time)


class EngineError(Exception):
    """What an engine raises when it breaks."""


class FakeEngine:
    """Speaks `Engine`, and counts the iterators that are open."""

    model_name = "fake"
    sample_rate = RATE
    frame_rate = 25.0
    max_seconds = 10.0
    defaults = GenerationConfig(guidance_weight=2.0, num_inference_steps=8)

    def __init__(self, chats: bool = True) -> None:
        self.chats = chats
        self.open, self.most_open, self.num_closed = 0, 0, 0
        self.requests = []  # what was asked for: dicts
        self.num_chunks = 0  # made in all
        self.gate = threading.Event()  # "gate" makes its second chunk once it is set

    @contextmanager
    def counted(self):
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            yield
        finally:
            self.open -= 1
            self.num_closed += 1

    async def reply(self, messages, config, text, **options):
        with self.counted():
            self.requests.append({"messages": messages, "config": config, "text": text, **options})
            said = [p.text for m in messages for p in m.parts if isinstance(p, TextPart)]
            async for event in self.events(said[-1] if said else "", chat=True):
                yield event

    async def speak(self, caption, config, *, seed):
        with self.counted():
            self.requests.append({"caption": caption, "config": config, "seed": seed})
            async for event in self.events(caption, chat=False):
                yield event

    async def events(self, name, *, chat):
        """Make what `name` asks for: two spans within text, or one alone."""
        if name == "refuse":
            raise ValueError("the conversation leaves\nno room; shorten it")
        if name == "break":
            raise EngineError("secret path /root/x")
        if name == "wait":
            await asyncio.sleep(3600)
        if chat and name != "no text":
            yield TextDelta("One ")
            yield TextDelta("t\u00f8ne: ")
        if name == "break later":
            raise EngineError("secret path /root/x")
        audio = 0
        if name != "silent":
            num_chunks = {"endless": 10**9, "flood": 10**9}.get(name, 5)
            pause = {"endless": 0.005, "slow": 0.05}.get(name, 0)
            async for chunk in self.span(
                0, num_chunks, pause, name == "no samples", name == "gate"
            ):
                audio += len(chunk.latents)
                yield chunk
        if name == "break after":
            raise EngineError("secret path /root/x")
        if chat and name not in ("no text", "silent", "no samples"):
            yield TextDelta(" and ")
            async for chunk in self.span(1, 3, 0, False):
                audio += len(chunk.latents)
                yield chunk
        if name != "unfinished":
            reason = "length" if name == "silent" else "stop"
            yield Finished(reason=reason, prompt_tokens=7, text_tokens=4, audio_tokens=audio)

    async def span(self, number, num_chunks, pause, is_empty, is_gated=False):
        """Make chunks, and the one without samples that ends a span."""
        whole = tone(number, min(num_chunks, 400))
        for index in range(num_chunks):
            await asyncio.sleep(pause)
            while index == 1 and is_gated and not self.gate.is_set():
                await asyncio.sleep(0.005)
            self.num_chunks += 1
            begin = index % 400 * CHUNK
            samples = whole[begin : begin + CHUNK] if not is_empty else whole[:0]
            yield AudioChunk(samples, RATE, number, torch.full((1, 4), float(index)), last=False)
        yield AudioChunk(whole[:0], RATE, number, torch.zeros(0, 4), last=True)

    async def stats(self):
        return {"live_states": self.open}
