"""`mllm-audio reproduce`: the rows of a table, each trained, generated and evaluated in turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_audio.card import code_version
from mllm_audio.evaluation.base import Embedder
from mllm_audio.evaluation.clips import CAPTIONS_FILE, Folder
from mllm_audio.evaluation.evaluate import Options, evaluate
from mllm_audio.evaluation.features import extract
from mllm_audio.evaluation.scorecard import Scorecard
from mllm_audio.files import file_sha256
from mllm_audio.generation.voice import Voice
from mllm_audio.hardware import machine_name
from mllm_audio.presets import get_preset
from mllm_audio.reproduce.report import write_table
from mllm_audio.reproduce.stages import (
    Job,
    generate,
    read_rows,
    requests_of,
    train,
    write_row,
)
from mllm_audio.reproduce.tables import TABLES, System
from mllm_audio.training.checkpoint import list_checkpoints


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """How the sounds of a row are measured."""

    reference: Path  # folder of recordings
    embedders: Sequence[Embedder]
    metrics: Sequence[str] | None = None  # names; None: all that the embedders allow
    num_clips: int | None = None  # of the captions, from the first; None: all
    num_resamples: int = 200  # of the intervals


def reproduce(
    table: str,
    systems: Sequence[System],
    seeds: Sequence[int],
    job: Job,
    judgement: Judgement,
    *,
    num_jobs: int = 1,
    say: Callable[[str], object] = print,
) -> Path:
    """Bring every row of a table to its values; return the table's Markdown.

    Stopped at any moment, the same call continues: trainings, sounds and values that are finished
    are kept.

    Args:
        table: key of TABLES, or a name of one's own.
        systems: rows.
        seeds: of the trainings; the values are means over them.
        job: what rows share.
        judgement: how they are measured.
        num_jobs: trainings at once, each with its share of the cores.
        say: told what is done.

    Raises:
        ValueError: if a stage finds other settings than it was begun with.
        RuntimeError: if a training fails.
    """
    todo = [(system, seed) for seed in seeds for system in systems]
    folder, path = job.out / "rows" / table, job.out / table
    recordings = _hear_recordings(job, judgement)
    if num_jobs > 1:
        _train_side_by_side(job, todo, num_jobs, say)
    for number, (system, seed) in enumerate(todo, start=1):
        say(f"{table} {system.label} ({system.what}), seed {seed}: {number} of {len(todo)}")
        run = train(job, system, seed)
        sounds = generate(job, system, seed, judgement.num_clips)
        inputs = _inputs(sounds, recordings, judgement)
        if [row.get("inputs") for row in read_rows(folder, system.label, seed)] != [inputs]:
            card = evaluate(
                sounds,
                judgement.reference,
                job.out / "scores" / sounds.name,
                judgement.embedders,
                metrics=judgement.metrics,
                ids=list(recordings),
                cache=job.out / "features",
                options=Options(num_resamples=judgement.num_resamples, allow_silent=True),
            )
            values = {"table": table, **_values(job, system, seed, run, card), "inputs": inputs}
            write_row(folder, system.label, seed, values)
        _write_known(path, table, systems, folder)
    return path.with_suffix(".md")


def _hear_recordings(job: Job, judgement: Judgement) -> dict[str, Path]:
    """Hear the recordings that the sounds are compared with, and list them by name.

    Before any training: what cannot be measured is found now, and what is heard is kept.

    Raises:
        ValueError: if recordings are missing, of mixed sample rates, or cannot be heard.
    """
    names = sorted(request.name for request in requests_of(job, judgement.num_clips))
    clips = Folder.open(judgement.reference, None, names).clips
    for embedder in judgement.embedders:
        extract(embedder, clips, job.out / "features")
    return clips


def _inputs(sounds: Path, recordings: dict[str, Path], judgement: Judgement) -> str:
    """Fingerprint all that a row's values are computed from."""
    files = [sounds / CAPTIONS_FILE, *(sounds / f"{name}.wav" for name in recordings)]
    values = {
        "files": [file_sha256(file) for file in (*files, *recordings.values())],
        "embedders": [[embedder.name, embedder.fingerprint] for embedder in judgement.embedders],
        "metrics": judgement.metrics,
        "num_resamples": judgement.num_resamples,
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _write_known(path: Path, table: str, systems: Sequence[System], folder: Path) -> None:
    """Write the table of the rows that were asked for, and of others that are known."""
    rows = {system: read_rows(folder, system.label) for system in TABLES.get(table, systems)}
    shown = [system for system in rows if system in systems or rows[system]]
    write_table(path, table, shown, [row for system in shown for row in rows[system]])


def _train_side_by_side(
    job: Job, todo: Sequence[tuple[System, int]], num_jobs: int, say: Callable[[str], object]
) -> None:
    """Train several models at once; those that start from another one come after it."""
    threads = max(1, torch.get_num_threads() // num_jobs)
    unique = {(system.preset, seed): (system, seed) for system, seed in todo}
    waves: list[list[tuple[System, int]]] = [[], []]
    for system, seed in unique.values():
        waves[get_preset(job.preset(system)).init == "audiomar"].append((system, seed))
    for wave in waves:
        with ThreadPoolExecutor(num_jobs) as pool:
            futures = [pool.submit(train, job, *pair, threads=threads) for pair in wave]
            try:
                for future in futures:
                    say(f"trained {future.result().name}")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _values(job: Job, system: System, seed: int, run: Path, card: Scorecard) -> dict[str, Any]:
    """Say what a row's values are and what they depend on."""
    voice = Voice.load(run)
    audio = voice.model.audio.config
    config = get_preset(job.preset(system))
    embedders = [f"{e.name} {Path(e.path).name} sha256 {e.sha256[:12]}" for e in card.embedders]
    return {
        "label": system.label,
        "what": system.what,
        "preset": config.preset,
        "seed": seed,
        "scores": {
            score.name: {
                "value": score.value,
                "low": score.interval.low,
                "high": score.interval.high,
                "reference_value": score.reference_value,
            }
            for score in card.scores
        },
        "num_silent": card.settings.num_silent,
        "num_clips": max(score.num_generated for score in card.scores),
        "steps": _num_steps(run),
        "generation": dict(system.generation),
        "generation_seed": job.generation_seed,
        "tokenizer": f"{audio.tokenizer} {audio.tokenizer_fingerprint}",
        "conditioner": f"{audio.conditioner} {audio.conditioner_fingerprint}",
        "embedders": ", ".join(embedders),
        "commit": code_version(),
        "machine": machine_name(),
    }


def _num_steps(run: Path) -> int:
    """Read how many optimizer steps a run took."""
    return int(list_checkpoints(run)[-1].name.partition("-")[2])
