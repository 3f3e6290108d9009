"""Measure every sampler of a digits run against its head calls: judge accuracy, Frechet distance.

    python scripts/sampler_tradeoff.py RUN --recordings DATA --out OUT [--steps 2,4,8,16,32,100]

The head is not trained again: the same weights, seeds, captions and guidance for every setting, so
that the sampler and the number of its steps are all that differs. Head calls are counted at the
network, the two branches of guidance as one; `--falling SHARE` measures each setting again with the
steps of the last latent SHARE of those of the first, and draws OUT/falling_*.svg. The judge is
`digits_judge.py`. Writes OUT/tradeoff.json, OUT/accuracy.svg and OUT/frechet.svg after each
setting; the same command continues. The clips of a setting are in a folder of OUT named after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_audio.data.timing import machine_facts
from mllm_audio.diffusion.samplers import NOISE_SAMPLERS, VELOCITY_SAMPLERS
from mllm_audio.files import write_atomic
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.voice import Voice
from mllm_audio.generation.write import generate_to_files
from mllm_audio.reproduce.figures import Point, chart

OF_HEAD = {"ddpm": NOISE_SAMPLERS, "flow": VELOCITY_SAMPLERS}
FIGURES = {  # file: (key of a row, title)
    "accuracy.svg": ("digits", "digits the judge hears right, %"),
    "frechet.svg": ("fd_digits_judge", "Frechet distance of the judge's embeddings"),
}
CALLS = "head calls per latent, mean (log)"


@dataclass(frozen=True)
class Setting:
    """One point of the figures."""

    sampler: str
    steps: int  # at the first latent
    final_steps: int | None  # at the last; None: the same

    @property
    def name(self) -> str:
        """Name of its folder."""
        falling = "" if self.final_steps is None else f"-{self.final_steps}"
        return f"{self.sampler}-{self.steps}{falling}"


def settings_of(
    samplers: Sequence[str], steps: Sequence[int], share: float | None
) -> list[Setting]:
    """List what is measured: samplers of several calls a step in fewer steps, to cost alike."""
    settings = []
    for name in samplers:
        per_step = {**NOISE_SAMPLERS, **VELOCITY_SAMPLERS}[name].calls_per_step
        least = 2 if name in NOISE_SAMPLERS else 1
        for number in sorted({max(least, calls // per_step) for calls in steps}):
            settings.append(Setting(name, number, None))
            final = max(least, round((share or 1) * number))
            if final < number:
                settings.append(Setting(name, number, final))
    return settings


def requests_of(recordings: Path, count: int) -> list[dict[str, str]]:
    """Ask for every (speaker, label) in turn until there are `count` rows, in words of the data."""
    text = (recordings / "captions.jsonl").read_text()
    captions: dict[tuple[str, str], str] = {}
    for row in map(json.loads, text.splitlines()):
        caption = row.get("captions", [row["caption"]])[0]
        captions.setdefault((row["speaker"], row["label"]), caption)
    pairs = sorted(captions)
    return [
        {
            "audio": f"wav/{index:04}.wav",
            "caption": captions[speaker, label],
            "label": label,
            "speaker": speaker,
        }
        for index in range(count)
        for speaker, label in [pairs[index % len(pairs)]]
    ]


def generate(
    voice: Voice, rows: Sequence[dict[str, str]], config: GenerationConfig, out: Path, seed: int
) -> float:
    """Write the clips of `rows` to `out`; return the head calls per latent that they took."""
    head: Any = voice.model.audio.head
    network = head.network
    calls: list[int] = []
    embedded: list[int] = []  # conditions, once per latent
    hooks = [
        network.register_forward_hook(lambda *_: calls.append(1)),
        network.condition_projection.register_forward_hook(lambda *_: embedded.append(1)),
    ]
    (out / "wav").mkdir(parents=True, exist_ok=True)
    paths = [out / row["audio"] for row in rows]
    captions = [row["caption"] for row in rows]
    try:
        generate_to_files(voice, captions, paths, config, seed, batch_size=50)
    finally:
        for hook in hooks:
            hook.remove()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(out / "captions.jsonl", text.encode())
    return len(calls) / len(embedded)


def judge(recordings: Path, generated: Path, cache: Path) -> dict[str, Any]:
    """Let the judge listen; return its report.

    Raises:
        SystemExit: if the judge fails, or does not hear recordings well enough to be believed.
    """
    report = generated / "report.json"
    script = Path(__file__).with_name("digits_judge.py")
    command = [sys.executable, str(script), "--recordings", str(recordings)]
    command += ["--generated", str(generated), "--out", str(report), "--cache", str(cache)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr.strip()}")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def kept_rows(file: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Read what an earlier run of the same command measured.

    Raises:
        SystemExit: if the file is of another command.
    """
    kept: dict[str, Any] = {"asked": asked, "rows": []}
    if file.is_file():
        kept = json.loads(file.read_text())
    if kept["asked"] != asked:
        raise SystemExit(f"{file} is of {kept['asked']}, asked for {asked}; type another --out")
    return kept


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw both figures, a line per sampler, and both of the settings whose steps fall."""
    for file, (key, title) in FIGURES.items():
        lines: dict[str, dict[str, list[Point]]] = {}
        for row in sorted(rows, key=lambda row: row["head_calls"]):
            name = file if row["final_steps"] is None else f"falling_{file}"
            line = lines.setdefault(name, {}).setdefault(row["sampler"], [])
            line.append(Point(row["head_calls"], row[key]))
        for name, found in lines.items():
            write_atomic(out / name, chart(found, CALLS, title, log_x=True).encode())


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained digits run")
    parser.add_argument("--recordings", type=Path, required=True, help="holds captions.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="2,4,8,16,32,100", help="head calls per latent")
    parser.add_argument("--samplers", help="names with commas; by default all of the run's head")
    parser.add_argument("--falling", type=float, metavar="SHARE", help="of the steps, at the end")
    parser.add_argument("--count", type=int, default=200, help="clips of each setting")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.falling is not None and not 0 < arguments.falling < 1:
        parser.error(f"--falling is {arguments.falling}; type a share between 0 and 1, such as 0.2")
    return arguments


def main() -> None:
    """Generate, judge and draw, a setting at a time."""
    arguments = parse()
    voice = Voice.load(arguments.run)
    head = voice.model.audio.config.head.name
    samplers = arguments.samplers.split(",") if arguments.samplers else list(OF_HEAD[head])
    if unknown := set(samplers) - set(OF_HEAD[head]):
        raise SystemExit(f"head {head} has no sampler {sorted(unknown)}; of {list(OF_HEAD[head])}")
    steps = [int(part) for part in arguments.steps.split(",")]
    requests = requests_of(arguments.recordings, arguments.count)
    asked = {"count": arguments.count, "seed": arguments.seed, "run": str(arguments.run)}
    file = arguments.out / "tradeoff.json"
    kept = kept_rows(file, asked)
    done = {row["setting"]: row for row in kept["rows"]}
    for setting in settings_of(samplers, steps, arguments.falling):
        if setting.name in done:
            continue
        folder = arguments.out / setting.name
        config = replace(
            voice.defaults,
            sampler=setting.sampler,
            num_inference_steps=setting.steps,
            final_inference_steps=setting.final_steps,
            eta=0.0,
        )
        calls = generate(voice, requests, config, folder, arguments.seed)
        report = judge(arguments.recordings, folder, arguments.out)
        row = {"setting": setting.name, "sampler": setting.sampler, "head_calls": round(calls, 3)}
        row |= {"steps": setting.steps, "final_steps": setting.final_steps, **report}
        done[setting.name] = row
        kept |= {"machine": machine_facts(), "rows": list(done.values())}
        write_atomic(file, (json.dumps(kept, indent=1) + "\n").encode())
        draw(kept["rows"], arguments.out)
        print(
            f"{setting.name}: {calls:.4g} head calls, {row['digits']} % of the digits, "
            f"Frechet distance {row['fd_digits_judge']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
