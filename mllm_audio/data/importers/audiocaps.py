"""AudioCaps (Kim et al. 2019): `train.csv`, `val.csv` and `test.csv`, and clips from YouTube.

The CSV files of github.com/cdjkim/audiocaps have columns audiocap_id, youtube_id, start_time (s)
and caption, one row per caption; validation and test have five rows per clip. With ID, a YouTube id
of 11 characters, START in seconds and MS in milliseconds, clips may be named

    ID_START    ID_START_END    ID_START-END    ID_MS    ID_MS_END    ID

each also with a Y before ID, as AudioSet's tools and WavCaps do, or after one of their audiocap_id.
Numbers may have decimals (30.000). Folders are searched to any depth.

Published clips: 49,838 / 495 / 975 (the repository's `dataset/`: 49,838 / 2,475 / 4,875 captions;
its README counts two headers); version 2.0 has 91,256 for training, the rest as before
(`dataset2.0/README.md`). The 964 test clips that the literature scores are those that could still
be downloaded: a list of ids for `--ids`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mllm_audio.data.importers import common
from mllm_audio.data.importers.common import ImportReport, SplitCount
from mllm_audio.data.manifest import read_rows

SPLITS = {"train.csv": "train", "val.csv": "validation", "test.csv": "test"}
PUBLISHED = {"train": "49,838 (2.0: 91,256)", "validation": "495", "test": "975"}
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
NUMBER = r"\d+(?:\.\d+)?"
# Ids hold - and _, so a name is read by the 11 characters of its id. A Y before them cannot be
# mistaken for a part of it: what follows an id is nothing, or _ and a digit.
NAME = re.compile(rf"Y?(?P<id>[\w-]{{11}})(?:_(?P<start>{NUMBER})(?:[_-]{NUMBER})?)?", re.ASCII)
TRIED = ("ID_START", "ID_START_END", "ID_START-END", "ID_MS", "ID_MS_END", "ID", "AUDIOCAP_ID")


def import_audiocaps(
    annotations: Path, audio: Path, out: Path, ids: Path | None = None
) -> ImportReport:
    """Write the manifest of the CSV files in a folder, or of one, to the folder `out`.

    Args:
        annotations: folder of the CSV files, or one of them.
        audio: folder of the clips.
        out: of the manifest; its paths lead to `audio` from there.
        ids: list of the test clips to keep: YouTube ids, audiocap ids, or file names.

    Raises:
        ValueError: if a file is missing or broken, no clip is found, or `ids` fits no test clip.
    """
    tables = {path: _read(path) for path in common.find_annotations(annotations, list(SPLITS))}
    notes = []
    if ids is not None:
        wanted = set().union(*common.read_ids(ids).values())
        tables = {
            path: _keep(table, wanted) if SPLITS[path.name] == "test" else table
            for path, table in tables.items()
        }
        num_kept = sum(len(table) for path, table in tables.items() if path.name == "test.csv")
        if not num_kept:
            raise ValueError(
                f"none of the {len(wanted)} ids of {ids} (e.g. {min(wanted)!r}) is in test.csv; "
                "expected YouTube ids, audiocap ids or file names of test clips"
            )
        notes.append(f"{ids} names {len(wanted):,} clips, {num_kept:,} of them in test.csv")
    clips = common.find_clips(audio)
    index = _index(clips)
    rows, missing, counts = [], [], []
    for path, table in tables.items():
        split, found = SPLITS[path.name], 0
        for clip in table:
            place = _find(index, clip)
            if place is None:
                missing.append(f"{clip['youtube_id']}_{clip['start_time']}")
                continue
            found += 1
            rows.append(
                {
                    "audio": common.relative(place, out),
                    **common.caption_columns(clip["captions"]),
                    "split": split,
                    "youtube_id": clip["youtube_id"],
                    "start_time": clip["start_time"],
                }
            )
        counts.append(
            SplitCount(name=split, found=found, listed=len(table), published=PUBLISHED[split])
        )
    if not rows:
        raise common.nothing_found(audio, clips, [*TRIED, "each but the last with Y before"])
    manifest = common.write_manifest(out, rows, missing)
    return ImportReport(manifest=manifest, counts=tuple(counts), notes=tuple(notes))


def _read(path: Path) -> list[dict[str, Any]]:
    """Read a CSV file as one dict per clip, with all of its captions and audiocap ids."""
    clips: dict[tuple[str, float], dict[str, Any]] = {}
    for line, values in read_rows(path):
        if absent := [name for name in COLUMNS if not values.get(name)]:
            raise ValueError(
                f"{path}:{line}: no {absent[0]}, expected {', '.join(COLUMNS)}; is this AudioCaps?"
            )
        try:
            key = values["youtube_id"], float(values["start_time"])
        except ValueError as error:
            raise ValueError(
                f"{path}:{line}: start_time is {values['start_time']!r}, expected seconds; mend it"
            ) from error
        clip = clips.setdefault(key, {**values, "captions": [], "audiocap_ids": []})
        clip["captions"].append(values["caption"])
        clip["audiocap_ids"].append(values["audiocap_id"])
    return list(clips.values())


def _keep(table: list[dict[str, Any]], wanted: set[str]) -> list[dict[str, Any]]:
    """Keep the clips of a list of YouTube ids, audiocap ids or file names without suffix."""
    videos = {match["id"] for name in wanted if (match := NAME.fullmatch(name))}
    return [
        clip
        for clip in table
        if clip["youtube_id"] in videos or not wanted.isdisjoint(clip["audiocap_ids"])
    ]


def _index(clips: list[Path]) -> dict[str, list[tuple[float | None, Path]]]:
    """List the files of each YouTube id with the start that their name gives, and of each stem."""
    index: dict[str, list[tuple[float | None, Path]]] = {}
    for path in clips:
        stem = common.without_suffix(path.name)
        match = NAME.fullmatch(stem)
        start = float(match["start"]) if match and match["start"] else None
        index.setdefault(match["id"] if match else stem, []).append((start, path))
    return index


def _find(index: dict[str, list[tuple[float | None, Path]]], clip: dict[str, Any]) -> Path | None:
    """Find a clip by id and start, in seconds or milliseconds, then by id, then by audiocap id."""
    seconds, files = float(clip["start_time"]), index.get(clip["youtube_id"], [])
    for wanted in (seconds, 1000 * seconds, None):
        for start, path in files:
            if start == wanted:
                return path
    for name in clip["audiocap_ids"]:
        for _, path in index.get(name, []):
            return path
    return None
