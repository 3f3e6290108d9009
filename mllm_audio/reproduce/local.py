"""The small scale: everything a table needs, made of one manifest of labelled recordings."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from mllm_audio.data.clips import PreparedClip, load_split
from mllm_audio.data.prepare import prepare
from mllm_audio.evaluation.train_own import train_classifier
from mllm_audio.files import encode_lines, write_atomic
from mllm_audio.presets import digits

HELD_OUT_SHARE = 0.1  # of the recordings, where the manifest names no test or validation split
PROMPT_ROOM = 32  # positions beside the latents
JUDGE = "judge"  # name of the classifier, and so the end of its metrics' names


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """What was made."""

    data: Path  # prepared folder, each clip of full length
    captions: Path  # manifest of the held-out recordings
    reference: Path  # folder of the held-out recordings
    classifier: Path  # trained on the others
    overrides: tuple[str, ...]  # of the presets, which fit the clips' length


def make_local_data(manifest: Path, out: Path, max_seconds: float, label: str) -> LocalData:
    """Prepare the recordings, set the held-out ones apart, and train the classifier that judges.

    What is finished is kept.

    Args:
        manifest: JSONL of {audio, caption, `label`, split?}.
        out: folder of everything.
        max_seconds: length of every clip; longer recordings are cut, shorter ones padded.
        label: column that names the class of a recording.

    Raises:
        ValueError: if the manifest cannot be used, or has no such column.
    """
    made = LocalData(
        data=out / "data",
        captions=out / "captions.jsonl",
        reference=out / "reference",
        classifier=out / JUDGE,
        overrides=_overrides(max_seconds),
    )
    report = prepare(
        manifest,
        made.data,
        "dct",
        max_seconds=max_seconds,
        pad=True,
        validation_share=HELD_OUT_SHARE,
        conditioner_spec="words",
    )
    held_out = "test" if report.counts["test"] else "validation"
    clips = {split: load_split(made.data, split) for split in ("train", held_out)}
    folder = manifest.resolve().parent
    recordings = [
        {"audio": str(folder / clip.name), label: _label(clip, label, manifest), "split": split}
        for split in clips
        for clip in clips[split]
    ]
    write_atomic(out / "recordings.jsonl", encode_lines(recordings))
    made.reference.mkdir(exist_ok=True)
    rows = []
    for clip in clips[held_out]:
        link = made.reference / Path(clip.name).name
        link.unlink(missing_ok=True)
        link.symlink_to(folder / clip.name)
        rows.append({"audio": clip.name, "caption": clip.captions[0], label: clip.extra[label]})
    write_atomic(made.captions, encode_lines(rows))
    if not (made.classifier / "config.json").is_file():
        judged = train_classifier(out / "recordings.jsonl", made.classifier, label=label)
        text = json.dumps({"accuracy": judged.accuracy, "num_held_out": judged.num_held_out})
        write_atomic(out / "judge.json", text.encode())
    return made


def _label(clip: PreparedClip, label: str, manifest: Path) -> str:
    if label not in clip.extra:
        raise ValueError(
            f"{manifest} has no column {label!r}, found {', '.join(clip.extra) or 'none more'}; "
            "name the class of each recording, or type --label COLUMN"
        )
    return clip.extra[label]


def _overrides(max_seconds: float) -> tuple[str, ...]:
    """Make a preset as long as the clips."""
    preset = digits()
    assert preset.backbone is not None
    columns = math.ceil(max_seconds / preset.audio.column_seconds - 1e-6)
    num_tokens = columns * preset.audio.tokens_per_column
    num_positions = max(preset.backbone.max_positions, num_tokens + PROMPT_ROOM)
    return (f"audio.max_tokens={num_tokens}", f"backbone.max_positions={num_positions}")
