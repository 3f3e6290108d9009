"""`mllm-audio bench`: how fast parts of a run are, without the rest."""

from __future__ import annotations

from pathlib import Path

import click

from mllm_audio.cli.group import COUNT, cli


@cli.group()
def bench() -> None:
    """Measure how fast a part of training is."""


@bench.command("data")
@click.argument("data")
@click.option("--batch-size", type=COUNT, default=32, show_default=True, help="Rows of a step.")
@click.option("--micro-batch-size", type=COUNT, help="Rows at once; by default a rank's share.")
@click.option("--ranks", type=COUNT, default=1, show_default=True, help="Be the first of so many.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="To measure for.",
)
@click.option(
    "--synthetic",
    type=click.FloatRange(min=0, min_open=True),
    metavar="HOURS",
    help="First write this much of random latents to the new folder DATA.",
)
@click.argument("overrides", nargs=-1, metavar="[data.KEY=VALUE | masking.KEY=VALUE]...")
def bench_data(
    data: str,
    batch_size: int,
    micro_batch_size: int | None,
    ranks: int,
    seconds: float,
    synthetic: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Read DATA, a folder or URL of what prepare wrote, as training does."""
    from mllm_audio.bench import ReadConfig, write_synthetic
    from mllm_audio.bench import bench_data as measure
    from mllm_audio.config import override

    config = override(ReadConfig(), overrides)
    if synthetic is not None:
        write_synthetic(Path(data), synthetic)
    report = measure(
        data,
        config,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        num_ranks=ranks,
        seconds=seconds,
    )
    click.echo(str(report))
