"""Latents on their way from the workers to the process that makes them sound.

Pushed, not asked for: what a request drew before it ended is never lost, and a reader that is slow
holds nothing up. A message is a JSON list of (request key, position) and the latents, float32.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import zmq
from torch import Tensor

LINGER_MS = 2000  # that a worker at its end waits for what is under way


def new_address() -> str:
    """Make an address in a folder that this user alone can enter."""
    return f"ipc://{tempfile.mkdtemp(prefix='mllm-audio-')}/latents"


class Sender:
    """The end of a worker."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.PUSH)
        self.socket.setsockopt(
            zmq.SNDHWM, 0
        )  # never blocks: what is under way is bounded by max_tokens
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.socket.connect(address)

    def send(self, names: Sequence[tuple[str, int]], latents: Tensor) -> None:
        """Send (R, D) latents, of each the request's key and the position that it stands at."""
        data = latents.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        self.socket.send_multipart([json.dumps(names).encode(), data])


def read(message: Sequence[bytes]) -> Iterator[tuple[str, int, Tensor]]:
    """Take a message apart: key, position, (D,) latent."""
    names = json.loads(message[0])
    latents = torch.frombuffer(bytearray(message[1]), dtype=torch.float32).view(len(names), -1)
    for (key, position), latent in zip(names, latents, strict=True):
        yield key, position, latent


def remove(address: str) -> None:
    """Remove the folder of an address."""
    folder = Path(address.removeprefix("ipc://")).parent
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()
