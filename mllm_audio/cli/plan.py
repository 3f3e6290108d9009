"""`mllm-audio plan`: what a training run will cost."""

from __future__ import annotations

from typing import Any

import click

from mllm_audio.cli.group import COUNT, cli


@cli.command()
@click.option("--preset", required=True, help="Name of a preset; `mllm-audio info NAME` shows one.")
@click.option("--gpus", type=COUNT, required=True, help="Over all nodes.")
@click.option("--gpu", default="h100", show_default=True, help="Type, e.g. a100, h100, h200, b200.")
@click.option("--batch", type=COUNT, help="Clips per optimizer step; else the preset's.")
@click.option("--micro-batch", type=COUNT, help="Clips that a GPU computes at once; else all.")
@click.option(
    "--clips", type=COUNT, default=360_000, show_default=True, help="Of the data: 1,000 h."
)
@click.option("--epochs", type=COUNT, default=1000, show_default=True, help="Over the data.")
@click.option(
    "--mfu", type=float, default=0.4, show_default=True, help="Share of the GPUs' peak, assumed."
)
@click.option(
    "--caption-tokens", type=COUNT, default=16, show_default=True, help="Text tokens, assumed."
)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def plan(
    preset: str,
    batch: int | None,
    micro_batch: int | None,
    overrides: tuple[str, ...],
    **given: Any,
) -> None:
    """Print the memory, messages, steps and hours that training a preset takes, on paper."""
    from mllm_audio.config import override
    from mllm_audio.plan import Assumptions
    from mllm_audio.plan import plan as lay_out
    from mllm_audio.presets import get_preset

    typed = {"train.batch_size": batch, "train.micro_batch_size": micro_batch}
    sizes = [f"{key}={value}" for key, value in typed.items() if value is not None]
    config = override(get_preset(preset), [*overrides, *sizes])
    click.echo(lay_out(config, Assumptions(**given)))
