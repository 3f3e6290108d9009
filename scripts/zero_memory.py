"""Measured memory of a process per preset and ZeRO stage: the table of README.md.

    python scripts/zero_memory.py OUT base_193m large_462m=2,3,3_offload

Each case trains two steps on two processes with bf16 weights (stage 0: float32 weights in
autocast), one clip of 10.24 s at a time, unmasked, and reads `memory/host_gib`, the most that the
first process took, from its log. What Python, torch and DeepSpeed take before there is a model is
measured by a model of next to no size and subtracted. After a preset's name stand the stages to
measure, by default all. Prints Markdown.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mllm_audio.bench import write_synthetic
from mllm_audio.training.log import read_log

TRAIN = [
    "train.num_steps=2", "train.max_minutes=none", "train.batch_size=2", "train.log_every=1",
    "train.micro_batch_size=1", "masking.schedule=ntp", "data.prefetch_steps=0",
]  # fmt: skip
NOTHING = [
    "backbone.hidden_size=32", "backbone.num_layers=1", "backbone.num_heads=1",
    "audio.head.width=32", "audio.head.num_blocks=1",
]  # fmt: skip
STAGES = ("0", "1", "2", "3", "3_offload")


def main(out: Path, presets: list[str]) -> None:
    """Measure the presets in `out`, and print the table."""
    out.mkdir(parents=True)
    write_synthetic(out / "data", 0.05)
    print("| preset | " + " | ".join(f"stage {stage}" for stage in STAGES) + " |")
    print("|---" * (len(STAGES) + 1) + "|")
    empty = {stage: measure(out, "base_193m", stage, NOTHING) for stage in STAGES}
    for argument in presets:
        preset, _, stages = argument.partition("=")
        cells = ["-"] * len(STAGES)
        for stage in stages.split(",") if stages else STAGES:
            taken = measure(out, preset, stage, []) - empty[stage]
            cells[STAGES.index(stage)] = f"{taken:.2f}"
        print(f"| {preset} | " + " | ".join(cells) + " |", flush=True)


def measure(out: Path, preset: str, stage: str, more: list[str]) -> float:
    """Return the most memory, GiB, that the first of two processes took in two steps."""
    config = Path("configs/deepspeed") / f"zero{stage}.json"
    if stage == "0":
        config = out / "zero0.json"
        config.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    run = out / f"{preset}-{stage}-{len(more)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "mllm_audio", "train", "--preset", preset, "--data", str(out / "data")]
    command += ["--out", str(run), "--deepspeed", str(config), *TRAIN, *more]
    subprocess.run(command, check=True, capture_output=True)
    return max(r["memory/host_gib"] for r in read_log(run) if "memory/host_gib" in r)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
