"""Run under torchrun by test_zero.py: a file of jobs, one after another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from test_zero import start

from mllm_audio.training.cluster import Cluster
from mllm_audio.training.zero import join_world, leave_world
from mllm_audio.training.zero_config import read_zero_config

jobs = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
world = join_world(60)
for job in jobs:
    try:
        start(job, Cluster(world, read_zero_config(Path(job["zero"]))))
        outcome = "done"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"

    if world.is_first:
        print("JOB", json.dumps({"name": job["name"], "outcome": outcome}), flush=True)
leave_world()
