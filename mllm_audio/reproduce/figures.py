"""Figures 4 and 6 as SVG: quality against speed, and against guidance and temperature."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_audio.config import read_json
from mllm_audio.data.timing import TIMING_FILE
from mllm_audio.evaluation.base import Embedder
from mllm_audio.evaluation.evaluate import Options, evaluate
from mllm_audio.evaluation.paper import NOT_COMPARABLE
from mllm_audio.files import write_atomic

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 30, 50  # margins
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989")


@dataclass(frozen=True)
class Point:
    """A place in a chart."""

    x: float
    y: float
    label: str = ""


def chart(
    lines: Mapping[str, Sequence[Point]],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    joined: bool = True,
) -> str:
    """Draw points, joined to lines or not, as one SVG with its own scale.

    Args:
        lines: by name; none of them empty.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.
        log_x: draw x by its logarithm; all are positive.
        joined: join the points of a line.
    """
    points = [point for line in lines.values() for point in line]
    place = math.log10 if log_x else float
    x_low, x_high = _span([place(point.x) for point in points])
    y_low, y_high = _span([point.y for point in points])

    def at(point: Point) -> tuple[float, float]:
        across = (place(point.x) - x_low) / (x_high - x_low)
        up = (point.y - y_low) / (y_high - y_low)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        spots = [at(point) for point in line]
        if joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
            parts.append(_text(LEFT + 8, TOP + 16 * number, name, colour))
        for (x, y), point in zip(spots, line, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            parts.append(_text(x + 7, y - 6, point.label, colour))
    return _frame(parts, (x_low, x_high), (y_low, y_high), x_title, y_title, log_x)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Give the ends of an axis a little beyond its values."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _frame(
    parts: Sequence[str],
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    x_title: str,
    y_title: str,
    log_x: bool,
) -> str:
    """Put axes with five ticks each around a chart."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    marks = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#888"/>']
    for number in range(5):
        share = number / 4
        x = x_ends[0] + share * (x_ends[1] - x_ends[0])
        y = y_ends[0] + share * (y_ends[1] - y_ends[0])
        shown = 10**x if log_x else x
        marks.append(_text(LEFT + share * (right - LEFT) - 12, bottom + 18, f"{shown:.3g}"))
        marks.append(_text(8, bottom - share * (bottom - TOP) + 4, f"{y:.3g}"))
    marks.append(_text(WIDTH / 2 - 60, HEIGHT - 12, x_title))
    marks.append(_text(8, 16, y_title))
    body = "".join([*marks, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" '
        f'style="background:#fff">{body}</svg>'
    )


def _text(x: float, y: float, text: str, colour: str = "#333") -> str:
    if not text:
        return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{html.escape(text)}</text>'


def figure_6(rows: Sequence[Mapping[str, Any]], metric: str, out: Path) -> list[Path]:
    """Draw a metric against guidance, a line per schedule, and against temperature.

    Args:
        rows: of the table "figure6", as `reproduce` keeps them.
        metric: name of the score.
        out: folder of the two SVG files.
    """
    schedules: dict[str, list[Point]] = {}
    temperatures: list[Point] = []
    for row in rows:
        value, options = row["scores"][metric]["value"], row["generation"]
        if "temperature" in options:
            temperatures.append(Point(options["temperature"], value))
        elif options["guidance_scale"] == 1:  # no guidance, on any schedule
            for name in ("constant", "linear", "annealed"):
                schedules.setdefault(name, []).append(Point(1.0, value))
        else:
            schedules.setdefault(options["guidance_schedule"], []).append(
                Point(options["guidance_scale"], value)
            )
    for line in (*schedules.values(), temperatures):
        line.sort(key=lambda point: point.x)
    drawn = {
        "figure6_guidance.svg": (schedules, "guidance scale s"),
        "figure6_temperature.svg": ({"": temperatures} if temperatures else {}, "temperature"),
    }
    paths = []
    for name, (lines, title) in drawn.items():
        if lines:
            write_atomic(out / name, chart(lines, title, metric).encode())
            paths.append(out / name)
    return paths


def figure_4(
    systems: Mapping[str, Path],
    reference: Path,
    out: Path,
    embedders: Sequence[Embedder],
    metric: str = "fad_vggish",
) -> str:
    """Evaluate folders of sounds that keep their timing, and draw a metric against RTF.

    Args:
        systems: folders that `generate --captions` or `peer` wrote, by name.
        reference: folder of recordings.
        out: of figure4.svg, figure4.md and the scores.
        embedders: which the metric needs.
        metric: name of the score.

    Returns:
        The table behind the figure.

    Raises:
        ValueError: if a folder has no timing, or cannot be evaluated.
    """
    points, lines = (
        {},
        ["| system | RTF | " + metric + " | batch | device | machine |", "|---" * 6 + "|"],
    )
    for name, folder in systems.items():
        if not (folder / TIMING_FILE).is_file():
            raise ValueError(
                f"{folder} holds no {TIMING_FILE}; make its sounds with `mllm-audio generate RUN "
                "--captions FILE` or `mllm-audio peer`"
            )
        timing = read_json(folder / TIMING_FILE, "generate again")
        card = evaluate(
            folder,
            reference,
            out / "scores" / name,
            embedders,
            metrics=[metric],
            ids=[clip.stem for clip in sorted(folder.glob("*.wav"))],
            cache=out / "features",
            options=Options(num_resamples=0),
        )
        value = card.value(metric)
        points[name] = [Point(timing["rtf"], value, name)]
        batch = max(clip["batch_size"] for clip in timing["clips"])
        lines.append(
            f"| {name} | {timing['rtf']:.4g} | {value:.4g} | {batch} | {timing['device']} | "
            f"{timing['machine']} |"
        )
    drawn = chart(points, "RTF (log)", metric, log_x=True, joined=False)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "figure4.svg", drawn.encode())
    text = "\n".join([*lines, "", NOT_COMPARABLE, ""])
    write_atomic(out / "figure4.md", text.encode())
    return text
