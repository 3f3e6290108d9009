"""`mllm-audio peer`: other systems on the same captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.group import COUNT, PATH, cli

PEERS = {  # name: what its folder holds; the defaults stand beside the pipelines
    "audioldm2": "a copy of cvssp/audioldm2",
    "tango2": "what `convert-tango2` wrote",
    "stable-audio-open": "a copy of stabilityai/stable-audio-open-1.0",
    "audiogen": "what `convert-audiogen` wrote",
}


@cli.group("peer")
def peer_group() -> None:
    """Generate from captions with a published system, and time it.

    Writes WAV files that pair with the references by name, captions.jsonl, and timing.json with the
    real-time factor. Stopped at any moment, the same command continues.
    """


def _add(name: str, folder: str) -> None:
    """Add the command of one peer."""

    @peer_group.command(
        name,
        short_help=f"FOLDER is {folder}.",
        help=f"CAPTIONS is a manifest or a text file; FOLDER is {folder}.",
    )
    @click.argument("captions", type=PATH)
    @click.option("--out", type=PATH, required=True, help="Folder for the clips.")
    @click.option("--model", type=PATH, required=True, metavar="FOLDER", help="The weights.")
    @click.option("--seconds", type=float, default=10.0, show_default=True, help="Of each clip.")
    @click.option("--steps", type=COUNT, help="Of the diffusion; the authors' by default.")
    @click.option("--guidance-scale", type=float, help="1 is none; the authors' by default.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Of the first clip.")
    @click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Clips at once.")
    @click.option("--device", help="cuda or cpu; cuda where there is one by default.")
    @click.option("--dtype", default="float32", show_default=True, help="Or bfloat16, float16.")
    def command(captions: Path, out: Path, model: Path, steps: int | None, **options: Any) -> None:
        try:
            from mllm_audio.peers.run import PeerConfig, run_peer
        except ImportError as error:
            raise ImportError(
                f"peers need diffusers ({error}); run: pip install 'mllm-audio[peers]'"
            ) from error

        config = PeerConfig(num_inference_steps=steps, **options)
        click.echo(str(run_peer(name, captions, out, model, config)))


for _name, _folder in PEERS.items():
    _add(_name, _folder)


@peer_group.command()
@click.argument("checkpoint", type=PATH)
@click.option("--audioldm", type=PATH, required=True, help="A copy of cvssp/audioldm.")
@click.option("--flan-t5", type=PATH, required=True, help="A copy of google/flan-t5-large.")
@click.option("--out", type=PATH, required=True, help="Folder for `peer tango2 --model`.")
def convert_tango2(checkpoint: Path, audioldm: Path, flan_t5: Path, out: Path) -> None:
    """Convert a copy of declare-lab/tango2."""
    from mllm_audio.peers.convert_tango2 import convert_tango2 as run_convert

    run_convert(checkpoint, audioldm, flan_t5, out)
    click.echo(out)


@peer_group.command()
@click.argument("checkpoint", type=PATH)
@click.option("--t5", type=PATH, required=True, help="A copy of google-t5/t5-large.")
@click.option("--out", type=PATH, required=True, help="Folder for `peer audiogen --model`.")
def convert_audiogen(checkpoint: Path, t5: Path, out: Path) -> None:
    """Convert a copy of facebook/audiogen-medium."""
    from mllm_audio.peers.convert_audiogen import convert_audiogen as run_convert

    run_convert(checkpoint, t5, out)
    click.echo(out)
