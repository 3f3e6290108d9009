"""Latents as they come from the workers, sorted by request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import zmq
import zmq.asyncio
from torch import Tensor

from mllm_audio_vllm import frames

PATIENCE = 60.0  # seconds that a latent may come after the id of its place


class Inbox:
    """The latents of one request that are not fetched yet, by position."""

    def __init__(self) -> None:
        self.latents: dict[int, Tensor] = {}
        self.arrived = asyncio.Event()

    def put(self, position: int, latent: Tensor) -> None:
        """Take a latent in; one that was drawn again takes the place of the first."""
        self.latents[position] = latent
        self.arrived.set()

    async def take(self, position: int) -> Tensor:
        """Wait for the (D,) latent that stands at `position`, and give it away.

        Raises:
            RuntimeError: if it does not come.
        """
        while position not in self.latents:
            self.arrived.clear()
            try:
                await asyncio.wait_for(self.arrived.wait(), PATIENCE)
            except TimeoutError as error:
                raise RuntimeError(
                    f"the latent at position {position} did not come from the workers in "
                    f"{PATIENCE:g} s; restart the server"
                ) from error
        return self.latents.pop(position)


class Receiver:
    """Binds the address that workers push to, and fills the inboxes of requests."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.inboxes: dict[str, Inbox] = {}
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.PULL)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.bind(address)
        self.task = asyncio.create_task(self._run())

    @contextmanager
    def inbox(self, key: str) -> Iterator[Inbox]:
        """Open the inbox of a request; latents that come when it is closed are dropped."""
        self.inboxes[key] = Inbox()
        try:
            yield self.inboxes[key]
        finally:
            del self.inboxes[key]

    async def _run(self) -> None:
        while True:
            for key, position, latent in frames.read(await self.socket.recv_multipart()):
                inbox = self.inboxes.get(key)
                if inbox is not None:
                    inbox.put(position, latent)

    def close(self) -> None:
        """Stop, and remove the address."""
        self.task.cancel()
        self.socket.close(linger=0)
        self.context.term()
        frames.remove(self.address)
