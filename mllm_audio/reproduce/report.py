"""What is known of a table's rows, laid out beside the paper's values."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mllm_audio.evaluation.paper import NOT_COMPARABLE, TABLE_1
from mllm_audio.evaluation.report import STYLE
from mllm_audio.files import write_atomic
from mllm_audio.reproduce.tables import System

PUBLISHED = {row.system: asdict(row) for row in TABLE_1}


def write_table(
    path: Path, title: str, systems: Sequence[System], rows: Sequence[dict[str, Any]]
) -> str:
    """Write PATH.md and PATH.html; return the Markdown.

    Args:
        path: without suffix.
        title: of the table.
        systems: its rows, in order.
        rows: what is known of each row and seed.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    header = ["", "system", "seeds", *metrics]
    cells = [_cells(system, rows, metrics) for system in systems]
    notes = _notes(rows)
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, cells), ""]
    text = "\n".join([*lines, *(f"- {note}" for note in notes), ""])
    write_atomic(path.with_suffix(".md"), text.encode())
    table = "".join(_html_row(row, "td") for row in cells)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table>{_html_row(header, 'th')}{table}</table>"
        f"<ul>{''.join(f'<li>{html.escape(note)}' for note in notes)}</ul></html>"
    )
    write_atomic(path.with_suffix(".html"), page.encode())
    return text


def _cells(system: System, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[str]:
    """Lay out a row: its values over seeds, and the paper's in brackets."""
    own = [row for row in rows if row["label"] == system.label]
    published = PUBLISHED.get(system.paper or "", {})
    values = []
    for metric in metrics:
        found = [row["scores"][metric]["value"] for row in own if metric in row["scores"]]
        paper = published.get(metric)
        text = _value(found) if found else "not run"
        values.append(text if paper is None else f"{text} [{paper:g}]")
    return [system.label, system.what, str(len(own)), *values]


def _value(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{mean(values):.4g} ± {stdev(values):.2g}"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the values depend on, once where it is the same in all rows."""
    notes = ["± is the standard deviation over seeds; [] is the paper's value, where it is known"]
    for key, name in (
        ("num_clips", "clips"),
        ("steps", "optimizer steps"),
        ("generation_seed", "seed of the first sound"),
        ("tokenizer", "tokenizer"),
        ("conditioner", "conditioner"),
        ("embedders", "embedders"),
        ("commit", "code"),
        ("machine", "machine"),
    ):
        found = list(dict.fromkeys(str(row[key]) for row in rows))
        notes.append(f"{name}: {'; '.join(found)}")
    silent = [f"{r['label']} seed {r['seed']}: {r['num_silent']}" for r in rows if r["num_silent"]]
    notes.append(f"silent sounds, measured as they are: {', '.join(silent) or 'none'}")
    return [*notes, NOT_COMPARABLE]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _html_row(cells: Sequence[str], kind: str) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}' for cell in cells)}</tr>"
