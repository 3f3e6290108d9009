"""The stages of a row, each of which keeps what is finished: train, generate, evaluate."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_audio.build import fit_to_data
from mllm_audio.claim import MAY_CHANGE, RUN_FILE, flat
from mllm_audio.config import override, read_json, to_dict
from mllm_audio.data.remote import open_folder
from mllm_audio.data.requests import Request, read_requests
from mllm_audio.files import write_atomic
from mllm_audio.generation.requests import generate_requests
from mllm_audio.generation.voice import Voice
from mllm_audio.presets import SMALL, RunConfig, get_preset
from mllm_audio.reproduce.tables import System
from mllm_audio.run import data_facts
from mllm_audio.training.checkpoint import has_checkpoint


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all rows of a table share."""

    out: Path  # of everything
    data: Path  # prepared folder to train on
    captions: Path  # manifest of the sounds to make
    small: bool  # the systems scaled down
    split: str | None = None  # of `captions` to use; None: all
    overrides: tuple[str, ...] = ()  # section.key=value, of every training
    launcher: str = ""  # words before `-m mllm_audio train`, e.g. torchrun --nproc_per_node 8
    init_from: Path | None = None  # MAR checkpoint that the paper's systems start from
    batch_size: int = 32  # sounds generated at once
    generation_seed: int = 0  # of the first sound

    def preset(self, system: System) -> str:
        """Name the preset of a row at this scale."""
        return system.preset + (SMALL if self.small else "")

    def run(self, preset: str, seed: int) -> Path:
        """Say where a training is kept."""
        return self.out / "runs" / f"{preset}-seed{seed}"


def train(job: Job, system: System, seed: int, *, threads: int | None = None) -> Path:
    """Train a row's model, unless it is trained; return its folder.

    Args:
        job: of the table.
        system: of the row.
        seed: of the training.
        threads: of the process, whose output then goes to OUT/logs; None shows it.

    Raises:
        ValueError: if the folder holds another run, or there is nothing to start from.
        RuntimeError: if the training fails.
    """
    preset = job.preset(system)
    run = job.run(preset, seed)
    overrides = [*job.overrides, f"train.seed={seed}", *_start(job, system, seed, threads=threads)]
    config: RunConfig = override(get_preset(preset), overrides)
    if _is_trained(job, run, config):
        return run
    words = shlex.split(job.launcher) or [sys.executable]
    command = [*words, "-m", "mllm_audio", "train", "--preset", preset]
    command += ["--data", str(job.data), "--out", str(run), *overrides]
    if threads is None:
        code = subprocess.run(command).returncode
        where = "see above"
    else:
        log = job.out / "logs" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
        where = f"see {log}"
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise RuntimeError(f"training {run.name} ended with {code}, {where}")
    return run


def _start(job: Job, system: System, seed: int, *, threads: int | None) -> list[str]:
    """Say what a training starts from: an AudioMAR, which is trained first, or MAR's weights.

    Raises:
        ValueError: if MAR's weights are needed and not named.
    """
    init = get_preset(job.preset(system)).init
    if init == "audiomar":
        audiomar = System(label="K", preset="audiomar_base", what="AudioMAR")
        return [f"init_from={train(job, audiomar, seed, threads=threads)}"]
    if init == "random" or any(text.startswith("init=") for text in job.overrides):
        return []
    if job.init_from is None:
        raise ValueError(
            f"{system.preset} starts from MAR's image weights; type --init-from MAR_CHECKPOINT.pth "
            "(mar_base or mar_large of github.com/LTH14/mar), or init=random"
        )
    return [f"init_from={job.init_from}"]


def _is_trained(job: Job, run: Path, config: RunConfig) -> bool:
    """Tell whether a run of this configuration has all its steps.

    Raises:
        ValueError: if it is of another one, or of other data.
    """
    if not (run / RUN_FILE).is_file():
        return False
    before = flat(read_json(run / RUN_FILE, f"delete {run}"))
    index = open_folder(job.data, config.data).index
    values = {**to_dict(fit_to_data(config, index, job.data)), **data_facts(index)}
    now = flat(json.loads(json.dumps(values)))
    free = {*MAY_CHANGE} - {"train.num_steps", "train.optim.lr"}
    for key in sorted((before.keys() & now.keys()) - free):
        if before[key] != now[key] and not key.startswith("generation."):
            raise ValueError(
                f"{run} holds a run with {key}={before[key]}, found {now[key]}; type another "
                "--out, or delete that folder"
            )
    return has_checkpoint(run, config.train.num_steps) and (run / "config.json").is_file()


def requests_of(job: Job, limit: int | None) -> list[Request]:
    """List the sounds that every row makes.

    Raises:
        ValueError: if the captions cannot be used.
    """
    return read_requests(job.captions, seed=job.generation_seed, split=job.split, limit=limit)


def generate(job: Job, system: System, seed: int, limit: int | None) -> Path:
    """Generate the sounds of a row, unless they are there; return their folder."""
    run = job.run(job.preset(system), seed)
    voice = Voice.load(run)
    config = replace(voice.defaults, **dict(system.generation))
    out = job.out / "sounds" / f"{run.name}{_suffix(system)}"
    generate_requests(voice, run, requests_of(job, limit), out, config, job.batch_size)
    return out


def _suffix(system: System) -> str:
    """Tell rows of one training apart."""
    return f"-{system.label}" if system.generation else ""


def write_row(folder: Path, label: str, seed: int, values: dict[str, Any]) -> None:
    """Keep what is known of a row and seed of a table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / f"{label}-seed{seed}.json", (json.dumps(values, indent=2) + "\n").encode()
    )


def read_rows(folder: Path, label: str, seed: int | None = None) -> list[dict[str, Any]]:
    """Read what is known of a row of a table, with one seed or all."""
    paths = folder.glob(f"{label}-seed{'*' if seed is None else seed}.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
