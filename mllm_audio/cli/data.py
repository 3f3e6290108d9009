"""`mllm-audio prepare`: recordings to latents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import PATH, cli


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
