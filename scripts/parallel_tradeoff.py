"""Measure digits runs by how many latents they draw a step: judge accuracy, Frechet distance, time.

    python scripts/parallel_tradeoff.py RUN [RUN ...] --recordings DATA --out OUT

Weights, seeds, captions, guidance and head steps of a run are the same for every setting; runs are
named after their folders, to compare one trained with `masking.max_distance` with one without.
Times are of decoding alone, one clip after another, so that they say what a listener waits; the
clips that are judged are decoded in batches. The judge is `digits_judge.py`. Writes
OUT/parallel.json, OUT/accuracy.svg and OUT/frechet.svg after each setting; the same command
continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from sampler_tradeoff import FIGURES, generate, judge, kept_rows, requests_of

from mllm_audio.data.timing import machine_facts
from mllm_audio.files import write_atomic
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.voice import Voice
from mllm_audio.reproduce.figures import Point, chart

TIMED_CLIPS = 9  # of a length, decoded one at a time; the median counts
TIMED_SECONDS = 1.28  # of each


def decoding_ms(voice: Voice, caption: str, config: GenerationConfig) -> float:
    """Time the decoding of one clip, in milliseconds: the median of some after a first."""
    config, took = replace(config, seconds=TIMED_SECONDS), []
    for seed in range(1 + TIMED_CLIPS):
        started = time.perf_counter()
        voice.generate_latents([caption], config, [seed])
        took.append(time.perf_counter() - started)
    return 1e3 * median(took[1:])


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw both figures, a line per run."""
    for file, (key, title) in FIGURES.items():
        lines: dict[str, list[Point]] = {}
        for row in sorted(rows, key=lambda row: row["tokens_per_step"]):
            lines.setdefault(row["run"], []).append(Point(row["tokens_per_step"], row[key]))
        text = chart(lines, "latents drawn a step (log; 4 are a column)", title, log_x=True)
        write_atomic(out / file, text.encode())


def main() -> None:
    """Generate, judge and draw, a setting at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trained digits runs")
    parser.add_argument("--recordings", type=Path, required=True, help="holds captions.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens-per-step", default="1,2,4,8,16", help="latents drawn at once")
    parser.add_argument("--count", type=int, default=200, help="clips of each setting")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if len({run.name for run in arguments.runs}) < len(arguments.runs):
        parser.error("two runs have the same name, expected folders named differently")
    numbers = [int(part) for part in arguments.tokens_per_step.split(",")]
    requests = requests_of(arguments.recordings, arguments.count)
    asked = {"count": arguments.count, "seed": arguments.seed}
    file = arguments.out / "parallel.json"
    kept = kept_rows(file, asked)
    done = {row["setting"] for row in kept["rows"]}
    for run in arguments.runs:
        voice = Voice.load(run)
        for number in numbers:
            name = f"{run.name}-{number}"
            if name in done:
                continue
            config = replace(voice.defaults, tokens_per_step=number)
            folder = arguments.out / name
            generate(voice, requests, config, folder, arguments.seed)
            took = decoding_ms(voice, requests[0]["caption"], config)
            row = {"setting": name, "run": run.name, "tokens_per_step": number}
            row |= {"decoding_ms": round(took, 1)}
            row |= judge(arguments.recordings, folder, arguments.out)
            kept |= {"machine": machine_facts(), "rows": [*kept["rows"], row]}
            write_atomic(file, (json.dumps(kept, indent=1) + "\n").encode())
            draw(kept["rows"], arguments.out)
            print(
                f"{name}: {row['digits']} % of the digits, Frechet distance "
                f"{row['fd_digits_judge']}, {took:.0f} ms a clip of {TIMED_SECONDS} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
