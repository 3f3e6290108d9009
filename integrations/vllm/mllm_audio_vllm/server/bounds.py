"""What a server lets its clients take."""

from __future__ import annotations

from dataclasses import dataclass

from mllm_audio.config import check_range


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds on all requests together, and on each; `protocol` has those of single fields."""

    is_local: bool = True  # the address is of this machine alone: other names and sites are refused
    max_body_mib: int = 32  # of a request
    history_mib: int = 256  # of earlier answers that clients may refer to
    history_seconds: float = 3600.0  # that an earlier answer is kept
    max_live_requests: int = 256  # with audio, at once
    read_seconds: float = 60.0  # in which a client must have sent its request
    send_seconds: float = 120.0  # in which a client must take each piece of its answer

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("bounds", self, 1, 1024, "max_body_mib")
        check_range("bounds", self, 0, 100_000, "history_mib")
        check_range("bounds", self, 1, 100_000, "max_live_requests")
        times = ("history_seconds", "read_seconds", "send_seconds")
        check_range("bounds", self, 0, 1_000_000, *times, open_low=True)
