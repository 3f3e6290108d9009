"""The command group and the options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
DEEPSPEED = click.option(
    "--deepspeed",
    type=PATH,
    help="DeepSpeed file, e.g. configs/deepspeed/zero2.json; under torchrun or deepspeed.",
)
BASE = click.option("--base", help="Where an adapter's base model is now, if it moved.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mllm-audio")
@click.option("--local_rank", hidden=True, help="Passed by the deepspeed launcher.")
def cli(local_rank: str | None) -> None:
    """Audio as an output of a Hugging Face causal LM."""


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Give a command options that others have too, in order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
