"""Engines and checkpoints that tests share."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
import zmq

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from checkpoints import LIMIT, Reference, write_voice

from mllm_audio_vllm import frames
from mllm_audio_vllm.checks import ADDRESS


@pytest.fixture(scope="session")
def voices(tmp_path_factory):
    """Write the voice of a family and head once."""
    folder = tmp_path_factory.mktemp("voices")
    made = {}

    def voice(family="llama", head="flow", *, audible=False):
        name = f"{family}-{head}" + "-audible" * audible
        if name not in made:
            path = write_voice(folder / name, family, head, audible=audible)
            made[name] = path, Reference(path)
        return made[name]

    return voice


class Latents:
    """What workers pushed: latents by request key and position, every one of them."""

    def __init__(self, address: str) -> None:
        self.found = defaultdict(lambda: defaultdict(list))
        self.socket = zmq.Context.instance().socket(zmq.PULL)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.bind(address)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            for key, position, latent in frames.read(self.socket.recv_multipart()):
                self.found[key][position].append(latent)

    def of(self, key: str, count: int) -> dict[int, list[torch.Tensor]]:
        """Wait for `count` latents of a request, and a little for more than there should be."""
        end = time.monotonic() + 10
        while sum(map(len, self.found[key].values())) < count and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.02)
        return self.found[key]


@pytest.fixture(scope="session")
def pushed():
    """Receive what the workers of every engine push."""
    os.environ[ADDRESS] = frames.new_address()
    yield Latents(os.environ[ADDRESS])
    frames.remove(os.environ[ADDRESS])


@contextmanager
def engine(folder, **options):
    """Start vLLM's engine on a checkpoint."""
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": LIMIT,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": False,
        **options,
    }
    llm = LLM(model=str(folder), **settings)
    try:
        yield llm
    finally:
        # In its own time: killed after vLLM's 5 s, its processes may miss each other.
        llm.llm_engine.engine_core.shutdown(timeout=60)
