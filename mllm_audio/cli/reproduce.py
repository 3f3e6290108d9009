"""`mllm-audio reproduce`: the paper's tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mllm_audio.cli.evaluate import EMBEDDERS, load_embedders
from mllm_audio.cli.group import COUNT, PATH, cli, with_options

TABLES = ("table1", "table3", "table4", "table5", "table6", "table8", "figure6")
OPTIONS = [
    click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]..."),
    click.option("--out", type=PATH, required=True, help="Folder of everything."),
    click.option(
        "--data",
        type=PATH,
        required=True,
        help="small: a manifest with a label column; paper: what prepare wrote.",
    ),
    click.option("--scale", type=click.Choice(["paper", "small"]), required=True),
    click.option("--rows", help="Comma-separated labels; by default all."),
    click.option("--seeds", type=COUNT, default=1, show_default=True, help="Trainings of a row."),
    click.option("--steps", type=COUNT, help="Of training; else the preset's."),
    click.option("--jobs", type=COUNT, default=1, show_default=True, help="Trainings at once."),
    click.option("--num-clips", type=COUNT, help="Sounds of a row; by default a caption each."),
    click.option("--batch-size", type=COUNT, default=32, show_default=True, help="Sounds at once."),
    click.option(
        "--max-seconds", type=float, default=1.28, show_default=True, help="small: a clip."
    ),
    click.option("--label", default="label", show_default=True, help="small: column of the class."),
    click.option("--captions", type=PATH, help="paper: manifest with the test clips."),
    click.option("--split", default="test", show_default=True, help="paper: of --captions."),
    click.option("--reference", type=PATH, help="paper: folder or manifest with the test clips."),
    click.option("--init-from", type=PATH, help="paper: MAR's checkpoint of image weights."),
    click.option(
        "--launcher",
        default="",
        help='paper: words before `-m mllm_audio train`, e.g. "torchrun --nproc_per_node 8".',
    ),
    *EMBEDDERS,
]


@cli.group()
def reproduce() -> None:
    """Train, generate and evaluate the rows of a table of the paper, beside its values.

    --scale small runs a table on labelled recordings at hand, in hours on a CPU.
    """


def _register(name: str) -> None:
    @reproduce.command(name)
    @with_options(OPTIONS)
    def command(**options: Any) -> None:
        _run(name, **options)

    command.help = f"Bring the rows of {name} to their values; the same command continues."


for _name in TABLES:
    _register(_name)


def _run(name: str, *, out: Path, data: Path, scale: str, **options: Any) -> None:
    """Bring a table to its values."""
    from mllm_audio.evaluation.embedders import load_embedder
    from mllm_audio.reproduce.figures import figure_6
    from mllm_audio.reproduce.local import JUDGE, make_local_data
    from mllm_audio.reproduce.stages import Job, read_rows
    from mllm_audio.reproduce.table import Judgement
    from mllm_audio.reproduce.table import reproduce as run_table
    from mllm_audio.reproduce.tables import choose_rows

    labels = [label.strip() for label in (options["rows"] or "").split(",") if label.strip()]
    systems = choose_rows(name, labels)
    small = scale == "small"
    typed = {key for key in ("captions", "reference") if options[key] is not None}
    if (small and typed) or (not small and len(typed) < 2):
        raise ValueError(
            "found --scale small with --captions or --reference, which are of --scale paper"
            if small
            else "--scale paper needs --captions and --reference, the test clips"
        )
    overrides = list(options["overrides"])
    if options["steps"] is not None:
        overrides.append(f"train.num_steps={options['steps']}")
    embedders = load_embedders(options)
    captions, reference = options["captions"], options["reference"]
    if small:
        local = make_local_data(data, out, options["max_seconds"], options["label"])
        data, captions, reference = local.data, local.captions, local.reference
        overrides = [*local.overrides, *overrides]
        embedders = [load_embedder(f"own:{local.classifier}", name=JUDGE), *embedders]
    if not embedders:
        raise ValueError(
            "nothing measures the sounds; type --panns, --vggish, --clap or --embedder"
        )
    job = Job(
        out=out,
        data=data,
        captions=captions,
        small=small,
        split=None if small else options["split"],
        overrides=tuple(overrides),
        launcher=options["launcher"],
        init_from=options["init_from"],
        batch_size=options["batch_size"],
    )
    judgement = Judgement(reference=reference, embedders=embedders, num_clips=options["num_clips"])
    path = run_table(
        name,
        systems,
        range(options["seeds"]),
        job,
        judgement,
        num_jobs=options["jobs"],
        say=click.echo,
    )
    click.echo(path.read_text())
    if name == "figure6":
        rows = [row for s in choose_rows(name) for row in read_rows(out / "rows" / name, s.label)]
        for metric in dict.fromkeys(metric for row in rows for metric in row["scores"]):
            for drawn in figure_6(rows, metric, out / name / metric):
                click.echo(drawn)


@reproduce.command("figure4")
@click.argument("systems", nargs=-1, required=True, metavar="NAME=SOUNDS...")
@click.option("--reference", type=PATH, required=True, help="Folder of recordings.")
@click.option("--out", type=PATH, required=True)
@click.option("--metric", default="fad_vggish", show_default=True)
@with_options(EMBEDDERS)
def figure4(
    systems: tuple[str, ...], reference: Path, out: Path, metric: str, **options: Any
) -> None:
    """Draw quality against speed of folders that `generate --captions` or `peer` wrote."""
    from mllm_audio.reproduce.figures import figure_4

    folders: dict[str, Path] = {}
    for text in systems:
        name, equals, folder = text.partition("=")
        if not equals or not name or name in folders:
            raise click.BadParameter(f"found {text!r}, expected NAME=SOUNDS, each name once")
        folders[name] = Path(folder)
    click.echo(figure_4(folders, reference, out, load_embedders(options), metric))
    click.echo(out / "figure4.svg")
