"""`mllm-audio bench`: how fast parts of a run are, and a server under load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import COUNT, PATH, cli


@cli.group()
def bench() -> None:
    """Measure how fast a part of training is, or a server."""


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


def _numbers(kind: type, what: str) -> Callable[[object, object, str | None], tuple[Any, ...]]:
    """Read an option of numbers with commas."""

    def read(context: object, option: object, text: str | None) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in (text or "").split(",") if part.strip())
        except ValueError as error:
            raise click.BadParameter(f"found {text!r}, expected {what}") from error

    return read


@bench.command("serve")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option(
    "--streams",
    callback=_numbers(int, "whole numbers such as 1,8,32"),
    help="Levels of so many requests at all times; 1,8,32 where there are no --rates.",
)
@click.option(
    "--rates",
    callback=_numbers(float, "numbers such as 0.5,2"),
    help="Levels of Poisson arrivals, requests a second.",
)
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Of each level.")
@click.option("--mode", type=click.Choice(["speech", "chat"]), default="speech", show_default=True)
@click.option("--captions", "file", type=PATH, help="A manifest or .txt of what is asked for.")
@click.option("--clip-seconds", type=float, help="Of each sound; by default the model decides.")
@click.option("--num-inference-steps", type=COUNT, help="Head calls per latent.")
@click.option("--guidance-scale", type=float, help="MAR's s: 1 is no guidance.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of requests and arrivals.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Requests not measured.")
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Of one answer, s.")
@click.option("--max-requests", type=COUNT, default=10_000, show_default=True, help="Of a level.")
@click.option("--max-in-flight", type=COUNT, default=256, show_default=True)
@click.option("--api-key", envvar="VLLM_API_KEY", help="Also read from $VLLM_API_KEY.")
@click.option("--allow-remote", is_flag=True, help="Load a server on another machine.")
@click.option("--json", "json_file", type=PATH, help="Also write the figures to this file.")
def bench_serve(
    url: str,
    streams: tuple[int, ...],
    rates: tuple[float, ...],
    file: Path | None,
    clip_seconds: float | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    api_key: str | None,
    allow_remote: bool,
    json_file: Path | None,
    **settings: Any,
) -> None:
    """Load the server at URL, one of `mllm-audio serve`, and print how it bears it.

    Every level sends for --seconds and waits for what is in flight. First audio is the time from
    sending a request to its first samples; RTF the time to its last ones over the sound's duration;
    stalled the share of streams on which a player with a buffer of 50 ms would run dry, and head
    start how long one without would have to wait not to. Ctrl-C prints what was measured so far.
    """
    from importlib.util import find_spec

    if find_spec("httpx") is None:
        raise ValueError("bench serve needs httpx; type  pip install 'mllm-audio[serve]'")
    from mllm_audio.serving.load import LoadConfig, check_url
    from mllm_audio.serving.report import run_and_report

    if file is not None:
        from mllm_audio.data.requests import read_requests

        settings["captions"] = tuple(request.caption for request in read_requests(file))
    given = {
        "seconds": clip_seconds,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    config = LoadConfig(
        url=check_url(url, allow_remote),
        streams=streams or (() if rates else LoadConfig.streams),
        rates=rates,
        options={key: value for key, value in given.items() if value is not None},
        **settings,
    )
    run_and_report(config, api_key, json_file, click.echo)
