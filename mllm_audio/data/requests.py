"""Files of captions as sounds to make, each named after the recording it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_audio.data.manifest import SPLITS, check_split, read_rows


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sound to make."""

    caption: str
    name: str  # of the file, without suffix: that of the recording it is compared with
    seed: int
    row: dict[str, Any]  # of the file of captions


def read_requests(
    path: Path, *, seed: int = 0, split: str | None = None, limit: int | None = None
) -> list[Request]:
    """Read the rows of a manifest, or the lines of a .txt file, as requests.

    A row's sound is named after its `audio`, else its `id`, else its number; row i has seed
    `seed + i`.

    Args:
        path: .jsonl or .csv with `caption` and perhaps `audio`, `id` and `split`, or .txt.
        seed: of the first row.
        split: take the rows of this split only.
        limit: take at most so many.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row has no caption, two have one name, or no row is left.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    requests: dict[str, Request] = {}
    rows = list(_rows(path))
    width = max(3, len(str(len(rows) - 1)))
    for number, (where, row) in enumerate(rows):
        if split is not None and check_split(where, row) != split:
            continue
        caption = row.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: caption is {caption!r}, expected text; fill it in")
        name = _name(where, row, f"{number:0{width}}")
        if name in requests:
            raise ValueError(f"{where}: a second row named {name!r}, expected one per recording")
        requests[name] = Request(
            caption=caption.strip(), name=name, seed=seed + len(requests), row=row
        )
        if len(requests) == limit:
            break
    if not requests:
        raise ValueError(f"{path} has no rows{f' of split {split}' if split else ''}")
    return list(requests.values())


def _name(where: str, row: dict[str, Any], default: str) -> str:
    if row.get("audio") is not None:
        return Path(str(row["audio"])).stem
    name = str(row["id"]) if row.get("id") is not None else default
    if name != Path(name).name:
        raise ValueError(f"{where}: id is {name!r}, expected what can name a file; change it")
    return name


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row stands, and its columns."""
    if path.suffix == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; check the path")
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if text.strip():
                yield f"{path}:{line}", {"caption": text.strip()}
        return
    for line, row in read_rows(path):
        yield f"{path}:{line}", row
