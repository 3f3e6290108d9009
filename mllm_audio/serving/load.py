"""Load on a server: so many streams at all times, or requests that arrive at random."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from mllm_audio.config import check_range
from mllm_audio.serving.client import MAX_RATE, MODES, Ask, Outcome, send

CAPTIONS = (
    "a low beep",
    "two high beeps then a rising sweep",
    "a dog barks twice",
    "rain falls on a roof",
    "a car passes from left to right",
    "someone knocks on a wooden door",
    "birds sing in the morning",
    "a glass breaks",
)
CONNECT_SECONDS = 10.0
ERROR_PAUSE = 0.2  # seconds before a stream tries again after an error
NOT_SENT = "not sent, too many in flight"
MAX_INFO_BYTES = 2**20  # of what the server tells about its model


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What load, for how long."""

    url: str = "http://127.0.0.1:8000"
    streams: tuple[int, ...] = (1, 8, 32)  # a level for each: so many requests at all times
    rates: tuple[float, ...] = ()  # a level for each: requests a second, Poisson arrivals
    seconds: float = 30.0  # in which a level sends; requests sent by then are waited for
    mode: str = "speech"  # in MODES
    captions: tuple[str, ...] = CAPTIONS  # in turn
    options: dict[str, Any] = field(default_factory=dict)  # the field `mllm_audio` of requests
    seed: int = 0  # of the arrivals; request i has seed + i
    warmup: int = 1  # requests before the first level, not measured
    timeout: float = 120.0  # seconds for one answer
    max_in_flight: int = 256  # arrivals beyond are counted as errors, not sent
    max_requests: int = 10_000  # of a level
    max_bytes: int = 64 * 2**20  # of one answer

    def __post_init__(self) -> None:
        """Check ranges and names."""
        if self.mode not in MODES:
            raise ValueError(f"found mode {self.mode!r}, expected one of {', '.join(MODES)}")
        if not self.captions:
            raise ValueError("found no caption, expected at least one")
        check_range("bench", self, 0, 86_400, "seconds", "timeout", open_low=True)
        check_range("bench", self, 1, 10_000, "max_in_flight")
        check_range("bench", self, 1, 10_000_000, "max_requests")
        check_range("bench", self, 0, 1000, "warmup")
        for streams in self.streams:
            if not 1 <= streams <= self.max_in_flight:
                raise ValueError(f"found {streams} streams, expected 1 to {self.max_in_flight}")
        for rate in self.rates:
            if not 0 < rate <= 10_000:
                raise ValueError(f"found rate {rate}, expected requests a second, up to 10000")


@dataclass
class Level:
    """The requests of one level, while they are made."""

    name: str
    window: float = 0.0  # seconds in which it sent
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass
class Run:
    """What was measured so far, whatever ends it."""

    server: dict[str, Any] = field(default_factory=dict)  # what it says of itself
    levels: list[Level] = field(default_factory=list)


def check_url(url: str, allow_remote: bool) -> str:
    """Refuse an address that is none, or that loads another machine without being told to.

    Raises:
        ValueError: saying what to type instead.
    """
    from mllm_audio.listening.server import is_loopback  # loads torch

    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ValueError(f"found URL {url!r}, expected one such as http://127.0.0.1:8000")
    if not (allow_remote or is_loopback(host)):
        raise ValueError(f"{host} is not this machine; type --allow-remote if you may load it")
    return url.rstrip("/")


class Load:
    """The requests of a run: one after the other in captions and seeds, on one client."""

    def __init__(self, config: LoadConfig, client: httpx.AsyncClient, ask: Ask) -> None:
        self._config, self._client, self._ask = config, client, ask
        captions, seeds = itertools.cycle(config.captions), itertools.count(config.seed)
        self._next = zip(captions, seeds, strict=False)

    async def warm_up(self) -> None:
        """Send the requests that are not measured, one after the other."""
        for _ in range(self._config.warmup):
            await self._send(Level("warm-up"), time.perf_counter())

    async def closed_loop(self, level: Level, streams: int) -> None:
        """Keep `streams` requests in flight: one that ends is followed by the next."""
        numbers = itertools.count()
        with self._timed(level) as began:

            async def stream() -> None:
                while self._goes_on(began) and next(numbers) < self._config.max_requests:
                    outcome = await self._send(level, began)
                    if outcome.error is not None:
                        await asyncio.sleep(ERROR_PAUSE)

            async with asyncio.TaskGroup() as group:
                for _ in range(streams):
                    group.create_task(stream())

    async def open_loop(self, level: Level, rate: float) -> None:
        """Send requests at random times, whatever became of those before."""
        gaps = random.Random(f"{self._config.seed} {rate}")
        tasks: set[asyncio.Task[Outcome]] = set()
        with self._timed(level) as began:
            due = began
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.max_requests):
                    due += gaps.expovariate(rate)
                    if due - began > self._config.seconds:
                        await asyncio.sleep(began + self._config.seconds - time.perf_counter())
                        break
                    await asyncio.sleep(due - time.perf_counter())  # at once if that is past
                    if len(tasks) >= self._config.max_in_flight:
                        level.outcomes.append(Outcome(sent=due - began, seconds=0, error=NOT_SENT))
                        continue
                    task = group.create_task(self._send(level, began))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

    def _goes_on(self, began: float) -> bool:
        return time.perf_counter() - began < self._config.seconds

    async def _send(self, level: Level, began: float) -> Outcome:
        caption, seed = next(self._next)
        record = level.outcomes.append
        return await send(self._client, self._ask, caption, seed, since=began, record=record)

    @contextmanager
    def _timed(self, level: Level) -> Iterator[float]:
        """Give when the level began; note for how long it sent."""
        began = time.perf_counter()
        try:
            yield began
        finally:
            level.window = min(time.perf_counter() - began, self._config.seconds)


async def measure(config: LoadConfig, run: Run, api_key: str | None = None) -> None:
    """Put every level of load on the server; `run` holds what was measured, also when cancelled.

    Raises:
        ValueError: if no such server answers.
    """
    async with _client(config, api_key) as client:
        run.server = await ask_server(client)
        ask = Ask(
            mode=config.mode,
            model=run.server["model"],
            sample_rate=run.server["sample_rate"],
            options=config.options,
            timeout=config.timeout,
            max_bytes=config.max_bytes,
        )
        load = Load(config, client, ask)
        await load.warm_up()
        for streams in config.streams:
            run.levels.append(Level(f"{streams} stream{'s' * (streams > 1)}"))
            await load.closed_loop(run.levels[-1], streams)
        for rate in config.rates:
            run.levels.append(Level(f"{rate:g} a second"))
            await load.open_loop(run.levels[-1], rate)


def _client(config: LoadConfig, api_key: str | None) -> httpx.AsyncClient:
    """Build a client that goes to the server itself: no proxy, no redirect."""
    return httpx.AsyncClient(
        base_url=config.url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(config.timeout, connect=min(CONNECT_SECONDS, config.timeout)),
        limits=httpx.Limits(max_connections=config.max_in_flight),
        trust_env=False,
    )


async def ask_server(client: httpx.AsyncClient) -> dict[str, Any]:
    """Ask the server what it serves.

    Raises:
        ValueError: if nothing answers there, or something else does.
    """
    url = client.base_url
    try:
        async with client.stream("GET", "/v1/audio/model") as response:
            if response.status_code == 401:
                raise ValueError(f"{url} asks for an API key; type --api-key KEY")
            body = b""
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_INFO_BYTES:
                    break
    except httpx.HTTPError as error:
        raise ValueError(
            f"no server answers at {url} ({type(error).__name__}: {error}); start one with  "
            "mllm-audio serve RUN"
        ) from error
    try:
        info = json.loads(body) if response.status_code == 200 else None
    except ValueError:
        info = None
    if not (isinstance(info, dict) and isinstance(info.get("model"), str)) or (
        type(info.get("sample_rate")) is not int or not 0 < info["sample_rate"] <= MAX_RATE
    ):
        raise ValueError(
            f"{url} answers HTTP {response.status_code} to /v1/audio/model, expected model and "
            "sample_rate; is it a server of  mllm-audio serve ?"
        )
    return info
