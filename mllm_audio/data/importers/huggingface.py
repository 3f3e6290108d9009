"""Any audio dataset of the Hugging Face `datasets` library, streamed.

The source is a hub id, a folder that `save_to_disk` wrote, or a folder of parquet files or of sound
files with a metadata file (`audiofolder`). Sound is never decoded here: bytes inside a dataset are
written beside the manifest as they are, under a suffix that says their container; files that lie
on this machine are named where they are.

One row is read, written and forgotten at a time. Every row adds a line to `manifest.jsonl.part` or
`missing.txt.part`, so the lines there say where an interrupted import goes on.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.utils.file_utils import xopen
from tqdm import tqdm

from mllm_audio.config import read_json
from mllm_audio.data.importers import common
from mllm_audio.data.importers.common import ImportReport, SplitCount
from mllm_audio.data.importers.parts import finish, read_lines
from mllm_audio.data.manifest import SPLIT_ALIASES, SPLITS
from mllm_audio.files import locked, write_atomic

SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **SPLIT_ALIASES,
    "development": "train",
    "eval": "test",
    "evaluation": "test",
}
SETTINGS, LOCK = "import.json", ".lock"
# First bytes of containers that libsndfile reads; RIFF and FORM name theirs eight bytes later.
CONTAINERS = {b"fLaC": ".flac", b"OggS": ".ogg", b"RIFF": ".wav", b"RF64": ".wav", b"FORM": ".aiff"}
RESERVED = ("audio", "caption", "captions", "split", "messages")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an import must keep when it goes on."""

    source: str  # hub id or folder
    name: str | None  # configuration of the dataset; None: its only one
    audio_column: str
    caption_column: str
    splits: dict[str, str]  # the dataset's name of a split -> ours


class EncodedAudio(Audio):
    """An Audio column that stays encoded; the library's own wants its decoder even for that."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        """Put a path, bytes or both as the library stores them."""
        if isinstance(value, dict):
            return {key: value.get(key) for key in ("bytes", "path")}
        return {"bytes": None, "path": value} if isinstance(value, str) else {"bytes": value}


def import_huggingface(
    source: str,
    out: Path,
    *,
    audio_column: str = "audio",
    caption_column: str = "caption",
    name: str | None = None,
    splits: tuple[str, ...] = (),
) -> ImportReport:
    """Write a dataset's manifest, and sounds that have no file of their own, to the folder `out`.

    Args:
        source: hub id, or folder.
        out: a new or empty folder, or one that this began.
        audio_column: of sound: an Audio column, or binary.
        caption_column: of text, or lists of texts.
        name: of the configuration, where there are several.
        splits: to import, each NAME or NAME=train|validation|test; all by default.

    Raises:
        ValueError: if the dataset cannot be read, lacks a column or a split, or no row can be used,
            or `out` holds another import.
    """
    dataset = _open(source, name)
    mapping = _choose_splits(list(dataset), splits)
    settings = Settings(
        source=source,
        name=name,
        audio_column=audio_column,
        caption_column=caption_column,
        splits=mapping,
    )
    out.mkdir(parents=True, exist_ok=True)
    with locked(
        out / LOCK, f"another process imports to {out}; wait for it, or type another --out"
    ):
        _claim(out, settings)
        if not (out / common.MANIFEST).is_file():
            parts = out / f"{common.MANIFEST}.part", out / f"{common.MISSING}.part"
            done = Counter(line.partition("\t")[0] for part in parts for line in read_lines(part))
            with (
                parts[0].open("a", encoding="utf-8") as rows,
                parts[1].open("a", encoding="utf-8") as missing,
            ):
                for theirs in mapping:
                    stream = _stream(dataset[theirs], settings)
                    _append(stream, theirs, settings, done[theirs], out, rows, missing)
            finish(*parts)
        return _report(out, mapping)


def _open(source: str, name: str | None) -> dict[str, IterableDataset]:
    """Open a dataset for streaming, by split."""
    folder = Path(source)
    is_saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        found = load_from_disk(source) if is_saved else load_dataset(source, name, streaming=True)
    except Exception as error:  # the library and its file systems raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot open the dataset {source!r} ({type(error).__name__}: {reason}); expected a "
            "hub id, or a folder of parquet files, of sound files with metadata, or from "
            "save_to_disk"
        ) from error
    if isinstance(found, Dataset | IterableDataset):
        found = {str(found.split or "train"): found}
    assert isinstance(found, dict | DatasetDict | IterableDatasetDict)
    return {
        split: part.to_iterable_dataset() if isinstance(part, Dataset) else part
        for split, part in found.items()
    }


def _choose_splits(known: list[str], wanted: tuple[str, ...]) -> dict[str, str]:
    """Map the dataset's splits to ours."""
    mapping: dict[str, str] = {}
    for text in wanted or known:
        theirs, equals, ours = text.partition("=")
        ours = ours if equals else SPLIT_NAMES.get(theirs, "")
        if theirs not in known:
            raise ValueError(f"--split {theirs}: the dataset has {', '.join(known)}; type one")
        if ours not in SPLITS:
            raise ValueError(
                f"split {theirs!r} is none of ours; type --split {theirs}=train, =validation or "
                "=test"
            )
        mapping[theirs] = ours
    return mapping


def _claim(out: Path, settings: Settings) -> None:
    """Write the settings, or check them against those of the import that goes on."""
    path, values = out / SETTINGS, asdict(settings)
    if path.is_file():
        if (before := read_json(path, "type another --out")) != values:
            differ = [key for key in values if before.get(key) != values[key]]
            raise ValueError(
                f"{out} holds an import with {differ[0]} {before.get(differ[0])!r}, found "
                f"{values[differ[0]]!r}; type another --out"
            )
        return
    if any(path.name not in (LOCK, f"{SETTINGS}.tmp") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no import; type another --out")
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


def _stream(dataset: IterableDataset, settings: Settings) -> IterableDataset:
    """Check the columns, and keep sound encoded."""
    columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    for column, option in ((settings.audio_column, "audio"), (settings.caption_column, "caption")):
        if column not in columns:
            raise ValueError(
                f"found no column {column!r} among {', '.join(columns)}; type --{option}-column"
            )
    features = dataset.features or {}
    used = settings.audio_column, settings.caption_column
    kept = [key for key in columns if key in used or isinstance(features.get(key), Value)]
    dataset = dataset.select_columns(kept)  # before a column of images or other sounds is decoded
    if isinstance(features.get(settings.audio_column), Audio):
        dataset = dataset.cast_column(settings.audio_column, EncodedAudio(decode=False))
    return dataset


def _append(
    stream: IterableDataset,
    theirs: str,
    settings: Settings,
    count: int,
    out: Path,
    rows: IO[str],
    missing: IO[str],
) -> None:
    """Import the rows of a split after the first `count`."""
    bar = tqdm(stream.skip(count), desc=theirs, unit="clip", initial=count, dynamic_ncols=True)
    for number, values in enumerate(bar, start=count):
        captions = _captions(values[settings.caption_column])
        path = _place(values[settings.audio_column], out, f"{theirs}-{number:07}")
        if path is None or not captions:
            what = "sound" if path is None else "caption"
            missing.write(f"{theirs}\t{theirs} row {number}: no {what}\n")
            missing.flush()
            continue
        row = {
            "audio": path,
            **common.caption_columns(captions),
            "split": settings.splits[theirs],
            **_extra(values, settings),
        }
        rows.write(f"{theirs}\t{json.dumps(row, ensure_ascii=False)}\n")
        rows.flush()


def _captions(value: Any) -> list[str]:
    """List the captions of a row, without empty ones."""
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _extra(values: dict[str, Any], settings: Settings) -> dict[str, str | int | float]:
    """Keep the other columns that are text or numbers."""
    used = (settings.audio_column, settings.caption_column, *RESERVED)
    return {
        key: value
        for key, value in values.items()
        if key not in used and isinstance(value, str | int | float)
    }


def _place(value: Any, out: Path, stem: str) -> str | None:
    """Say where a row's sound is, seen from the manifest, after writing it if it has no file.

    Raises:
        ValueError: if the column holds something else than sound.
    """
    if value is None:
        return None
    sound = {"bytes": value} if isinstance(value, bytes) else value
    if not isinstance(sound, dict) or not {"bytes", "path"} & sound.keys():
        raise ValueError(
            f"the audio column holds {str(value)[:60]!r}, expected an Audio column or binary; type "
            "another --audio-column"
        )
    data, path = sound.get("bytes"), sound.get("path") or ""
    if data is None and not path:
        return None
    if data is None and "://" not in path:
        local = Path(path)
        return common.relative(local, out) if local.is_file() else None
    if data is None:
        with xopen(path, "rb") as file:
            data = file.read()
    file_name = f"audio/{stem}{_suffix(data, path)}"
    (out / "audio").mkdir(exist_ok=True)
    write_atomic(out / file_name, data)
    return file_name


def _suffix(data: bytes, path: str) -> str:
    """Name the container of encoded sound by its first bytes, else as its path does."""
    if data[:4] in CONTAINERS:
        return CONTAINERS[data[:4]]
    if data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):
        return ".mp3"
    suffix = Path(path).suffix.lower()
    if suffix in common.SOUND_SUFFIXES:
        return suffix
    raise ValueError(
        f"sound of an unknown container (first bytes {data[:8]!r}), expected WAV, FLAC, Ogg, MP3 "
        "or AIFF; convert the dataset"
    )


def _report(out: Path, mapping: dict[str, str]) -> ImportReport:
    """Count what the finished files hold."""
    found: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    with (out / common.MANIFEST).open(encoding="utf-8") as file:
        found.update(json.loads(line)["split"] for line in file)
    if (out / common.MISSING).is_file():
        with (out / common.MISSING).open(encoding="utf-8") as file:
            lost.update(mapping[line.rpartition(" row ")[0]] for line in file)
    counts = [
        SplitCount(name=split, found=found[split], listed=found[split] + lost[split])
        for split in SPLITS
        if found[split] + lost[split]
    ]
    return ImportReport(manifest=out / common.MANIFEST, counts=tuple(counts))
