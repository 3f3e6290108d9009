"""`mllm-audio generate`, `chat`, `info`, `push` and `demo`: what to do with a voice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import BASE, COUNT, PATH, cli


class SamplerOption(click.Option):
    """An option whose help lists the samplers, which are not imported before it is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Fill the names in."""
        from mllm_audio.diffusion.samplers import NOISE_SAMPLERS, VELOCITY_SAMPLERS

        noise, velocity = ", ".join(NOISE_SAMPLERS), ", ".join(VELOCITY_SAMPLERS)
        self.help = (
            f"Of head ddpm: {noise}; of head flow: {velocity}. By default each head's first."
        )
        return super().get_help_record(ctx)


@cli.command()
@click.argument("run", type=PATH)
@click.argument("captions", nargs=-1, metavar="[CAPTION]...")
@click.option(
    "--captions",
    "file",
    type=PATH,
    help="A manifest or .txt instead: a sound per row, named after its recording, in the folder "
    "OUT; the same command continues.",
)
@click.option("--split", help="Rows of this split of --captions only.")
@click.option("--limit", type=COUNT, help="At most so many rows of --captions.")
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="A .wav or .flac file for one caption, else a folder.",
)
@click.option("--seconds", type=float, help="Exact duration; by default the model decides.")
@click.option("--num-inference-steps", type=int, help="Head calls per latent.")
@click.option("--final-inference-steps", type=int, help="The same at the last latent of a sound.")
@click.option("--tokens-per-step", type=int, help="Latents drawn at once; 4 are a column.")
@click.option("--guidance-scale", type=float, help="MAR's s: 1 is no guidance.")
@click.option("--guidance-weight", type=float, help="The paper's w = s - 1: 0 is no guidance.")
@click.option("--guidance-schedule", help="constant, linear (MAR's rise) or annealed (the paper).")
@click.option("--temperature", type=float, help="Scales the sampling noise.")
@click.option("--decoding-order", help="Of AudioMAR: random or causal.")
@click.option("--decoding-steps", type=int, help="Of AudioMAR: passes over a clip.")
@click.option("--sampler", cls=SamplerOption)
@click.option("--eta", type=float, help="Of sampler ddim: 0 adds no noise, 1 that of ddpm.")
@click.option("--seed", type=int, default=0, help="Of the first caption; the next has seed + 1.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option(
    "--dtype", default="float32", show_default=True, help="Of the weights; bfloat16 or int8."
)
@click.option("--conditioner", help="Where a conditioner's folders are now, if they moved.")
@BASE
def generate(
    run: Path,
    captions: tuple[str, ...],
    file: Path | None,
    split: str | None,
    limit: int | None,
    out: Path,
    **options: Any,
) -> None:
    """Generate one sound per CAPTION with the model in RUN."""
    from mllm_audio.data.requests import read_requests
    from mllm_audio.generation.requests import generate_requests
    from mllm_audio.generation.voice import Voice
    from mllm_audio.generation.write import generate_to_files, output_paths, write_captions

    if bool(captions) == (file is not None) or (file is None and (split or limit)):
        raise ValueError("expected captions, or --captions FILE with --split and --limit")
    seed, batch_size = options.pop("seed"), options.pop("batch_size")
    if file is None:
        paths = output_paths(out, len(captions))
    else:
        requests = read_requests(file, seed=seed, split=split, limit=limit)
    if options["guidance_scale"] is not None and options["guidance_weight"] is not None:
        raise ValueError(
            "found both --guidance-scale and --guidance-weight, expected one: s = 1 + w"
        )
    voice = Voice.load(
        run, options.pop("base"), conditioner=options.pop("conditioner"), dtype=options.pop("dtype")
    )
    given = {key: value for key, value in options.items() if value is not None}
    if "guidance_scale" in given:
        given["guidance_weight"] = None
    config = replace(voice.defaults, **given)
    if file is not None:
        click.echo(
            f"{len(generate_requests(voice, run, requests, out, config, batch_size))} sounds"
        )
        return
    generate_to_files(voice, captions, paths, config, seed, batch_size)
    if paths[0] != out:
        write_captions(captions, paths, seed)
    for path in paths:
        click.echo(path)


@cli.command()
@click.argument("run", type=PATH)
@click.option(
    "--out",
    type=PATH,
    default=Path("chat"),
    show_default=True,
    help="Folder for the sounds; nothing in it is overwritten.",
)
@BASE
@click.option("--system", help="A message from the system, before yours.")
@click.option("--temperature", type=float, help="Of the text: 0 takes the likeliest, 1 samples.")
@click.option("--top-p", type=float, help="Sample text within this total probability.")
@click.option("--max-new-tokens", type=int, help="Longest text of a reply.")
@click.option("--guidance-scale", type=float, help="Of the sound, MAR's s: 1 is no guidance.")
@click.option("--play", is_flag=True, help="Play each sound with aplay, paplay, afplay or ffplay.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first reply.")
def chat(run: Path, out: Path, **options: Any) -> None:
    """Talk with the model in RUN, which answers in text and sound.

    A line is a message; /audio PATH [TEXT] sends a recording. Reads a pipe too.
    """
    from mllm_audio.chat import run_chat

    run_chat(run, out, **options)


@cli.command()
@click.argument("name", metavar="RUN|PRESET")
@BASE
def info(name: str, base: str | None) -> None:
    """Print the components of a run folder or preset and their parameter counts."""
    from mllm_audio.info import describe

    click.echo(describe(name, base))


@cli.command()
@click.argument("run", type=PATH)
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Of a new repository.")
@click.option("--revision", help="Branch to commit to.")
def push(run: Path, repo_id: str, private: bool, revision: str | None) -> None:
    """Upload the voice in RUN to the Hugging Face hub, with a model card."""
    from mllm_audio.hub import push_to_hub

    click.echo(push_to_hub(run, repo_id, private=private or None, revision=revision))


@cli.command()
@click.option("--out", type=PATH, default=Path("runs/demo"), show_default=True)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), help="Training; else the preset's."
)
@click.option("--clips", type=COUNT, default=6000, show_default=True, help="To train on.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out: Path, minutes: float | None, clips: int, seed: int) -> None:
    """Make soundscapes, train the tiny preset on them, generate, and write OUT/report.html."""
    from mllm_audio.demo import run_demo

    run_demo(out, minutes=minutes, num_train=clips, seed=seed)
