"""The two `.part` files of an import that can be interrupted: a line for each row of the source.

A line is the source's name of its split, a tab, and what the finished file is to hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a `.part` file, and cut off one that a kill left unfinished."""
    if not path.is_file():
        return
    whole = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield line.decode()
        file.truncate(whole)


def finish(rows: Path, missing: Path) -> None:
    """Turn the `.part` files into the manifest and the list of missing rows, the manifest last."""
    if rows.stat().st_size == 0:
        shown = next(read_lines(missing), "\tno rows").partition("\t")[2].strip()
        raise ValueError(f"no row of the dataset can be used ({shown}); check the columns")
    for part in (missing, rows):
        temporary = part.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(line.partition("\t")[2] for line in read_lines(part))
            file.flush()
            os.fsync(file.fileno())
        if temporary.stat().st_size:
            temporary.replace(part.with_suffix(""))
        else:
            temporary.unlink()
    for part in (missing, rows):
        part.unlink()
