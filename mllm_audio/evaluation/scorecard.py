"""What an evaluation found, with everything a reader needs to judge the numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_audio.evaluation.bootstrap import Interval
from mllm_audio.evaluation.paper import NOT_COMPARABLE
from mllm_audio.files import write_atomic

SCORES_FILE = "scores.json"
TABLE_FILE = "scores.md"
PAGE_FILE = "report.html"
ARROWS = {"lower": "↓", "higher": "↑"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric's value."""

    name: str
    title: str
    embedder: str
    better: str  # lower or higher
    value: float
    interval: Interval  # 95 %, over clips
    num_generated: int  # clips
    num_reference: int  # clips; 0 if the metric does not hear them
    reference_value: float | None  # the reference's own, of a metric that hears one side
    notes: tuple[str, ...]

    @property
    def range(self) -> str:
        """The interval, or why there is none."""
        low, high = self.interval.low, self.interval.high
        return self.interval.reason if low is None or high is None else f"{low:.4g} to {high:.4g}"


@dataclass(frozen=True, kw_only=True)
class EmbedderRecord:
    """Which weights heard the clips."""

    name: str
    path: str
    sha256: str
    sample_rate: int  # Hz


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an evaluation was made."""

    generated: str  # folder
    reference: str  # folder
    captions: str | None  # file
    ids: str | None  # file, or how many were named
    generated_rate: int  # Hz of the files
    reference_rate: int  # Hz of the files
    resampler: str
    num_resamples: int  # of the intervals
    seed: int  # of the intervals
    num_silent: int  # generated clips in which nothing is to be heard; measured as they are
    date: str  # ISO 8601, UTC
    version: str  # of mllm-audio


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """The scores of one folder."""

    scores: tuple[Score, ...]
    embedders: tuple[EmbedderRecord, ...]
    settings: Settings

    def value(self, name: str) -> float:
        """Return the value of a metric.

        Raises:
            KeyError: if it was not measured.
        """
        values = {score.name: score.value for score in self.scores}
        if name not in values:
            raise KeyError(f"{name} was not measured, only {', '.join(values)}")
        return values[name]

    def to_json(self) -> str:
        """Everything, as JSON."""
        values: dict[str, Any] = asdict(self)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Tables of scores and embedders."""
        lines = [
            "| metric | value | 95 % interval | N | N reference | reference | embedder |",
            "|---|---|---|---|---|---|---|",
        ]
        for score in self.scores:
            own = "" if score.reference_value is None else f"{score.reference_value:.4g}"
            lines.append(
                f"| {score.name} {ARROWS[score.better]} | {score.value:.4g} | {score.range} | "
                f"{score.num_generated} | {score.num_reference or ''} | {own} | {score.embedder} |"
            )
        lines += ["", *(f"- {score.name}: {note}" for score in self.scores for note in score.notes)]
        lines += ["", "| embedder | Hz | checkpoint | sha256 |", "|---|---|---|---|"]
        lines += [f"| {e.name} | {e.sample_rate} | {e.path} | {e.sha256} |" for e in self.embedders]
        lines += ["", *(f"- {key}: {value}" for key, value in asdict(self.settings).items())]
        return "\n".join([*lines, "", NOT_COMPARABLE, ""])

    def write(self, out: Path) -> None:
        """Write scores.json, scores.md and report.html."""
        from mllm_audio.evaluation.page import render

        out.mkdir(parents=True, exist_ok=True)
        for name, text in (
            (SCORES_FILE, self.to_json()),
            (TABLE_FILE, self.to_markdown()),
            (PAGE_FILE, render(self)),
        ):
            write_atomic(out / name, text.encode())

    def __str__(self) -> str:
        """One line for each score."""
        width = max(len(score.name) for score in self.scores)
        return "\n".join(
            f"{score.name:{width}} {ARROWS[score.better]} {score.value:10.4f}  95 %: {score.range}"
            for score in self.scores
        )
