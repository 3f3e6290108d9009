"""Captions to generate from, and the names of the files that they become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One clip to generate."""

    stem: str  # of its file: that of the reference recording where the row names one
    caption: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read JSON lines of {caption, audio?, id?}, a manifest for instance, or a caption a line.

    A clip is named after its row's `audio`, else its `id`, else its place, so that generated and
    reference files pair by stem.

    Raises:
        ValueError: if the file is missing, of another form, empty, or names two clips alike.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file, expected captions as .jsonl or .txt")
    readers = {".jsonl": _jsonl_rows, ".txt": _text_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .jsonl or .txt; convert it")
    rows = list(readers[path.suffix](path))
    if not rows:
        raise ValueError(f"{path} holds no captions, expected at least one")
    width = max(3, len(str(len(rows) - 1)))
    prompts: dict[str, Prompt] = {}
    for number, (line, row) in enumerate(rows):
        where, caption = f"{path}:{line}", row.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: caption is {caption!r}, expected text; fill it in")
        stem = _stem(where, row, f"{number:0{width}}")
        if stem in prompts:
            raise ValueError(
                f"{where}: a second clip {stem!r}; give each an audio or id of its own"
            )
        prompts[stem] = Prompt(stem, caption.strip())
    return list(prompts.values())


def _stem(where: str, row: dict[str, Any], default: str) -> str:
    if row.get("audio") is not None:
        return Path(str(row["audio"])).stem
    name = str(row["id"]) if row.get("id") is not None else default
    if name != Path(name).name:
        raise ValueError(f"{where}: id is {name!r}, expected what can name a file; change it")
    return name


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{line}: broken JSON ({error}); mend the line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line}: found {text.strip()[:40]!r}, expected an object")
            yield line, row


def _text_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, {"caption": text}
