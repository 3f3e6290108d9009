"""Ratings to the table of the paper (table 2): mean and spread per system, question and prompts."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from mllm_audio.listening.plan import Stimulus
from mllm_audio.listening.store import QUESTIONS, Rating

PROMPTS = {"all": (True, False), "speech": (True,), "non-speech": (False,)}  # speech is one of
NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The ratings of one system, on one question, for one group of prompts."""

    question: str  # one of QUESTIONS
    prompts: str  # one of PROMPTS
    system: str
    mean: float  # over ratings
    std: float | None  # over ratings, of a sample (N - 1); None for a single rating
    low: float | None  # 95 % bootstrap interval of the mean over clips; None for a single clip
    high: float | None
    num_clips: int
    num_ratings: int
    num_raters: int


def summarize(
    ratings: Sequence[Rating], clips: Mapping[str, Stimulus], seed: int = 0
) -> list[Summary]:
    """Summarise every system that has ratings, in each group of prompts, for each question.

    Args:
        ratings: of one test.
        clips: the stimulus of each id, in the order in which systems are to be listed.
        seed: of the bootstrap.

    Raises:
        ValueError: if there are no ratings.
    """
    if not ratings:
        raise ValueError("there are no ratings yet; rate clips with `mllm-audio listen` first")
    summaries = []
    for question in QUESTIONS:
        for prompts, speech in PROMPTS.items():
            for system in dict.fromkeys(stimulus.system for stimulus in clips.values()):
                chosen = [
                    rating
                    for rating in ratings
                    if rating.question == question
                    and clips[rating.clip].system == system
                    and clips[rating.clip].speech in speech
                ]
                if chosen:
                    summaries.append(_summary(question, prompts, system, chosen, seed))
    return summaries


def _summary(
    question: str, prompts: str, system: str, ratings: Sequence[Rating], seed: int
) -> Summary:
    by_clip: dict[str, list[int]] = {}
    for rating in ratings:
        by_clip.setdefault(rating.clip, []).append(rating.score)
    scores = [rating.score for rating in ratings]
    low, high = bootstrap_interval(list(by_clip.values()), seed)
    return Summary(
        question=question,
        prompts=prompts,
        system=system,
        mean=float(np.mean(scores)),
        std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        low=low,
        high=high,
        num_clips=len(by_clip),
        num_ratings=len(scores),
        num_raters=len({rating.rater for rating in ratings}),
    )


def bootstrap_interval(
    scores: Sequence[Sequence[int]], seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Estimate the 95 % interval of a mean by drawing clips, with all their ratings, again.

    Percentile bootstrap: Efron and Tibshirani 1993, chapter 13. Ratings of one clip hang together,
    so that drawing single ratings would give too narrow an interval.

    Args:
        scores: of each clip, one or more.
        seed: of the draws.

    Returns:
        Its ends, or (None, None) for fewer than two clips.
    """
    if len(scores) < 2:
        return None, None
    sums = np.array([sum(clip) for clip in scores])
    counts = np.array([len(clip) for clip in scores])
    size = (NUM_RESAMPLES, len(scores))
    drawn = np.random.default_rng(seed).integers(len(scores), size=size)
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def lay_out(summaries: Sequence[Summary]) -> str:
    """Print summaries as a table, one a line."""
    header = "question,prompts,system,mean +- std,95 % interval,clips,ratings,raters"
    rows = [tuple(header.split(","))]
    for s in summaries:
        std = "-" if s.std is None else f"{s.std:.2f}"
        interval = "-" if s.low is None else f"{s.low:.2f} to {s.high:.2f}"
        counts = (str(s.num_clips), str(s.num_ratings), str(s.num_raters))
        mean = f"{s.mean:.2f} +- {std}"
        rows.append((s.question, s.prompts, s.system, mean, interval, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def write_csv(path: Path, ratings: Sequence[Rating], clips: Mapping[str, Stimulus]) -> None:
    """Write every rating with what was rated, one a line, with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for kind in (Rating, Stimulus) for field in fields(kind)])
        writer.writerows([*astuple(rating), *astuple(clips[rating.clip])] for rating in ratings)
