"""Clotho (Drossos et al. 2020): `clotho_captions_*.csv` and WAV files, from Zenodo.

Each CSV file has columns file_name and caption_1 to caption_5. A clip is the file of that name in
a folder named after its part (development, validation, evaluation) where there is one, else
anywhere under `--audio`; its suffix may differ.

Published clips of version 2.1 (zenodo.org/record/4783391): 3,839 / 1,045 / 1,045, counted in the
lists that WavCaps (github.com/XinhaoMei/WavCaps, captioning/data/Clotho) takes from it; the Zenodo
page itself says 3,840 and 1,046 for the first two.
"""

from __future__ import annotations

from pathlib import Path

from mllm_audio.data.importers import common
from mllm_audio.data.importers.common import ImportReport, SplitCount
from mllm_audio.data.manifest import read_rows

PARTS = {"development": "train", "validation": "validation", "evaluation": "test"}
PUBLISHED = {"train": "3,839 (v2.1)", "validation": "1,045", "test": "1,045"}
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


def import_clotho(annotations: Path, audio: Path, out: Path) -> ImportReport:
    """Write the manifest of the CSV files in a folder, or of one, to the folder `out`.

    Raises:
        ValueError: if a file is missing or broken, or no clip is found.
    """
    names = {f"clotho_captions_{part}.csv": part for part in PARTS}
    tables = common.find_annotations(annotations, list(names))
    clips = common.find_clips(audio)
    index: dict[str, list[Path]] = {}
    for path in clips:
        index.setdefault(common.without_suffix(path.name).strip(), []).append(path)
    rows, missing, counts = [], [], []
    for table in tables:
        part, found, listed = names[table.name], 0, 0
        for line, values in read_rows(table):
            if absent := [name for name in ("file_name", *CAPTIONS) if not values.get(name)]:
                raise ValueError(f"{table}:{line}: no {absent[0]}, expected Clotho's columns")
            listed += 1
            files = index.get(common.without_suffix(values["file_name"]).strip(), [])
            if not files:
                missing.append(values["file_name"])
                continue
            found += 1
            rows.append(
                {
                    "audio": common.relative(_nearest(files, part), out),
                    **common.caption_columns([values[name] for name in CAPTIONS]),
                    "split": PARTS[part],
                }
            )
        published = PUBLISHED[PARTS[part]]
        counts.append(SplitCount(name=PARTS[part], found=found, listed=listed, published=published))
    if not rows:
        raise common.nothing_found(audio, clips, ["the file_name column"])
    manifest = common.write_manifest(out, rows, missing)
    return ImportReport(manifest=manifest, counts=tuple(counts))


def _nearest(files: list[Path], part: str) -> Path:
    """Choose among files of the right name: in this part's folder, else in no other part's."""
    others = PARTS.keys() - {part}
    return min(files, key=lambda path: (part not in path.parts, not others.isdisjoint(path.parts)))
