"""Every ZeRO stage against the plain engine, through the command line: the table of CHANGELOG.md.

    python scripts/zero_matrix.py OUT

Trains the tiny preset (6.3 M parameters) for 20 steps of 16 built-in soundscapes, in micro-batches
of 8: plain, then with DeepSpeed stages 0 to 3 on one process and on two, in float32, and stages 1
to 3 in bf16. Each run is also stopped after 10 steps and resumed. Prints, as Markdown, the largest
difference of the losses to the plain float32 run, that between the resumed run's weights, averages
and moments and the uninterrupted one's, and the wall time of the whole run with its start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from mllm_audio.data.soundscapes import write_soundscapes
from mllm_audio.training.checkpoint import KINDS, list_checkpoints, read_weights
from mllm_audio.training.log import read_log

STEPS = 20
SETTINGS = [
    f"train.num_steps={STEPS}", "train.max_minutes=none", "train.batch_size=16",
    "train.micro_batch_size=8", "train.log_every=1", "train.save_every=10",
    "train.optim.warmup_steps=1", "train.optim.schedule=constant", "backbone.dropout=0.1",
]  # fmt: skip
CASES = [("float32", s) for s in (0, 1, 2, 3)] + [("bf16", s) for s in (1, 2, 3)]


def main(out: Path) -> None:
    """Run all cases in `out`, and print the table."""
    out.mkdir(parents=True)
    write_soundscapes(out / "sounds", 160, 8, seed=0)
    call("prepare", out / "sounds/manifest.jsonl", "--out", out / "data", "--max-seconds", "2.56")
    seconds = train(out, out / "plain", "float32", None, 1)
    expected = losses(out / "plain")
    print(f"plain float32: {seconds:.1f} s, loss {expected[0]:.4f} to {expected[-1]:.4f}\n")
    print("| precision | stage | processes | loss difference | resume difference | wall time |")
    print("|---|---|---|---|---|---|")
    for precision, stage in CASES:
        for processes in (1, 2):
            run = out / f"{precision}-{stage}-{processes}"
            halves = run.with_name(run.name + "-halves")
            seconds = train(out, run, precision, stage, processes)
            train(out, halves, precision, stage, processes, f"train.num_steps={STEPS // 2}")
            train(out, halves, precision, stage, processes)
            loss = max(abs(a - b) for a, b in zip(losses(run), expected, strict=True))
            print(
                f"| {precision} | {stage} | {processes} | {loss:.1e} | "
                f"{state_difference(run, halves):.1e} | {seconds:.1f} s |",
                flush=True,
            )


def train(
    out: Path, run: Path, precision: str, stage: int | None, processes: int, *more: str
) -> float:
    """Train one run through the command line; return its seconds."""
    arguments = ["train", "--preset", "tiny", "--data", out / "data", "--out", run]
    if stage is not None:
        zero: dict[str, object] = {"zero_optimization": {"stage": stage}}
        if precision == "bf16":
            zero |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        path = out / f"{precision}-{stage}.json"
        path.write_text(json.dumps(zero))
        arguments += ["--deepspeed", path]
    started = time.monotonic()
    settings = [f"train.precision={precision}", *SETTINGS, *more]
    call(*arguments, *settings, processes=0 if stage is None else processes)
    return time.monotonic() - started


def call(*arguments: object, processes: int = 0) -> None:
    """Run a command of the package, under torchrun if there are processes to start."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes else []), "-m", "mllm_audio"]
    subprocess.run([*command, *map(str, arguments)], check=True, capture_output=True)


def losses(run: Path) -> list[float]:
    """Read the audio losses of all steps."""
    return [r["train/audio_loss"] for r in read_log(run) if "train/audio_loss" in r]


def state_difference(first: Path, second: Path) -> float:
    """Compare all that the last checkpoints of two runs hold."""
    largest = 0.0
    for kind in KINDS:
        a, b = (read_weights(list_checkpoints(run)[-1], kind) for run in (first, second))
        largest = max(largest, *(float((a[k] - b[k]).abs().max()) for k in a))
    return largest


if __name__ == "__main__":
    main(Path(sys.argv[1]))
