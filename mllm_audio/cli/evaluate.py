"""`mllm-audio evaluate` and `train-classifier`: how good generated sound is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import COUNT, PATH, cli


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
