"""`mllm-audio train`, `add-voice`, `distill`, `merge` and `export`: prepared data to a voice."""

from __future__ import annotations

from pathlib import Path

import click

from mllm_audio.cli.group import BASE, COUNT, DEEPSPEED, PATH, cli


@cli.command()
@click.option("--preset", required=True, help="Name of a preset; `mllm-audio info NAME` shows one.")
@click.option("--data", required=True, help="Folder or URL of what prepare wrote.")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@DEEPSPEED
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def train(
    preset: str, data: str, out: Path, deepspeed: Path | None, overrides: tuple[str, ...]
) -> None:
    """Train a preset; the same command again resumes where it stopped."""
    from mllm_audio.config import override
    from mllm_audio.presets import get_preset
    from mllm_audio.run import train_run
    from mllm_audio.training.cluster import joined_cluster

    config = override(get_preset(preset), overrides)
    with joined_cluster(deepspeed, config.train) as cluster:
        train_run(config, data, out, cluster, click.echo)
        if not cluster.world.is_first:
            return
    click.echo(f'trained: type  mllm-audio generate {out} "YOUR CAPTION" --out sound.wav')


@cli.command("add-voice")
@click.argument("base", metavar="BASE")
@click.option("--out", type=PATH, required=True, help="Folder of the voice.")
@click.option(
    "--data",
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
@DEEPSPEED
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def add_voice(
    base: str,
    out: Path,
    data: str | None,
    lora: bool,
    full: bool,
    replay: Path | None,
    held_out_text: Path | None,
    preset: str,
    deepspeed: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Give the language model BASE (a folder or hub id) a voice, and train it on DATA.

    The same command again resumes where it stopped.
    """
    from mllm_audio.add_voice import add_voice as write_untrained
    from mllm_audio.add_voice import train_added_voice, voice_config
    from mllm_audio.config import override
    from mllm_audio.presets import get_preset
    from mllm_audio.training.cluster import joined_cluster

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
    if "://" in data:
        raise ValueError(f"found --data {data}, expected a folder: add-voice reads no URL")
    with joined_cluster(deepspeed, config.train) as cluster:
        drift = train_added_voice(
            config, Path(data), out, replay=replay, held_out=held_out_text, cluster=cluster
        )
        if not cluster.world.is_first:
            return
    if drift is not None:
        click.echo(str(drift))
    click.echo(f"trained: type  mllm-audio chat {out}")


@cli.command()
@click.argument("run", type=PATH)
@click.option("--data", required=True, help="Folder or URL of what prepare wrote, as RUN's was.")
@click.option("--out", type=PATH, required=True, help="Folder of the distilled voice.")
@click.option(
    "--guidance-scale",
    type=float,
    help="s in uncond + s (cond - uncond), on RUN's schedule; by default RUN's own guidance.",
)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def distill(
    run: Path, data: str, out: Path, guidance_scale: float | None, overrides: tuple[str, ...]
) -> None:
    """Train the head of RUN to give in one branch what guidance makes of two: half the work.

    The same command again resumes where it stopped.
    """
    from mllm_audio.distill import distill as train_distilled

    train_distilled(run, data, out, guidance_scale=guidance_scale, overrides=overrides)
    click.echo(f'distilled: type  mllm-audio generate {out} "YOUR CAPTION" --out sound.wav')


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
@click.option("--out", type=PATH, required=True, help="New folder.")
@click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    default="ema",
    show_default=True,
    help="The averages, or the weights of the last step.",
)
@click.option("--step", type=COUNT, help="Of the checkpoint; by default the newest.")
@BASE
def export(run: Path, out: Path, weights: str, step: int | None, base: str | None) -> None:
    """Write a checkpoint of RUN, from any number of processes, as a Hugging Face folder."""
    from mllm_audio.export import export as write_export

    checkpoint = write_export(run, out, weights, step, base)
    click.echo(f"{out}: {weights} weights of {checkpoint}")
