"""`mllm-audio serve`: a checkpoint behind an OpenAI-compatible server, through vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import COUNT, PATH, cli


@cli.command()
@click.argument("run", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--api-key",
    envvar="VLLM_API_KEY",
    help="Asked of clients under /v1; also read from $VLLM_API_KEY.",
)
@click.option("--api-key-file", type=PATH, help="File whose first line is the key.")
@click.option(
    "--allow-remote",
    is_flag=True,
    help="Let other machines in without a key, or under other host names (behind a proxy).",
)
@click.option("--served-model-name", help="As clients call it; by default the name of RUN.")
@click.option("--dtype", help="Of the backbone: auto, float32, bfloat16 or float16.")
@click.option("--max-model-len", type=COUNT, help="Positions of a request; by default the model's.")
@click.option("--max-num-seqs", type=COUNT, default=32, show_default=True, help="At once.")
@click.option(
    "--guidance/--no-guidance",
    default=True,
    show_default=True,
    help="Without it requests cannot ask for guidance, and the cache is half as large.",
)
@click.option("--eager/--compile", default=None, help="By default eager on a CPU.")
@click.option("--conditioner", help="Where a conditioner's folders are now, if they moved.")
@click.option("--cpu-kv-gib", type=COUNT, help="Key and value cache on a CPU; by default to fit.")
@click.option("--max-body-mib", type=COUNT, default=32, show_default=True, help="Of a request.")
@click.option(
    "--history-mib",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Of earlier answers, which clients refer to by audio.id.",
)
@click.option("--dry-run", is_flag=True, help="Check, and print what would be started.")
@click.argument("options", nargs=-1, metavar="[-- VLLM_OPTION...]")
def serve(
    run: Path, api_key_file: Path | None, conditioner: str | None, dry_run: bool, **values: Any
) -> None:
    """Serve the checkpoint in RUN: OpenAI's chat and speech endpoints, and a page, through vLLM."""
    from mllm_audio.serving.checkpoint import check_checkpoint
    from mllm_audio.serving.environment import check_environment, look
    from mllm_audio.serving.launch import ServeConfig, check_address, plan_launch, read_key

    if api_key_file is not None:
        values["api_key"] = read_key(api_key_file)
    config = ServeConfig(**values)
    vllm = check_environment(look())
    check_address(config)
    launch = plan_launch(config, check_checkpoint(run, conditioner), vllm)
    if dry_run:
        click.echo(launch)
        return
    launch.become()
