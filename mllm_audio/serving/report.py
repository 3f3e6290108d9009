"""What load measured: figures of each level, as a table and as JSON."""

from __future__ import annotations

import asyncio
import json
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mllm_audio.files import write_atomic
from mllm_audio.hardware import machine_name
from mllm_audio.serving.client import Arrival, Outcome
from mllm_audio.serving.load import Level, LoadConfig, Run, measure

PLAYER_BUFFER = 0.05  # seconds that any player holds before it starts


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of the requests of a level that ended well."""

    p50: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one level came to; None where no request tells."""

    level: str
    requests: int
    errors: dict[str, int]  # by kind
    seconds: float  # in which requests were sent
    first_audio: Quantiles | None  # seconds from sending a request to its first samples
    rtf: Quantiles | None  # from sending a request to its last samples, over the sound's duration
    stalled: float | None  # share of streams that a player ran dry on, started at the first piece
    head_start: Quantiles | None  # seconds that a player would have to wait never to run dry
    audio_seconds_per_second: float  # of all streams, within `seconds`
    audio_tokens_per_second: float | None  # latents


def summarize(level: Level, frame_rate: float | None = None) -> Figures:
    """Work out the figures of a level.

    Args:
        level: that was measured.
        frame_rate: latents of a second of sound; None takes it from the answers' own counts.
    """
    good = [outcome for outcome in level.outcomes if outcome.error is None]
    # Sound of requests that failed later is sound too; what comes after the window is not counted,
    # as fewer and fewer streams are left then.
    heard = sum(
        arrival.seconds
        for outcome in level.outcomes
        for arrival in outcome.arrivals
        if outcome.sent + arrival.at <= level.window
    )
    speed = heard / level.window if level.window else 0.0
    waits = [head_start(outcome.arrivals) for outcome in good]
    rate = frame_rate or _frame_rate(good)
    return Figures(
        level=level.name,
        requests=len(level.outcomes),
        errors=dict(Counter(o.error for o in level.outcomes if o.error is not None)),
        seconds=level.window,
        first_audio=_quantiles([outcome.arrivals[0].at for outcome in good]),
        rtf=_quantiles([o.arrivals[-1].at / o.audio_seconds for o in good]),
        stalled=sum(wait > PLAYER_BUFFER for wait in waits) / len(waits) if waits else None,
        head_start=_quantiles(waits),
        audio_seconds_per_second=speed,
        audio_tokens_per_second=None if rate is None else speed * rate,
    )


def head_start(arrivals: Sequence[Arrival]) -> float:
    """Work out how long after the first piece a player must start never to run dry, in seconds."""
    wait = played = 0.0
    for arrival in arrivals:
        wait = max(wait, arrival.at - arrivals[0].at - played)
        played += arrival.seconds
    return wait


def _frame_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Work out the latents of a second from answers that count them."""
    counted = [outcome for outcome in outcomes if outcome.audio_tokens is not None]
    seconds = sum(outcome.audio_seconds for outcome in counted)
    return sum(outcome.audio_tokens or 0 for outcome in counted) / seconds if seconds else None


def _quantiles(values: Sequence[float]) -> Quantiles | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return Quantiles(p50=float(p50), p95=float(p95))


def figures_of(run: Run) -> list[Figures]:
    """Work out the figures of all levels."""
    told = run.server.get("frame_rate")
    rate = float(told) if isinstance(told, (int, float)) and told > 0 else None
    return [summarize(level, rate) for level in run.levels]


HEADINGS = (
    *("load", "requests", "errors", "first audio p50", "p95 s", "RTF p50", "p95", "stalled"),
    *("head start p95 s", "audio s/s", "tokens/s"),
)


def lay_out(figures: Sequence[Figures]) -> str:
    """Lay the levels out as a table, and the errors below it."""
    rows = [HEADINGS, *map(_row, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    for level in figures:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(level.errors.items()))
        lines += [f"{level.level}: {kinds}"] if kinds else []
    if any(level.audio_tokens_per_second is None for level in figures):
        lines.append("tokens/s: neither the server nor its answers say how many latents there were")
    return "\n".join(lines)


def _row(level: Figures) -> tuple[str, ...]:
    first, rtf = level.first_audio, level.rtf
    tokens = level.audio_tokens_per_second
    return (
        level.level,
        str(level.requests),
        str(sum(level.errors.values())),
        f"{first.p50:.3f}" if first else "-",
        f"{first.p95:.3f}" if first else "-",
        f"{rtf.p50:.2f}" if rtf else "-",
        f"{rtf.p95:.2f}" if rtf else "-",
        f"{level.stalled:.0%}" if level.stalled is not None else "-",
        f"{level.head_start.p95:.2f}" if level.head_start else "-",
        f"{level.audio_seconds_per_second:.2f}",
        f"{tokens:.1f}" if tokens is not None else "-",
    )


def to_json(config: LoadConfig, run: Run, *, interrupted: bool) -> dict[str, Any]:
    """Give everything but the single requests, with machine and versions."""
    return {
        "machine": machine_name(),  # that sent the requests
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mllm-audio", "httpx")},
        },
        "server": run.server,
        "settings": asdict(config),
        "interrupted": interrupted,
        "levels": [asdict(level) for level in figures_of(run)],
    }


def run_and_report(
    config: LoadConfig, api_key: str | None, json_file: Path | None, echo: Callable[[str], object]
) -> None:
    """Measure, print the table and write the JSON; an interruption leaves what there is so far."""
    run, stopped = Run(), None
    try:
        asyncio.run(measure(config, run, api_key))
    except KeyboardInterrupt as stop:
        stopped = stop
    if run.levels:
        echo(lay_out(figures_of(run)))
    if json_file is not None and run.levels:
        values = to_json(config, run, interrupted=stopped is not None)
        write_atomic(json_file, (json.dumps(values, indent=2) + "\n").encode())
    if stopped is not None:
        raise KeyboardInterrupt(f"{len(run.levels)} levels begun") from stopped
