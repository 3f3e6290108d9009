"""A run folder belongs to one run: its settings, its data, and one set of processes at a time."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mllm_audio.config import read_json, to_dict
from mllm_audio.files import locked, write_atomic
from mllm_audio.presets import RunConfig
from mllm_audio.training.distributed import World

RUN_FILE, LOCK = "run.json", ".lock"
# A resumed run may be lengthened, watched or (`generation.`) sampled differently, fitted to another
# machine, or continued past numbers that stopped it; anything else would make it another run.
MAY_CHANGE = (
    "base",  # may have moved; its fingerprint may not differ
    "train.num_steps",
    "train.max_minutes",
    "train.log_every",
    "train.validate_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.max_abs_latent",
    "train.optim.lr",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.timeout_seconds",
    "train.wandb_project",
    "train.peak_tflops",
    "data.prefetch_steps",
    "data.cache_dir",
    "data.cache_gib",
)


@contextmanager
def claimed(
    out: Path, config: RunConfig, facts: dict[str, Any], world: World | None = None
) -> Iterator[None]:
    """Hold RUN for these processes, with RUN/run.json written or checked to be this run.

    Raises:
        ValueError: if another run is training there, naming the settings that differ, or not all
            processes see the folder.
    """
    world = world or World()
    values = json.loads(json.dumps({**to_dict(config), **facts}))
    with ExitStack() as stack:

        def claim() -> str:
            out.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training in {out}; wait for it, or type another --out"
            lock = stack.enter_context(locked(out / LOCK, busy))
            check_same_run(out, values)
            write_atomic(out / RUN_FILE, (json.dumps(values, indent=2) + "\n").encode())
            token = uuid.uuid4().hex
            lock.truncate(0)
            lock.write(token)
            lock.flush()
            os.fsync(lock.fileno())  # other nodes read it
            return token

        token = world.first(claim)

        def see() -> None:
            path = out / LOCK
            if not path.is_file() or path.read_text() != token:
                raise ValueError(
                    f"process {world.rank} on {socket.gethostname()} does not see {out} as the "
                    "first one does; type an --out on a file system that all nodes share"
                )

        world.each(see)
        yield


def check_same_run(out: Path, values: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings or data.

    Raises:
        ValueError: naming what differs.
    """
    path = out / RUN_FILE
    if not path.is_file():
        return
    before, now = flat(read_json(path, "type another --out")), flat(values)
    differ = [
        key
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
        and key not in MAY_CHANGE
        and not key.startswith("generation.")
    ]
    if differ:
        shown = ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in differ[:3])
        raise ValueError(
            f"{out} holds another run ({shown}); type another --out, or delete that folder"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to `section.key` names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
