"""Figures 4 and 6 as SVG: quality against speed, and against guidance and temperature."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mllm_audio.config import read_json
from mllm_audio.data.timing import TIMING_FILE
from mllm_audio.evaluation.base import Embedder
from mllm_audio.evaluation.evaluate import Options, evaluate
from mllm_audio.evaluation.paper import NOT_COMPARABLE
from mllm_audio.files import write_atomic

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 40, 55  # margins
LETTER = 7  # width of one, about
NUM_TICKS = 6  # of an axis, about
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989")


@dataclass(frozen=True)
class Point:
    """A place in a chart."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """A range of values laid along a line of pixels."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, log: bool = False) -> Axis:
        """Leave a little room beyond the values."""
        low, high = ((math.log10(v) if log else v) for v in (min(values), max(values)))
        margin = 0.08 * (high - low) or (0.3 if log else 0.1 * abs(high) or 1.0)
        low, high = low - margin, high + margin
        return cls(10**low, 10**high, start, end, log) if log else cls(low, high, start, end)

    def at(self, value: float) -> float:
        """Say at which pixel a value lies."""
        low, high, place = (
            (math.log10(v) if self.log else v) for v in (self.low, self.high, value)
        )
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """List round values; on a narrow logarithmic axis they are as on a linear one."""
        if self.log and self.high > 10 * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            values = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / NUM_TICKS
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
            first = math.ceil(self.low / step)
            values = [step * number for number in range(first, first + 2 * NUM_TICKS)]
        return [value for value in values if self.low <= value <= self.high]


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
        joined: join the points of a line, and name it above the chart.
    """
    points = [point for line in lines.values() for point in line]
    across = Axis.around([point.x for point in points], LEFT, WIDTH - RIGHT, log_x)
    up = Axis.around([point.y for point in points], HEIGHT - BOTTOM, TOP)
    parts = _frame(across, up, x_title, y_title)
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        spots = [(across.at(point.x), up.at(point.y)) for point in line]
        if joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
            behind = sum(LETTER * len(other) + 20 for other in list(lines)[number + 1 :])
            parts.append(_text(WIDTH - RIGHT - behind, TOP - 26, name, colour, "end"))
        for (x, y), point in zip(spots, line, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            side, anchor = (-7, "end") if x > WIDTH / 2 else (7, "start")
            parts.append(_text(x + side, y - 6, point.label, colour, anchor))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _frame(across: Axis, up: Axis, x_title: str, y_title: str) -> list[str]:
    """Draw a grid of round values, and name the axes."""
    x_ticks, y_ticks = across.ticks(), up.ticks()
    grid = [f"M{across.at(value):.1f} {up.start}V{up.end}" for value in x_ticks]
    grid += [f"M{across.start} {up.at(value):.1f}H{across.end}" for value in y_ticks]
    return [
        f'<path d="{"".join(grid)}" stroke="#e5e5e5"/>',
        f'<path d="M{LEFT} {up.end}V{up.start}H{across.end}" fill="none" stroke="#888"/>',
        *(
            _text(across.at(value), up.start + 18, shown, anchor="middle")
            for value, shown in zip(x_ticks, _labels(x_ticks), strict=True)
        ),
        *(
            _text(LEFT - 8, up.at(value) + 4, shown, anchor="end")
            for value, shown in zip(y_ticks, _labels(y_ticks), strict=True)
        ),
        _text((across.start + across.end) / 2, HEIGHT - 14, x_title, anchor="middle"),
        _text(12, TOP - 12, y_title),
    ]


def _labels(values: Sequence[float]) -> list[str]:
    """Write numbers with four digits, or with as many as tell them apart."""
    for digits in range(4, 16):
        labels = [f"{value:.{digits}g}" for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _text(x: float, y: float, text: str, colour: str = "#333", anchor: str = "start") -> str:
    if not text:
        return ""
    shown = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{shown}</text>'


def figure_6(rows: Sequence[Mapping[str, Any]], metric: str, out: Path) -> list[Path]:
    """Draw a metric against guidance, a line per schedule, and against temperature.

    Args:
        rows: of the table "figure6", as `reproduce` keeps them; those with one setting, of several
            seeds, make one point, their mean. Rows without the metric are left out.
        metric: name of the score.
        out: folder of the two SVG files, made if absent.
    """
    guided: dict[str, dict[float, list[float]]] = {}
    unguided: list[float] = []
    heated: dict[float, list[float]] = {}
    for row in (row for row in rows if metric in row["scores"]):
        value, options = row["scores"][metric]["value"], row["generation"]
        if "temperature" in options:
            heated.setdefault(options["temperature"], []).append(value)
        elif options["guidance_scale"] == 1:  # no guidance, on any schedule
            unguided.append(value)
        else:
            line = guided.setdefault(options["guidance_schedule"], {})
            line.setdefault(options["guidance_scale"], []).append(value)
    if unguided:
        guided = {name: {1.0: unguided, **guided[name]} for name in guided} or {
            "no guidance": {1.0: unguided}
        }
    drawn = {
        "figure6_guidance.svg": (guided, "guidance scale s"),
        "figure6_temperature.svg": ({"": heated} if heated else {}, "temperature"),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for file, (lines, title) in drawn.items():
        if lines:
            points = {name: _means(line) for name, line in lines.items()}
            write_atomic(out / file, chart(points, title, metric).encode())
            paths.append(out / file)
    return paths


def _means(values: Mapping[float, Sequence[float]]) -> list[Point]:
    return [Point(x, mean(values[x])) for x in sorted(values)]


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
