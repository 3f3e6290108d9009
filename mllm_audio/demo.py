"""`mllm-audio demo`: from nothing to a page of generated sounds, in minutes."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import click

from mllm_audio import wav
from mllm_audio.build import count_parameters
from mllm_audio.config import read_json
from mllm_audio.data.clips import PreparedClip, load_split
from mllm_audio.data.prepare import prepare
from mllm_audio.data.soundscapes import write_soundscapes
from mllm_audio.evaluation.adherence import AdherenceReport, adherence, recognise
from mllm_audio.evaluation.report import Pair, loss_chart, side_by_side, write_page
from mllm_audio.generation.voice import Voice
from mllm_audio.generation.write import generate_to_files, output_paths
from mllm_audio.presets import RunConfig, tiny
from mllm_audio.run import train_run
from mllm_audio.training.log import read_log

NUM_HELD_OUT = 80  # captions of combinations that training never sees


def run_demo(
    out: Path, *, minutes: float | None = None, num_train: int = 6000, seed: int = 0
) -> AdherenceReport:
    """Run the whole demonstration in the folder `out`; it can be stopped and started again.

    Args:
        out: receives the run, the sounds and `report.html`.
        minutes: training time, instead of the preset's.
        num_train: soundscapes to train on.
        seed: of the data, the weights and the samples.

    Returns:
        The caption adherence of the generated clips.
    """
    started = time.monotonic()
    config = tiny()
    config = replace(config, train=replace(config.train, seed=seed))
    if minutes is not None:
        config = replace(config, train=replace(config.train, max_minutes=minutes))
    sounds, data = out / "soundscapes", out / "data"
    _say(1, f"rendering {num_train + NUM_HELD_OUT} soundscapes to {sounds}")
    _render(sounds, num_train, seed)
    _say(2, f"encoding them to {data}")
    max_seconds = config.audio.max_seconds
    prepare(sounds / "manifest.jsonl", data, "dct", max_seconds=max_seconds, num_workers=2)
    _say(3, f"training {config.preset} for at most {config.train.max_minutes:g} minutes in {out}")
    train_run(config, data, out)
    voice = Voice.load(out)
    _say(4, f"generating {NUM_HELD_OUT} held-out captions")
    held_out = load_split(data, "test", verify=False)
    pairs = _generate(voice, held_out, sounds, out / "generated", seed)
    _say(5, "listening")
    real = adherence((pair.reference_clip, pair.label) for pair in pairs)
    generated = adherence((pair.generated_clip, pair.label) for pair in pairs)
    summary = _summary(config, voice, real, generated, (time.monotonic() - started) / 60)
    records = read_log(out)
    charts = [
        loss_chart(records, ["train/audio_loss", "validation/audio_loss"]),
        loss_chart(records, ["train/end_loss", "validation/end_loss"]),
    ]
    picture = side_by_side(
        [clip for pair in pairs[:8] for clip in (pair.reference_clip, pair.generated_clip)], 4
    )
    picture.save(out / "spectrograms.png")
    page = out / "report.html"
    write_page(page, "mllm-audio demo", f"<p>{summary.replace(chr(10), '<br>')}</p>", charts, pairs)
    click.echo(f"{summary}\nsee and hear {page}")
    click.echo(
        f"caption adherence: {generated.all:.1%} of {generated.num_clips} held-out captions "
        f"(real soundscapes: {real.all:.1%})"
    )
    return generated


def _render(sounds: Path, num_train: int, seed: int) -> None:
    """Write the soundscapes, unless they are there already.

    Raises:
        ValueError: if the folder holds others.
    """
    settings = sounds / "settings.json"
    wanted = {"num_train": num_train, "num_held_out": NUM_HELD_OUT, "seed": seed}
    if settings.is_file():
        found = read_json(settings, f"delete {sounds}")
        if found != wanted:
            raise ValueError(
                f"{sounds} holds soundscapes of {found}, expected {wanted}; type another --out"
            )
        return
    partial = sounds.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_soundscapes(partial, num_train, NUM_HELD_OUT, seed=seed)
    (partial / settings.name).write_text(json.dumps(wanted) + "\n")
    partial.rename(sounds)


def _say(number: int, text: str) -> None:
    click.echo(f"[{number}/5] {text}")


def _generate(
    voice: Voice, clips: list[PreparedClip], sounds: Path, folder: Path, seed: int
) -> list[Pair]:
    """Generate the first caption of each clip beside its reference."""
    captions = [clip.captions[0] for clip in clips]
    paths = output_paths(folder, len(clips))
    generate_to_files(voice, captions, paths, voice.defaults, seed)
    pairs = []
    for clip, caption, path in zip(clips, captions, paths, strict=True):
        reference = wav.read(sounds / clip.name, voice.audio_tokenizer.sample_rate)
        generated = wav.read(path, voice.audio_tokenizer.sample_rate)
        events = recognise(generated.waveform, generated.sample_rate)
        pairs.append(
            Pair(
                caption=caption,
                label=clip.extra["label"],
                heard=" ".join(event.label for event in events),
                reference=sounds / clip.name,
                generated=path,
                reference_clip=reference,
                generated_clip=generated,
            )
        )
    return pairs


def _summary(
    config: RunConfig,
    voice: Voice,
    real: AdherenceReport,
    generated: AdherenceReport,
    minutes: float,
) -> str:
    """Say in words what was trained and how well it follows captions."""
    parameters = count_parameters(voice.model)["total"]
    return (
        f"preset {config.preset}, {parameters:,} parameters, {minutes:.1f} minutes in all\n"
        f"kinds {generated.kind:.1%}, pitches {generated.pitch:.1%}, counts {generated.count:.1%}, "
        f"order {generated.order:.1%} of generated clips; all right {generated.all:.1%} "
        f"(real soundscapes {real.all:.1%})"
    )
