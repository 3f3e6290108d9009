"""`mllm-audio import`: published datasets to manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import PATH, cli

OUT = click.option("--out", type=PATH, required=True, help="Folder for manifest.jsonl.")
CLIPS = click.option(
    "--audio", type=PATH, required=True, help="Folder of the clips, searched to any depth."
)


@cli.group("import")
def import_group() -> None:
    """Write the manifest of a published dataset, for `mllm-audio prepare`.

    Clips that are not there are named in missing.txt beside the manifest.
    """


@import_group.command()
@click.argument("annotations", type=PATH)
@CLIPS
@OUT
@click.option(
    "--ids", type=PATH, help="List of the test clips to keep: text, CSV or JSON (the 964 scored)."
)
def audiocaps(annotations: Path, audio: Path, out: Path, ids: Path | None) -> None:
    """Import AudioCaps: ANNOTATIONS is the folder of train.csv, val.csv and test.csv, or one.

    Clips are named by YouTube id and start, e.g. rqfQRErjfk8_170.wav, in seconds or milliseconds,
    with an end or without, or YrqfQRErjfk8.wav without a start.
    """
    from mllm_audio.data.importers.audiocaps import import_audiocaps

    click.echo(str(import_audiocaps(annotations, audio, out, ids)))


@import_group.command()
@click.argument("annotations", type=PATH)
@CLIPS
@OUT
@click.option(
    "--exclude",
    type=PATH,
    multiple=True,
    help="List of ids to leave out, e.g. WavCaps' blacklist/*.json. Repeatable.",
)
def wavcaps(annotations: Path, audio: Path, out: Path, exclude: tuple[Path, ...]) -> None:
    """Import WavCaps: ANNOTATIONS is the folder of as_final.json, fsd_final.json, ..., or one.

    Leave out the test clips of what you score on with --exclude: AudioSet_SL and FreeSound hold
    clips of AudioCaps, Clotho, ESC-50 and others.
    """
    from mllm_audio.data.importers.wavcaps import import_wavcaps

    click.echo(str(import_wavcaps(annotations, audio, out, exclude)))


@import_group.command()
@click.argument("annotations", type=PATH)
@CLIPS
@OUT
def clotho(annotations: Path, audio: Path, out: Path) -> None:
    """Import Clotho: ANNOTATIONS is the folder of clotho_captions_*.csv, or one of them."""
    from mllm_audio.data.importers.clotho import import_clotho

    click.echo(str(import_clotho(annotations, audio, out)))


@import_group.command()
@click.argument("source")
@OUT
@click.option("--audio-column", default="audio", show_default=True)
@click.option(
    "--caption-column", default="caption", show_default=True, help="Text, or lists of it."
)
@click.option("--name", help="Of the dataset's configuration, where it has several.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME[=OURS]",
    help="Splits to import, all by default; OURS is train, validation or test. Repeatable.",
)
def hf(source: str, out: Path, **options: Any) -> None:
    """Import a dataset of the Hugging Face library.

    SOURCE is a hub id, a folder from save_to_disk, or a folder of parquet or of sound files with
    metadata. Stopped at any moment, the same command continues.
    """
    try:
        from mllm_audio.data.importers.huggingface import import_huggingface
    except ImportError as error:
        raise ImportError(
            f"this import needs datasets ({error}); run: pip install 'mllm-audio[datasets]'"
        ) from error

    click.echo(str(import_huggingface(source, out, **options)))
