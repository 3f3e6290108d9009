"""A stopwatch for parts of code that is not ours to change, and the most memory it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Seconds of each part, one entry for every time that it ran.

    On a GPU the device is waited for on both sides of a part, so parts cannot overlap and their sum
    is more than the code takes when nobody watches.
    """

    device: torch.device
    laps: dict[str, list[float]] = field(default_factory=dict)  # by part

    def now(self) -> float:
        """Read the clock, in seconds, when the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside; what fails is not counted."""
        started = self.now()
        yield
        self.laps.setdefault(name, []).append(self.now() - started)

    @contextmanager
    def watching(self, owner: Any, method: str, name: str | Callable[[], str]) -> Iterator[None]:
        """Time every call of `owner.method` for as long as the context lasts.

        Args:
            owner: whose class defines the method.
            method: its name; of a module, "forward" is what calling it runs.
            name: of the part, or what names it just before a call.
        """
        original = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return original(*arguments, **options)

        assert method not in vars(owner), f"{method} is being watched already"
        setattr(owner, method, timed)
        try:
            yield
        finally:
            delattr(owner, method)

    def total(self, *names: str) -> float:
        """Add up the seconds of these parts; one that never ran took none."""
        return sum(sum(self.laps.get(name, [])) for name in names)

    def typical(self, name: str) -> float:
        """Take the median of one run of a part, seconds; 0 if it never ran."""
        return median(self.laps.get(name) or [0.0])

    def calls(self, name: str) -> int:
        """Count how often a part ran."""
        return len(self.laps.get(name, []))


def middle(watches: list[Stopwatch], *names: str) -> Stopwatch:
    """Choose the repetition that is the median by these parts: its own parts add up to its whole.

    Of an even number it is the slower one of the two in the middle.
    """
    return sorted(watches, key=lambda watch: watch.total(*names))[len(watches) // 2]


def forget_peak(device: torch.device) -> None:
    """Measure the peak of memory from now on.

    On the CPU only Linux can; elsewhere the peak is that of the process since its start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # no Linux, or a container that forbids it
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark


def peak_memory(device: torch.device) -> int:
    """Return the most memory since `forget_peak`, bytes: the GPU's, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
