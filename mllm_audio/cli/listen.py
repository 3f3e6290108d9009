"""`mllm-audio listen` and `listen-results`: blind listening tests."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from mllm_audio.cli.group import COUNT, PATH, cli

SPEECH = click.option(
    "--speech",
    type=PATH,
    help="List of the prompts with speech, a caption or a file name of the first system a line; "
    "by default captions with words like speech, talks, says, voice.",
)


@cli.command()
@click.argument("systems", nargs=-1, required=True, metavar="[NAME=]DIR...")
@click.option("--out", type=PATH, required=True, help="SQLite file of the ratings.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any free."
)
@click.option("--allow-remote", is_flag=True, help="Let --host be one that other machines reach.")
@click.option("--raters", help="Names let in, with commas; by default any name.")
@click.option("--clips-per-rater", type=COUNT, help="At most; by default all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the raters' orders.")
@SPEECH
@click.option(
    "--allow-missing", is_flag=True, help="Leave out the captions that not all systems have."
)
def listen(
    systems: tuple[str, ...],
    out: Path,
    host: str,
    port: int,
    allow_remote: bool,
    raters: str | None,
    clips_per_rater: int | None,
    seed: int,
    speech: Path | None,
    allow_missing: bool,
) -> None:
    """Let people rate the sounds of systems, blind, on a page in their browser.

    DIR holds sound files and captions.jsonl, as `generate` writes them; systems are paired by
    caption. The same command again goes on with the same test.
    """
    from mllm_audio.data.manifest import read_manifest
    from mllm_audio.listening import plan
    from mllm_audio.listening.panel import Panel
    from mllm_audio.listening.server import ListeningServer
    from mllm_audio.listening.store import opened

    folders = plan.parse_systems(systems)
    rows = {
        name: [(row.audio, row.captions[0]) for row in read_manifest(folder / "captions.jsonl")]
        for name, folder in folders.items()
    }
    read = [plan.read_stimuli(name, folder, rows[name]) for name, folder in folders.items()]
    stimuli = plan.pair(read, allow_missing)
    if speech is not None:
        stimuli = plan.split_by_file(stimuli, speech)
    test = plan.ListeningTest(
        stimuli=stimuli, folders=folders, seed=seed, clips_per_rater=clips_per_rater
    )
    with opened(out, serve=True) as store:
        panel = Panel(test, store, raters.split(",") if raters else ())
        with ListeningServer(panel, host, port, allow_remote=allow_remote) as server:
            click.echo(f"{test}; {len(store.ratings())} ratings in {out}")
            click.echo(f"rate at {server.url} and stop with Ctrl-C")
            try:
                server.serve_forever()
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(f"{len(store.ratings())} ratings in {out}") from stop


@cli.command("listen-results")
@click.argument("ratings", type=PATH)
@SPEECH
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--csv", type=PATH, help="Also write every rating to this file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
def listen_results(
    ratings: Path, speech: Path | None, as_json: bool, csv: Path | None, seed: int
) -> None:
    """Print what the ratings in RATINGS, a file that `listen` writes, say of each system."""
    from mllm_audio.listening import plan, results
    from mllm_audio.listening.store import opened

    with opened(ratings, serve=False) as store:
        given, clips = store.ratings(), store.clips()
    if speech is not None:
        clips = dict(zip(clips, plan.split_by_file(list(clips.values()), speech), strict=True))
    summaries = results.summarize(given, clips, seed)
    if csv is not None:
        results.write_csv(csv, given, clips)
    if as_json:
        click.echo(json.dumps([asdict(summary) for summary in summaries], indent=2))
    else:
        click.echo(results.lay_out(summaries))
