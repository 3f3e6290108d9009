"""Folders of clips for evaluation: find, check, read and pair them.

A clip's name is its file name without folder and suffix; the generated clip and the reference of
one caption share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from mllm_audio import wav
from mllm_audio.types import Clip

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
MIN_SECONDS = 2.0  # shorter clips are padded with zeros, as audioldm_eval does
SILENCE = 2.0**-15  # peak of one step of 16 bit, below which nothing is left to hear
SHOWN = 3  # names that a message lists
CAPTIONS_FILE = "captions.jsonl"  # about the clips beside it


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Clips, and rows of captions about them."""

    clips: dict[str, Path]  # by name
    rows: dict[str, dict[str, Any]]  # by the same names; some or all may be missing
    captions: Path  # where rows were looked for
    sample_rate: int  # Hz of every clip

    @classmethod
    def open(cls, source: Path, captions: Path | None, ids: Sequence[str] | None) -> Folder:
        """Find the clips of a folder or manifest, and the rows about them.

        Args:
            source: see `find_clips`.
            captions: `.jsonl` file of {audio, caption, ...}; by default the manifest, or
                captions.jsonl in the folder where it exists.
            ids: names to keep.

        Raises:
            ValueError: if there are no clips, their names clash or their sample rates differ, or
                the captions are broken.
        """
        clips = find_clips(source, ids)
        path = captions or (source / CAPTIONS_FILE if source.is_dir() else source)
        rows = read_rows(path, "audio") if captions or path.is_file() else []
        by_name = {Path(row["audio"]).stem: row for row in rows}
        return cls(
            clips=clips,
            rows={name: by_name[name] for name in clips if name in by_name},
            captions=path,
            sample_rate=check_rates(clips, source),
        )

    def require(self, column: str, metric: str) -> None:
        """Refuse clips without a row that has `column`.

        Raises:
            ValueError: naming the first of them.
        """
        if lacking := [name for name in self.clips if not self.rows.get(name, {}).get(column)]:
            raise ValueError(
                f"{metric} needs the {column} of every generated clip but {self.captions} has none "
                f"for {len(lacking)} of {len(self.clips)}: {few(lacking)}; give them with "
                "--captions FILE"
            )


def find_clips(source: Path, ids: Sequence[str] | None = None) -> dict[str, Path]:
    """List the clips of a folder and its subfolders, or those of a manifest, by name.

    Args:
        source: folder, or `.jsonl` file whose rows name `audio` relative to it.
        ids: names to keep, in this order; all in alphabetical order if None.

    Raises:
        ValueError: if there are none, two have one name, or an id is not among them.
    """
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif not source.is_file():
        raise ValueError(f"found nothing at {source}, expected a folder of clips; check the path")
    else:
        rows = read_rows(source, "audio")
        paths = sorted(source.parent / row["audio"] for row in rows)
    if not paths:
        raise ValueError(f"{source} holds no clips; expected {', '.join(SUFFIXES)} files")
    clips: dict[str, Path] = {}
    for path in paths:
        if path.stem in clips:
            raise ValueError(
                f"{clips[path.stem]} and {path} have one name; rename one, clips are paired by name"
            )
        clips[path.stem] = path
    if ids is None:
        return dict(sorted(clips.items()))  # not by path: subfolders and suffixes are no order
    if missing := [name for name in ids if name not in clips]:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(ids)} ids: {few(missing)}; expected each as "
            "the name of a clip without suffix"
        )
    return {name: clips[name] for name in ids}


def read_ids(path: Path) -> list[str]:
    """Read a file of clip names, one a line, with or without a sound's suffix.

    Raises:
        ValueError: if it is missing or empty, or names a clip twice.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected one clip name on each line")
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    ids = [
        Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name for name in names if name
    ]
    if not ids:
        raise ValueError(f"{path} names no clip; expected one name on each line")
    if len(set(ids)) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise ValueError(f"{path} names {few(twice)} more than once; remove the repetitions")
    return ids


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """Read the rows of a JSON-lines file.

    Raises:
        ValueError: if there is no such file, a line is no JSON object, or it lacks a column.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected JSON lines with {', '.join(columns)}")
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: broken JSON ({error}); mend the line") from error
        if not isinstance(row, dict) or (missing := [c for c in columns if not row.get(c)]):
            found = sorted(row) if isinstance(row, dict) else line[:40]
            expected = missing if isinstance(row, dict) else list(columns)
            raise ValueError(f"{path}:{number}: found {found}, expected a row with {expected}")
        rows.append(row)
    return rows


def read_clip(path: Path, *, allow_silent: bool = False) -> Clip:
    """Read the first channel of a file, its mean removed, at its own rate.

    Raises:
        ValueError: if it cannot be read, holds NaN, or is silent and must not be.
    """
    clip = wav.read_first_channel(path)
    waveform = (clip.waveform.double() - clip.waveform.double().mean()).float()
    clip = Clip(waveform, clip.sample_rate)
    if is_silent(clip) and not allow_silent:
        raise ValueError(f"{path} is silent; generate it again, or type --allow-silent")
    return clip


def is_silent(clip: Clip) -> bool:
    """Tell whether nothing is left to hear."""
    return bool(clip.waveform.abs().max() <= SILENCE)


def to_rate(clip: Clip, sample_rate: int) -> Tensor:
    """Resample a clip and pad it with zeros to `MIN_SECONDS`: (S,)."""
    waveform = wav.resample(clip.waveform, clip.sample_rate, sample_rate)
    return functional.pad(waveform, (0, max(0, int(MIN_SECONDS * sample_rate) - len(waveform))))


def check_rates(clips: dict[str, Path], where: Path) -> int:
    """Return the sample rate of a folder's clips, in Hz.

    Raises:
        ValueError: if they have different ones.
    """
    rates = {path: wav.info(path).sample_rate for path in clips.values()}
    first = next(iter(rates))
    for path, rate in rates.items():
        if rate != rates[first]:
            raise ValueError(
                f"{where} mixes sample rates: {first.name} has {rates[first]} Hz, {path.name} "
                f"{rate} Hz; resample them to one"
            )
    return rates[first]


def check_pairs(generated: Sequence[str], reference: Sequence[str], metric: str) -> None:
    """Refuse sets of names that differ.

    Raises:
        ValueError: naming the first that have no partner.
    """
    problems = [
        f"{len(extra)} {side} clips have no partner ({few(extra)})"
        for side, extra in (
            ("generated", sorted(set(generated) - set(reference))),
            ("reference", sorted(set(reference) - set(generated))),
        )
        if extra
    ]
    if problems:
        raise ValueError(
            f"{metric} pairs clips by name but {' and '.join(problems)}; rename them, name a "
            "common subset with --ids, or leave the metric out of --metrics"
        )


def few(names: Sequence[str], separator: str = ", ") -> str:
    """List the first names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
