"""`mllm-audio evaluate` and `train-classifier`: how good generated sound is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import COUNT, PATH, cli, with_options

EMBEDDERS = [
    click.option("--panns", type=PATH, help="Cnn14_16k_mAP=0.438.pth or Cnn14_mAP=0.431.pth."),
    click.option("--vggish", type=PATH, help="vggish-10086976.pth."),
    click.option("--clap", type=PATH, help="A ClapModel's folder, or LAION's .pt."),
    click.option(
        "--embedder",
        multiple=True,
        metavar="NAME=PATH",
        help="A folder of train-classifier; repeats.",
    ),
]


def load_embedders(options: dict[str, Any], device: str = "cpu") -> list[Any]:
    """Load what the options `EMBEDDERS` name."""
    from mllm_audio.evaluation.embedders import load_embedder

    kinds = {kind: options[kind] for kind in ("panns", "vggish")}
    is_laion = options["clap"] is not None and options["clap"].suffix == ".pt"
    kinds["clap_laion" if is_laion else "clap_hf"] = options["clap"]
    specs: list[tuple[str, str | None]]
    specs = [(f"{kind}:{path}", None) for kind, path in kinds.items() if path is not None]
    for text in options["embedder"]:
        name, equals, path = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"found --embedder {text!r}, expected NAME=PATH")
        specs.append((f"own:{path}", name))
    return [load_embedder(spec, device, name) for spec, name in specs]


@cli.command()
@click.argument("manifest", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the classifier.")
@click.option("--label", default="label", show_default=True, help="Column that names the class.")
@click.option(
    "--seconds", type=float, help="Heard of each clip; by default what 95 % of them fit in."
)
@click.option("--sample-rate", type=COUNT, default=16_000, show_default=True, help="Hz.")
@click.option("--num-bands", type=COUNT, default=64, show_default=True, help="Mel bands.")
@click.option("--num-epochs", type=COUNT, default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def train_classifier(manifest: Path, out: Path, **options: Any) -> None:
    """Train a classifier of the recordings in MANIFEST, JSONL of {audio, LABEL, split?}.

    `mllm-audio evaluate --embedder NAME=OUT` then measures fd_NAME, kl_NAME, is_NAME and
    accuracy_NAME. Rows whose split is not train are held out; a tenth, if there are none.
    """
    from mllm_audio.evaluation.train_own import train_classifier as run_train_classifier

    click.echo(str(run_train_classifier(manifest, out, **options)))


@cli.command()
@click.argument("generated", type=PATH)
@click.option("--reference", type=PATH, required=True, help="Folder of recordings.")
@click.option("--captions", type=PATH, help="JSONL; by default GENERATED/captions.jsonl.")
@click.option("--out", type=PATH, required=True, help="Folder for the reports.")
@click.option("--metrics", help="Comma-separated; by default all that the embedders allow.")
@with_options(EMBEDDERS)
@click.option("--ids", type=PATH, help="File of clip names, one a line; others are left out.")
@click.option("--cache", type=PATH, help="Folder of features; by default OUT/features.")
@click.option("--batch-size", type=COUNT, default=16, show_default=True)
@click.option(
    "--bootstrap",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Resamples of an interval; 0 for none.",
)
@click.option(
    "--bootstrap-seconds",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    help="Give a metric no interval if it takes longer.",
)
@click.option("--device", default="cpu", show_default=True, help="Of the embedders: cpu or cuda.")
@click.option("--allow-silent", is_flag=True, help="Measure silent sounds too; they are counted.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the resamples.")
def evaluate(generated: Path, reference: Path, out: Path, **options: Any) -> None:
    """Measure the clips in GENERATED against recordings.

    Metrics are named with their embedder: fd_panns, kl_panns, is_panns, fad_vggish, clap_laion,
    clap_hf, and fd_NAME, kl_NAME, is_NAME, accuracy_NAME of an --embedder. Stopped at any moment,
    the same command continues.
    """
    from mllm_audio.evaluation.clips import read_ids
    from mllm_audio.evaluation.evaluate import Options
    from mllm_audio.evaluation.evaluate import evaluate as run_evaluate

    ids, metrics = options["ids"], options["metrics"]
    card = run_evaluate(
        generated,
        reference,
        out,
        load_embedders(options, options["device"]),
        metrics=[name.strip() for name in metrics.split(",")] if metrics else None,
        captions=options["captions"],
        ids=read_ids(ids) if ids else None,
        cache=options["cache"],
        options=Options(
            batch_size=options["batch_size"],
            num_resamples=options["bootstrap"],
            max_seconds=options["bootstrap_seconds"],
            seed=options["seed"],
            allow_silent=options["allow_silent"],
        ),
    )
    click.echo(f"{card}\nsee {out / 'report.html'}")
