"""`mllm-audio bench`: how fast parts of a run are, and a server under load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import BASE, COUNT, PATH, cli, with_options


@cli.group()
def bench() -> None:
    """Measure how fast generating and training are, parts of them, or a server."""


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


MEASURED = [
    click.option("--threads", type=COUNT, help="Of torch; by default as many as it takes."),
    click.option(
        "--repetitions", type=COUNT, default=3, show_default=True, help="Median of these."
    ),
    click.option("--json", "json_file", type=PATH, help="Also write the figures to this file."),
    click.option("--baseline", type=PATH, help="Compare with this file, which --json wrote."),
    click.option("--any-machine", is_flag=True, help="Even if machine or settings were others."),
]
TOKENIZER_HELP = (
    "dct, audioldm:FOLDER, or audioldm-random, which is AudioLDM's with random weights."
)


def _run(measure: Callable[..., Any], options: dict[str, Any], kind: Any) -> None:
    """Split options into those of the session and those of its benchmark, and run it.

    `measure` is called with the configuration of type `kind`, the threads, and a check.
    """
    from mllm_audio.benchmarks.session import SessionConfig, run_session

    names = ("threads", "json_file", "baseline", "any_machine")
    session = SessionConfig(**{name: options.pop(name) for name in names})
    run_session(partial(measure, kind(**options)), session, click.echo)


@bench.command("generate")
@click.argument("run", required=False, type=PATH)
@click.option("--preset", help="Of this size, with random weights, in place of a RUN.")
@BASE
@click.option("--tokenizer", help=f"In place of the model's own: {TOKENIZER_HELP}")
@click.option("--fast", is_flag=True, help="Decode with the settings recommended for speed.")
@click.option("--seconds", type=float, default=10.24, show_default=True, help="Of each clip.")
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Clips at once.")
@click.option("--num-inference-steps", type=COUNT, help="Head calls per latent.")
@click.option("--tokens-per-step", type=COUNT, help="Latents drawn at once; --fast: a column.")
@click.option("--sampler", help="Of the head; by default its own.")
@click.option("--guidance-scale", type=float, help="MAR's s: 1 is no guidance.")
@click.option(
    "--dtype", default="float32", show_default=True, help="Of the weights; bfloat16 or int8."
)
@click.option(
    "--lengths",
    callback=_numbers(float, "seconds such as 10,30,60"),
    help="Also time a latent at the end of clips of so many seconds.",
)
@with_options(MEASURED)
def bench_generate(
    run: Path | None,
    preset: str | None,
    base: str | None,
    tokenizer: str | None,
    **options: Any,
) -> None:
    """Generate clips with RUN, or with a --preset at random weights, and print where time goes.

    A preset is built for as long a clip as is asked for. A GPU is waited for after each part.
    """
    from mllm_audio.benchmarks.generate import bench_generate as measure
    from mllm_audio.benchmarks.generate_config import GenerateConfig
    from mllm_audio.benchmarks.subject import load_subject

    def do(config: GenerateConfig, threads: int, check: Any) -> Any:
        subject = load_subject(preset, run, base, tokenizer, config.longest)
        return measure(subject, config, threads, check)

    _run(do, options, GenerateConfig)


@bench.command("train")
@click.option("--preset", required=True, help="Of this size, from random weights.")
@click.option("--batch-size", type=COUNT, default=4, show_default=True, help="Clips of a step.")
@click.option(
    "--dtypes",
    default="float32,bfloat16",
    show_default=True,
    callback=_numbers(str, "float32,bfloat16"),
    help="To compute in, one after another; bfloat16 is autocast over float32 weights.",
)
@click.option(
    "--ratios",
    callback=_numbers(float, "shares such as 0,0.25,0.5,0.75"),
    help="Also time steps at these masking ratios.",
)
@with_options(MEASURED)
def bench_train(preset: str, **options: Any) -> None:
    """Train a --preset for a few steps at its mean masking ratio, and print where time goes."""
    from mllm_audio.benchmarks.subject import known_preset, load_subject
    from mllm_audio.benchmarks.train import TrainBenchConfig
    from mllm_audio.benchmarks.train import bench_train as measure

    def do(config: TrainBenchConfig, threads: int, check: Any) -> Any:
        return measure(load_subject(preset, None), known_preset(preset), config, threads, check)

    _run(do, options, TrainBenchConfig)


@bench.command("decode")
@click.option("--tokenizer", default="dct", show_default=True, help=TOKENIZER_HELP)
@click.option("--seconds", type=float, default=10.24, show_default=True, help="Of each clip.")
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Clips at once.")
@click.option("--dtype", default="float32", show_default=True, help="Of the weights; or bfloat16.")
@click.option("--stream", is_flag=True, help="Also decode column by column, as sound is streamed.")
@with_options(MEASURED)
def bench_decode(**options: Any) -> None:
    """Decode random latents to sound, and print where time goes."""
    from mllm_audio.benchmarks.decode import DecodeConfig
    from mllm_audio.benchmarks.decode import bench_decode as measure

    _run(measure, options, DecodeConfig)


@bench.command("head")
@click.option("--preset", required=True, help="Whose head, of this size, with random weights.")
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Latents at once.")
@click.option("--num-inference-steps", type=COUNT, default=100, show_default=True)
@click.option(
    "--dtype", default="float32", show_default=True, help="Of the weights; bfloat16 or int8."
)
@with_options(MEASURED)
def bench_head(preset: str, **options: Any) -> None:
    """Draw guided latents with the head of a --preset, and the plain way, taking turns.

    The plain way runs the whole network at every step, in float32, as MAR's published code does.
    """
    from mllm_audio.benchmarks.head import HeadBenchConfig
    from mllm_audio.benchmarks.head import bench_head as measure

    _run(partial(measure, preset), options, HeadBenchConfig)
