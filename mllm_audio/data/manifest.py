"""Read manifests: which sound file goes with which caption.

A manifest is a JSON-lines file (`.jsonl`) or a CSV file with a header (`.csv`), in UTF-8:

    audio     path of a sound file, relative to the manifest's folder; required
    caption   text that describes it; required
    captions  list of alternative wordings; optional, JSON lines only
    split     train, validation (or valid, val, dev) or test; optional, train if absent or empty

Every other column is kept, as text, in `ManifestRow.extra`. A JSON-lines file of conversations is
read by `conversations.py` instead.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One row of a manifest."""

    audio: str  # path as the manifest writes it, also the clip's name
    captions: tuple[str, ...]  # `caption` first, then its alternative wordings
    split: str  # one of SPLITS
    extra: dict[str, str]  # every other column, as text
    line: int  # where the row stands in the manifest, from 1


def read_manifest(path: Path | str) -> list[ManifestRow]:
    """Read and check every row of a `.jsonl` or `.csv` manifest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a row is broken or incomplete, or if there is none.
    """
    rows = [_check_row(f"{path}:{line}", line, values) for line, values in read_rows(path)]
    if not rows:
        raise ValueError(f"{path} has no rows, expected at least one with audio and caption")
    return rows


def read_rows(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line and the columns of each row of a `.jsonl` or `.csv` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a row is broken.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .jsonl or .csv; convert it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; check the path")
    try:
        for line, values in readers[path.suffix](path):
            try:
                json.dumps(values, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{path}:{line}: {error}; expected valid Unicode text") from error
            yield line, values
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def check_split(where: str, values: dict[str, Any]) -> str:
    """Return the split that a row names, train if none, under its name in SPLITS."""
    split = values.get("split") or "train"
    split = SPLIT_ALIASES.get(split, split) if isinstance(split, str) else split
    if split not in SPLITS:
        raise ValueError(f"{where}: split is {split!r}, expected one of {', '.join(SPLITS)}")
    return str(split)


def with_validation(rows: list[ManifestRow], share: float) -> list[ManifestRow]:
    """Move a share of the training files to validation, unless a row already names validation.

    The choice depends on the audio path alone, so it survives a reordered or grown manifest and
    keeps rows about the same file together. At least one file moves where two or more exist.

    Args:
        rows: rows of one manifest.
        share: of the training files, in [0, 1); 0 moves none.
    """
    if any(row.split == "validation" for row in rows):
        return rows
    chosen = choose_validation([row.audio for row in rows if row.split == "train"], share)
    return [
        replace(row, split="validation") if row.split == "train" and row.audio in chosen else row
        for row in rows
    ]


def choose_validation(names: Iterable[str], share: float) -> set[str]:
    """Choose about a `share` of the names by their hashes: one at least, but never all."""
    ordered = sorted(set(names), key=hash_fraction)
    if share == 0 or len(ordered) < 2:
        return set()
    # All but one at most: a split that leaves nothing to train on helps nobody.
    return {ordered[0]} | {name for name in ordered[:-1] if hash_fraction(name) < share}


def hash_fraction(text: str) -> float:
    """Map text to [0, 1), the same on every machine."""
    # 53 bits: all that a float holds exactly, so the result cannot round up to 1.
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{line}: broken JSON ({error}), expected one object on each line"
                ) from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"{path}:{line}: found {text.strip()[:40]!r}, expected a JSON object on each "
                    "line"
                )
            yield line, values


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if "captions" in (reader.fieldnames or ()):
                raise ValueError(
                    f"{path}:1: column 'captions' holds lists, which CSV cannot; use a .jsonl "
                    "manifest, or rename the column"
                )
            for values in reader:
                # DictReader files surplus cells under None and fills missing ones with None.
                if None in values or None in values.values():
                    raise ValueError(
                        f"{path}:{reader.line_num}: the number of cells differs from the header's "
                        f"{len(reader.fieldnames or ())}; quote cells that contain commas"
                    )
                yield reader.line_num, values
        except csv.Error as error:
            # DictReader's own line_num lags behind until a row is complete.
            raise ValueError(
                f"{path}:{reader.reader.line_num}: broken CSV ({error}), expected comma-separated "
                "cells, quoted with double quotes"
            ) from error


def _check_row(where: str, line: int, values: dict[str, Any]) -> ManifestRow:
    for column in ("audio", "caption"):
        if column not in values:
            raise ValueError(
                f"{where}: no {column!r} among the columns {sorted(values)}; expected audio and "
                "caption, and optionally captions and split"
            )
    audio = _check_text(where, "audio", values["audio"])
    caption = _check_text(where, "caption", values["caption"])
    wordings = values.get("captions", [])
    if not isinstance(wordings, list):
        raise ValueError(
            f"{where}: captions is {wordings!r}, expected a list of texts; put a single one in "
            "'caption'"
        )
    captions = [caption, *(_check_text(where, "captions", wording) for wording in wordings)]
    extra = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
        if key not in ("audio", "caption", "captions", "split")
    }
    # dict.fromkeys drops repeated wordings and keeps their order.
    return ManifestRow(
        audio, tuple(dict.fromkeys(captions)), check_split(where, values), extra, line
    )


def _check_text(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column} is {value!r}, expected text; fill it in or drop it")
    return value.strip()
