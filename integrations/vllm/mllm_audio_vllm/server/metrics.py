"""What /metrics tells of audio, beside vLLM's own."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from mllm_audio_vllm.server.base import Finished
from mllm_audio_vllm.server.errors import RequestError

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
FACTORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 10, 30)


class Metrics:
    """Counts requests with audio, and times them."""

    def __init__(self, max_live: int, registry: CollectorRegistry = REGISTRY) -> None:
        """Register them, which a process can do once in a registry.

        Args:
            max_live: requests at once.
            registry: the one that vLLM's /metrics shows.
        """
        self.max_live, self.num_live = max_live, 0
        labels = ["endpoint"]
        self.live = Gauge(
            "mllm_audio_live_requests",
            "Requests with audio that are being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.requests = Counter(
            "mllm_audio_requests",
            "Answered requests with audio, by outcome: ok, disconnect, or an HTTP status.",
            [*labels, "outcome"],
            registry=registry,
        )
        self.seconds = Counter(
            "mllm_audio_seconds", "Seconds of audio made.", labels, registry=registry
        )
        self.tokens = Counter(
            "mllm_audio_tokens", "Tokens of replies, by kind.", ["kind"], registry=registry
        )
        self.first = Histogram(
            "mllm_audio_time_to_first_audio_seconds",
            "From the request to its first samples.",
            labels,
            registry=registry,
            buckets=SECONDS,
        )
        self.factor = Histogram(
            "mllm_audio_real_time_factor",
            "From the request to its last samples, over the seconds of its audio.",
            labels,
            registry=registry,
            buckets=FACTORS,
        )

    def record(self, endpoint: str) -> Record:
        """Begin to measure a request.

        Raises:
            RequestError: if there are too many.
        """
        if self.num_live >= self.max_live:
            line = f"{self.max_live} requests with audio are being answered; try again later"
            raise RequestError(503, line)
        return Record(self, endpoint)


class Record:
    """Measures one request, from now to the end of its `with` block."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self.metrics, self.endpoint = metrics, endpoint
        self.began = time.perf_counter()
        self.seconds, self.last = 0.0, 0.0  # of audio so far; when the last of it came
        self.outcome = "ok"

    def __enter__(self) -> Self:
        """Count the request as live."""
        self.metrics.num_live += 1
        self.metrics.live.inc()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Count it as answered."""
        self.metrics.num_live -= 1
        self.metrics.live.dec()
        outcome = "disconnect" if error is not None and self.outcome == "ok" else self.outcome
        self.metrics.requests.labels(self.endpoint, outcome).inc()
        if self.seconds and outcome == "ok":
            self.metrics.factor.labels(self.endpoint).observe(self.last / self.seconds)

    def heard(self, seconds: float) -> None:
        """Count audio that has come."""
        if not seconds:
            return
        self.last = time.perf_counter() - self.began
        if not self.seconds:
            self.metrics.first.labels(self.endpoint).observe(self.last)
        self.seconds += seconds
        self.metrics.seconds.labels(self.endpoint).inc(seconds)

    def finished(self, event: Finished) -> None:
        """Count the tokens of a reply."""
        self.metrics.tokens.labels("text").inc(event.text_tokens)
        self.metrics.tokens.labels("audio").inc(event.audio_tokens)
