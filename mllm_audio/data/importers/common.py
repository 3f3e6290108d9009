"""What importers share: find clips, read lists of ids, write the manifest and what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_audio.data.manifest import read_rows
from mllm_audio.files import encode_lines, write_atomic

# What libsndfile reads; prepare needs no other library.
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64")
ID_COLUMNS = ("id", "youtube_id", "audiocap_id", "file_name", "audio", "name")
MANIFEST, MISSING = "manifest.jsonl", "missing.txt"


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """How much of a part of a dataset was found."""

    name: str  # of the split or source
    found: int  # clips in the manifest
    listed: int  # clips that the annotations name, after ids were left out
    published: str = ""  # what its authors count, where that is known


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an importer wrote."""

    manifest: Path
    counts: tuple[SplitCount, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Print one part a line, and where the missing clips are named."""
        width = max(len(count.name) for count in self.counts)
        lines = [
            f"{count.name:<{width}}  {count.found:,} of {count.listed:,} clips"
            + (f", published {count.published}" if count.published else "")
            for count in self.counts
        ]
        num_missing = sum(count.listed - count.found for count in self.counts)
        if num_missing:
            lines.append(f"{num_missing:,} missing, named in {self.manifest.parent / MISSING}")
        return "\n".join([*lines, *self.notes, f"wrote {self.manifest}"])


def find_clips(folder: Path) -> list[Path]:
    """List the sound files under a folder, in order.

    Raises:
        ValueError: if it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"--audio {folder} is not a folder; type the one that holds the clips")
    clips = [
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SOUND_SUFFIXES)
    ]
    if not clips:
        raise ValueError(f"{folder} holds no sound, expected files {', '.join(SOUND_SUFFIXES)}")
    return sorted(clips)


def without_suffix(name: str) -> str:
    """Strip the suffix of a sound file, and nothing else: ids may hold dots."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in SOUND_SUFFIXES else name


def find_annotations(source: Path, names: Sequence[str]) -> list[Path]:
    """Find files of these names under a folder, or take `source` if it is one of them.

    Raises:
        ValueError: if there is none, or two of a name.
    """
    if source.is_file() and source.name in names:
        return [source]
    found = [path for name in names for path in sorted(source.rglob(name))]
    if not found:
        raise ValueError(f"found none of {', '.join(names)} in {source}; type their folder or one")
    for name in names:
        same = [str(path) for path in found if path.name == name]
        if len(same) > 1:
            raise ValueError(f"found {' and '.join(same)}, expected one {name}; type its folder")
    return found


def read_ids(path: Path) -> dict[str, set[str]]:
    """Read a list of ids, suffixes of sound files stripped, by the group that it names or "".

    A text file holds one id a line. A CSV file has a column of `ID_COLUMNS`, or one column. A JSON
    file holds a list of ids or of objects with one of these keys, or lists by group, as the
    blacklists of WavCaps do.

    Raises:
        ValueError: if the file is missing, empty or of another form.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file, expected a list of ids; check the path")
    readers = {".csv": _csv_ids, ".json": _json_ids}
    groups: dict[str, set[str]] = {}
    try:
        for group, value in readers.get(path.suffix.lower(), _text_ids)(path):
            groups.setdefault(group, set()).add(without_suffix(value))
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} holds no list of ids ({error!r}), expected one id a line, or a CSV column or "
            f"JSON key named {', '.join(ID_COLUMNS)}"
        ) from error
    if not any(groups.values()):
        raise ValueError(f"{path} holds no ids, expected one a line; fill it or leave it out")
    return groups


def _text_ids(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.strip():
            yield "", line.strip()


def _csv_ids(path: Path) -> Iterator[tuple[str, str]]:
    for _, values in read_rows(path):
        yield "", _id_of(values)


def _json_ids(path: Path) -> Iterator[tuple[str, str]]:
    values = json.loads(path.read_text(encoding="utf-8-sig"))
    groups = values if isinstance(values, dict) else {"": values}
    for group, entries in groups.items():
        if not isinstance(entries, list):
            raise KeyError(group)
        for entry in entries:
            yield group, _id_of(entry) if isinstance(entry, dict) else str(entry).strip()


def _id_of(values: dict[str, Any]) -> str:
    names = [name for name in ID_COLUMNS if name in values]
    if not names and len(values) > 1:
        raise KeyError("id")
    return str(values[names[0]] if names else next(iter(values.values()))).strip()


def relative(path: Path, folder: Path) -> str:
    """Write a path as seen from a folder, links on the way followed, a link at its end kept."""
    return os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def caption_columns(captions: Sequence[str]) -> dict[str, Any]:
    """Write captions as a manifest does: the first one, and all where there are several."""
    first = {"caption": captions[0]}
    return {**first, "captions": list(captions)} if len(captions) > 1 else first


def write_manifest(out: Path, rows: Sequence[dict[str, Any]], missing: Iterable[str]) -> Path:
    """Write `out/manifest.jsonl`, and beside it the ids of missing clips, if any.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / MANIFEST, encode_lines(rows))
    (out / MISSING).unlink(missing_ok=True)
    if lines := "".join(f"{name}\n" for name in missing):
        write_atomic(out / MISSING, lines.encode())
    return out / MANIFEST


def nothing_found(audio: Path, clips: Sequence[Path], tried: Sequence[str]) -> ValueError:
    """Say that no clip of the annotations is among the sound files, and what was looked for."""
    seen = ", ".join(path.name for path in clips[:3])
    return ValueError(
        f"none of the clips is among the {len(clips)} sound files of {audio} (e.g. {seen}); looked "
        f"for {', '.join(tried)} with {', '.join(SOUND_SUFFIXES)}; type another --audio, or rename"
    )
