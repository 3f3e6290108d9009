"""WavCaps (Mei et al. 2023, arXiv:2303.17395): JSON files and FLAC folders of cvssp/WavCaps.

A JSON file is {"num_captions_per_audio", "data": [{"id", "caption", "duration" (s), ...}]}. The
ids of `as_final.json` end in .wav, the files of all sources are `{id}.flac`; ids of FreeSound and
SoundBible are numbers that may coincide. So a clip is looked for in folders whose name begins with
its source (AudioSet_SL, BBC_Sound_Effects, FreeSound, SoundBible; the archives unpack to
`.../AudioSet_SL_flac/`), else in folders of no source. Any sound suffix is accepted.

Published clips (github.com/XinhaoMei/WavCaps, README): AudioSet_SL 108,317, FreeSound 262,300,
BBC Sound Effects 31,201, SoundBible 1,232, together 403,050.

Test clips of other datasets are in it. The repository's `data/json_files/blacklist/` lists them by
"AudioSet" and "FreeSound", for `--exclude`: `blacklist_exclude_test_ac.json` those of validation
and test of AudioCaps and Clotho, `blacklist_exclude_all_ac.json` those of all their splits,
`blacklist_exclude_ub8k_esc50_vggsound.json` those of UrbanSound8K, ESC-50 and VGGSound. A list
without such names applies to every source imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm_audio.config import read_json
from mllm_audio.data.importers import common
from mllm_audio.data.importers.common import ImportReport, SplitCount

SOURCES = {
    "as_final.json": "AudioSet_SL",
    "fsd_final.json": "FreeSound",
    "bbc_final.json": "BBC_Sound_Effects",
    "sb_final.json": "SoundBible",
}
PUBLISHED = {
    "AudioSet_SL": "108,317",
    "FreeSound": "262,300",
    "BBC_Sound_Effects": "31,201",
    "SoundBible": "1,232",
}
GROUPS = {"AudioSet": "AudioSet_SL"}  # what blacklists call a source, where it differs


def import_wavcaps(
    annotations: Path, audio: Path, out: Path, exclude: tuple[Path, ...] = ()
) -> ImportReport:
    """Write the manifest of the JSON files under a folder, or of one, to the folder `out`.

    Args:
        annotations: folder of the JSON files, or one of them.
        audio: folder of the clips.
        out: of the manifest; all of its rows are for training.
        exclude: lists of ids to leave out.

    Raises:
        ValueError: if a file is missing or broken, or no clip is found.
    """
    tables = common.find_annotations(annotations, list(SOURCES))
    excluded = _read_exclusions(exclude)
    clips = common.find_clips(audio)
    index: dict[str, list[Path]] = {}
    for path in clips:
        index.setdefault(common.without_suffix(path.name), []).append(path)
    rows, missing, counts, num_excluded = [], [], [], 0
    for table in tables:
        source, found, entries = SOURCES[table.name], 0, _read(table)
        barred = excluded.get("", set()) | excluded.get(source, set())
        kept = [entry for entry in entries if common.without_suffix(entry["id"]) not in barred]
        num_excluded += len(entries) - len(kept)
        for entry in kept:
            place = _find(index.get(common.without_suffix(entry["id"]), []), audio, source)
            if place is None:
                missing.append(f"{source}/{entry['id']}")
                continue
            found += 1
            rows.append(
                {
                    "audio": common.relative(place, out),
                    "caption": entry["caption"],
                    "split": "train",
                    "id": entry["id"],
                    "source": source,
                }
            )
        counts.append(
            SplitCount(name=source, found=found, listed=len(kept), published=PUBLISHED[source])
        )
    if not rows:
        raise common.nothing_found(audio, clips, ["ID, with .wav stripped from ids of AudioSet_SL"])
    manifest = common.write_manifest(out, rows, missing)
    notes = (f"{num_excluded:,} excluded by --exclude",) if exclude else ()
    return ImportReport(manifest=manifest, counts=tuple(counts), notes=notes)


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a JSON file."""
    entries = read_json(path, "download it again; with Git, it needs `git lfs pull`").get("data")
    if not isinstance(entries, list):
        raise ValueError(f'{path} has no list "data", expected WavCaps\' form; download it again')
    for number, entry in enumerate(entries):
        texts = [entry.get(key) for key in ("id", "caption")] if isinstance(entry, dict) else []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            shown = json.dumps(entry)[:80]
            raise ValueError(f"{path}: entry {number} is {shown}, expected texts id and caption")
    return entries


def _read_exclusions(paths: tuple[Path, ...]) -> dict[str, set[str]]:
    """Join lists of ids, by source or "" for all."""
    excluded: dict[str, set[str]] = {}
    for path in paths:
        for group, ids in common.read_ids(path).items():
            source = GROUPS.get(group, group)
            if source and source not in PUBLISHED:
                known = ", ".join([*GROUPS, *PUBLISHED])
                raise ValueError(f"{path} lists ids of {group!r}, expected one of {known}")
            excluded.setdefault(source, set()).update(ids)
    return excluded


def _find(files: list[Path], audio: Path, source: str) -> Path | None:
    """Choose among files of the right name: in a folder of this source, else of no source."""
    ranked = [(_rank(path.relative_to(audio.parent), source), path) for path in files]
    rank, path = min(ranked, default=(2, None))
    return path if rank < 2 else None


def _rank(path: Path, source: str) -> int:
    owners = {s for s in PUBLISHED for part in path.parts[:-1] if part.startswith(s)}
    if source in owners:
        return 0
    return 2 if owners else 1
