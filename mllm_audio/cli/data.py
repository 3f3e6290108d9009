"""`mllm-audio prepare`: recordings to latents."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mllm_audio.cli.group import PATH, cli


def _parse_shard(context: click.Context, option: click.Parameter, text: str) -> tuple[int, int]:
    """Read i/n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"found {text!r}, expected i/n with i from 1 to n, e.g. 3/16")
    return int(match[1]), int(match[2])


@cli.command()
@click.argument("sources", nargs=-1, required=True, type=PATH, metavar="MANIFEST | PART...")
@click.option("--out", type=PATH, required=True, help="Folder for the shards.")
@click.option(
    "--shard",
    default="1/1",
    callback=_parse_shard,
    metavar="i/n",
    help="Encode part i of n only, in a folder of its own.",
)
@click.option("--merge", is_flag=True, help="Join the n folders PART... of one manifest in OUT.")
@click.option(
    "--tokenizer", default="dct", show_default=True, help="dct, or audioldm:FOLDER_OR_HUB_ID."
)
@click.option(
    "--conditioner",
    help="Embed the captions too: clap_t5:clap=FOLDER,t5=FOLDER, or one of the two, or words.",
)
@click.option("--max-seconds", type=float, default=10.24, show_default=True, help="Longest clip.")
@click.option(
    "--crop", default="head", show_default=True, help="Of longer files: head, random, or reject."
)
@click.option(
    "--pad", is_flag=True, help="Shorter clips with silence to --max-seconds: the paper's models."
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
@click.pass_context
def prepare(
    context: click.Context,
    sources: tuple[Path, ...],
    out: Path,
    shard: tuple[int, int],
    merge: bool,
    **options: Any,
) -> None:
    """Encode the recordings of MANIFEST to latents.

    MANIFEST is JSONL or CSV of {audio, caption, split?}, or JSONL of conversations {messages,
    split?} whose content has parts {"type": "audio", "audio": PATH}.

    Stopped at any moment, the same command continues. Files that cannot be used are named with
    their reason in OUT/rejected.jsonl.

    On many machines, each prepares a part with --shard i/n; then --merge joins the parts in the
    folder that one machine would have made.
    """
    if merge:
        typed = [
            f"--{name.replace('_', '-')}"
            for name in ("shard", *options)
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        ]
        if typed:
            raise click.UsageError(
                f"found --merge and {typed[0]}, expected --out alone: the parts say how they were "
                f"prepared; leave out {typed[0]}"
            )
        from mllm_audio.data.merge import merge as run_merge

        click.echo(str(run_merge(sources, out)))
        return
    if len(sources) > 1:
        raise click.UsageError(
            f"found {len(sources)} manifests, expected one; to join prepared parts type --merge"
        )
    from mllm_audio.data.prepare import prepare as run_prepare

    part, num_parts = shard
    tokenizer, conditioner = options.pop("tokenizer"), options.pop("conditioner")
    report = run_prepare(
        sources[0],
        out,
        tokenizer,
        part=part,
        num_parts=num_parts,
        conditioner_spec=conditioner,
        **options,
    )
    click.echo(str(report))
