"""What a benchmark found: where, under which settings, and its figures by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mllm_audio.benchmarks.timing import Stopwatch
from mllm_audio.config import from_dict, read_json
from mllm_audio.files import write_atomic
from mllm_audio.hardware import machine_name


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the figures were measured on."""

    name: str  # system, processor and cores
    device: str  # "cpu", or the GPU's name
    instructions: str  # the processor's, as torch uses them
    torch_version: str
    mllm_audio_version: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Describe this machine, with the device that computes."""
        gpu = device.type == "cuda"
        return cls(
            name=machine_name(),
            device=torch.cuda.get_device_name(device) if gpu else device.type,
            instructions=torch.backends.cpu.get_cpu_capability(),
            torch_version=str(torch.__version__),
            mllm_audio_version=version("mllm-audio"),
        )

    @property
    def hardware(self) -> str:
        """Name what must be the same for figures to be compared."""
        return f"{self.name}, {self.device}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known before anything is measured."""

    benchmark: str  # generate, train or decode
    settings: dict[str, Any]  # all that the figures depend on beside the machine
    machine: Machine

    def __str__(self) -> str:
        """Print machine and settings, a line each."""
        machine = self.machine
        settings = ", ".join(f"{key} {_said(value)}" for key, value in self.settings.items())
        return (
            f"machine   {machine.hardware} ({machine.instructions}), torch "
            f"{machine.torch_version}, mllm-audio {machine.mllm_audio_version}\n"
            f"{self.benchmark:<9} {settings}"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """A benchmark that was run."""

    header: Header
    repetitions: int  # of which the median was taken
    figures: dict[str, float]  # by name; the last word of a name is the unit, or a ratio

    def save(self, file: Path) -> None:
        """Write it as JSON, for `load`, whole or not at all."""
        write_atomic(file, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, file: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ValueError: if there is no such file, or it holds something else.
        """
        remedy = "name a file that --json of `mllm-audio bench` wrote"
        values = read_json(file, remedy)
        missing = {"header", "repetitions", "figures"} - values.keys()
        if missing:
            raise ValueError(f"{file} has no {', '.join(sorted(missing))}; {remedy}")
        report: Report = from_dict(cls, values, str(file))
        return report


Check = Callable[[Header], object]  # called before the first measurement; may refuse it


def part_figures(watch: Stopwatch, names: Sequence[str]) -> dict[str, float]:
    """Give each part's calls, median milliseconds of a call, and seconds in all."""
    figures: dict[str, float] = {}
    for name in names:
        figures[f"{name}.calls"] = watch.calls(name)
        figures[f"{name}.ms"] = 1e3 * watch.typical(name)
        figures[f"{name}.seconds"] = watch.total(name)
    return figures


def part_lines(figures: dict[str, float], names: Sequence[str], whole: float) -> list[str]:
    """Lay parts out as a table, with their share of `whole` seconds."""
    counted = any(f"{name}.calls" in figures for name in names)
    head = f"{'calls':>7}{'ms a call':>12}" if counted else ""
    lines = [f"{'part':<10}{head}{'seconds':>10}{'share':>8}"]
    for name in names:
        seconds, cells = figures[f"{name}.seconds"], " " * len(head)
        if f"{name}.calls" in figures:
            cells = f"{figures[f'{name}.calls']:>7.0f}{figures[f'{name}.ms']:>12.2f}"
        lines.append(f"{name:<10}{cells}{seconds:>10.3f}{seconds / whole:>8.1%}")
    return lines


def _said(value: Any) -> str:
    """Write a setting the way it is typed."""
    if isinstance(value, list | tuple):
        return ",".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
