"""The command line: parse, call one function, print.

A user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

# `import mllm_audio.cli` loads neither torch nor transformers: each command imports what it runs.


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
BASE = click.option("--base", help="Where an adapter's base model is now, if it moved.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mllm-audio")
def cli() -> None:
    """Audio as an output of a Hugging Face causal LM."""


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


@cli.command()
@click.argument("manifest", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the shards.")
@click.option(
    "--tokenizer", default="dct", show_default=True, help="dct, or audioldm:FOLDER_OR_HUB_ID."
)
@click.option("--max-seconds", type=float, default=10.24, show_default=True, help="Longest clip.")
@click.option(
    "--crop", default="head", show_default=True, help="Of longer files: head, random, or reject."
)
@click.option(
    "--longest-file-seconds",
    type=float,
    default=3600.0,
    show_default=True,
    help="Longer files are rejected unread.",
)
@click.option(
    "--validation-share",
    type=float,
    default=0.02,
    show_default=True,
    help="Where no row names a split.",
)
@click.option(
    "--shard-size", type=int, default=512, show_default=True, help="Manifest rows per shard."
)
@click.option(
    "--num-workers",
    type=click.IntRange(min=0),
    default=min(os.cpu_count() or 1, 8),
    show_default=True,
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random crops.")
def prepare(manifest: Path, out: Path, **options: Any) -> None:
    """Encode the recordings of MANIFEST to latents.

    MANIFEST is JSONL or CSV of {audio, caption, split?}, or JSONL of conversations {messages,
    split?} whose content has parts {"type": "audio", "audio": PATH}.

    Stopped at any moment, the same command continues. Files that cannot be used are named with
    their reason in OUT/rejected.jsonl.
    """
    from mllm_audio.data.prepare import prepare as run_prepare

    report = run_prepare(manifest, out, options.pop("tokenizer"), **options)
    click.echo(str(report))


@cli.command()
@click.option("--preset", required=True, help="Name of a preset; `mllm-audio info NAME` shows one.")
@click.option("--data", type=PATH, required=True, help="Folder that prepare wrote.")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def train(preset: str, data: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """Train a preset; the same command again resumes where it stopped."""
    from mllm_audio.config import override
    from mllm_audio.presets import get_preset
    from mllm_audio.run import train_run

    train_run(override(get_preset(preset), overrides), data, out)
    click.echo(f'trained: type  mllm-audio generate {out} "YOUR CAPTION" --out sound.wav')


@cli.command("add-voice")
@click.argument("base", metavar="BASE")
@click.option("--out", type=PATH, required=True, help="Folder of the voice.")
@click.option(
    "--data",
    type=PATH,
    help="Folder that prepare wrote, of conversations or captions; without it the voice is "
    "written untrained.",
)
@click.option("--lora", is_flag=True, help="Train LoRA layers; by default BASE stays as it is.")
@click.option("--full", is_flag=True, help="Train all of BASE.")
@click.option(
    "--replay",
    type=PATH,
    help="JSONL of {text} or {messages}, mixed in so that text ability stays.",
)
@click.option(
    "--held-out-text",
    type=PATH,
    help="JSONL of {text}, or a .txt: report its perplexity under BASE and the voice.",
)
@click.option("--preset", default="voice", show_default=True, help="voice or voice_digits.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def add_voice(
    base: str,
    out: Path,
    data: Path | None,
    lora: bool,
    full: bool,
    replay: Path | None,
    held_out_text: Path | None,
    preset: str,
    overrides: tuple[str, ...],
) -> None:
    """Give the language model BASE (a folder or hub id) a voice, and train it on DATA.

    The same command again resumes where it stopped.
    """
    from mllm_audio.add_voice import add_voice as write_untrained
    from mllm_audio.add_voice import train_added_voice, voice_config
    from mllm_audio.config import override
    from mllm_audio.presets import get_preset

    made = voice_config(get_preset(preset), base, lora=lora, full=full)
    config = override(made, overrides)
    if (config.base, config.backbone) != (made.base, made.backbone):
        raise ValueError("found base= or backbone= among the settings; the model is BASE alone")
    if data is None:
        if replay or held_out_text:
            raise ValueError("found --replay or --held-out-text without --data; type --data DIR")
        write_untrained(config, out)
        click.echo(
            f"untrained voice in {out}: type  mllm-audio add-voice {base} --data DATA --out RUN"
        )
        return
    _, drift = train_added_voice(config, data, out, replay=replay, held_out=held_out_text)
    if drift is not None:
        click.echo(str(drift))
    click.echo(f"trained: type  mllm-audio chat {out}")


@cli.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, required=True, help="New folder.")
@BASE
def merge(run: Path, out: Path, base: str | None) -> None:
    """Merge the adapter in RUN into its base model: a standalone checkpoint in OUT."""
    from mllm_audio.add_voice import merge as write_merged

    write_merged(run, out, base)
    click.echo(out)


@cli.command()
@click.argument("run", type=PATH)
@click.argument("captions", nargs=-1, required=True, metavar="CAPTION...")
@click.option(
    "--out",
    type=PATH,
    required=True,
    help="A .wav or .flac file for one caption, else a folder.",
)
@click.option("--seconds", type=float, help="Exact duration; by default the model decides.")
@click.option("--num-inference-steps", type=int, help="Head calls per latent.")
@click.option("--guidance-scale", type=float, help="MAR's s: 1 is no guidance.")
@click.option("--guidance-weight", type=float, help="The paper's w = s - 1: 0 is no guidance.")
@click.option("--temperature", type=float, help="Scales the sampling noise.")
@click.option("--sampler", help="ddpm, euler or midpoint; the head's own by default.")
@click.option("--seed", type=int, default=0, help="Of the first caption; the next has seed + 1.")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@BASE
def generate(run: Path, captions: tuple[str, ...], out: Path, **options: Any) -> None:
    """Generate one sound per CAPTION with the model in RUN."""
    from mllm_audio.generation.voice import Voice
    from mllm_audio.generation.write import generate_to_files, output_paths, write_captions

    paths = output_paths(out, len(captions))
    if options["guidance_scale"] is not None and options["guidance_weight"] is not None:
        raise ValueError(
            "found both --guidance-scale and --guidance-weight, expected one: s = 1 + w"
        )
    seed, batch_size = options.pop("seed"), options.pop("batch_size")
    voice = Voice.load(run, options.pop("base"))
    given = {key: value for key, value in options.items() if value is not None}
    if "guidance_scale" in given:
        given["guidance_weight"] = None
    generate_to_files(voice, captions, paths, replace(voice.defaults, **given), seed, batch_size)
    if paths[0] != out:
        write_captions(captions, paths, seed)
    for path in paths:
        click.echo(path)


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


def main() -> None:
    """Run the command line; the entry point of `mllm-audio`."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; type the same command again to continue", 130)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()) + _hint(error), 2)
    except KeyboardInterrupt as error:
        _fail(
            f"interrupted {error}; type the same command again to continue".replace(" ;", ";"), 130
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("MLLM_AUDIO_TRACEBACK"):
            traceback.print_exc()
        _fail(" ".join(str(error).split()) or type(error).__name__, 2)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _hint(error: click.ClickException) -> str:
    """Say which help to type after a usage error."""
    context = getattr(error, "ctx", None)
    return f" (type {context.command_path} --help)" if context else ""


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
