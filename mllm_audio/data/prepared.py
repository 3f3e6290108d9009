"""A prepared folder while it is made: held by one process, begun or checked, finished.

`prepare` fills it by encoding, `merge` from folders that hold a part each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mllm_audio.data import conversations, encode, shards
from mllm_audio.data.encode import Record
from mllm_audio.data.manifest import SPLITS
from mllm_audio.data.shards import PrepareSettings, ShardIndex
from mllm_audio.files import encode_lines, locked, write_atomic

LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a call of `prepare` or `merge` left in the folder."""

    folder: Path
    part: int  # of `num_parts`
    num_parts: int  # 1: the folder is the whole
    counts: dict[str, int]  # clips per split
    num_tokens: int  # latents of all clips
    num_rejected: int  # rows left out; of conversations, sound files
    rejected_path: Path  # names each of them, and why
    num_conversations: int  # that can be used; 0 for captions, and for a part
    num_dropped: int  # conversations that name a rejected file
    already_complete: bool  # nothing had to be written

    def __str__(self) -> str:
        """Summarise for the terminal."""
        state = "was already complete" if self.already_complete else "is complete"
        if self.num_parts > 1:
            state += f" as part {self.part} of {self.num_parts}"
        counts = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        text = f"{self.folder} {state}: {counts} clips, {self.num_tokens} latents"
        if self.num_conversations:
            text += f"; {self.num_conversations} conversations"
        if self.num_rejected:
            text += f"; {self.num_rejected} rows rejected, see {self.rejected_path}"
        if self.num_dropped:
            text += f"; {self.num_dropped} conversations that name one of them are left out"
        return text


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold `out` for this process, made if it is new.

    Raises:
        ValueError: if it holds other things, or another process is at work there.
        OSError: if it cannot be made or its file system has no locks.
    """
    # A run killed before its first index leaves at most the lock and that index's temporary file.
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or (
        "index.json" not in names and names - {"index.json.tmp", LOCK}
    ):
        raise ValueError(
            f"{out} exists and was not made by prepare, expected a new or empty folder; choose "
            "another one"
        )
    out.mkdir(parents=True, exist_ok=True)
    busy = (
        f"another process is preparing {out}, expected one at a time; wait for it, or type another "
        "--out"
    )
    with locked(out / LOCK, busy):
        yield


def begin(out: Path, plan: ShardIndex) -> ShardIndex:
    """Begin a new folder, or check that an old one was begun with the same plan.

    Returns:
        The index of the folder.

    Raises:
        ValueError: naming what differs.
    """
    if (out / "index.json").is_file():
        index = shards.read_index(out, allow_incomplete=True)
        changed = differences(index, plan)
        if index.part_name != plan.part_name:
            changed["part"] = (index.part_name, plan.part_name)
        changes = [f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items()]
        if changes:
            raise ValueError(
                f"{out} was prepared differently: {'; '.join(changes)}. Choose another output "
                f"folder, or continue this one with `{index.command(out)}`"
            )
    else:
        index = plan
        shards.write_index(out, index)
    for name in ("shards", "records"):
        (out / name).mkdir(exist_ok=True)
    return index


def differences(first: ShardIndex, second: ShardIndex) -> dict[str, tuple[Any, Any]]:
    """Name what differs in settings, tokenizer and manifest, with both values."""
    pairs = {
        setting.name: (
            getattr(first.settings, setting.name),
            getattr(second.settings, setting.name),
        )
        for setting in fields(PrepareSettings)
    }
    pairs["tokenizer fingerprint"] = (first.tokenizer.fingerprint, second.tokenizer.fingerprint)
    pairs["SHA-256 of the manifest"] = (first.manifest_sha256, second.manifest_sha256)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def finish(out: Path, index: ShardIndex, chats: bytes | None, *, is_changed: bool) -> PrepareReport:
    """Complete a folder whose shards are all there, unless it was complete before.

    Args:
        out: the folder.
        index: as `begin` returned it.
        chats: the bytes of `CONVERSATIONS`, which the first part keeps; None for captions.
        is_changed: a shard was written since.

    Raises:
        ValueError: if no train row is left in a whole folder; a part may be without.
    """
    records = [encode.read_record(encode.record_path(out, number)) for number in index.numbers]
    files = {"rejected.jsonl": _rejected_lines(records)}
    if chats is not None and index.part == 1:
        files[conversations.CONVERSATIONS] = chats
    missing = [name for name, data in files.items() if not _holds(out / name, data)]
    for name in missing:
        write_atomic(out / name, files[name])
    completed = _complete(index, records, out / "rejected.jsonl")
    already_complete = not (is_changed or missing) and index == completed
    if index != completed:
        shards.write_index(out, completed)
    index = completed
    usable: list[conversations.Conversation] = []
    num_dropped = 0
    if chats is not None and index.num_parts == 1:
        usable, num_dropped = conversations.usable_conversations(out)
    return PrepareReport(
        folder=out,
        part=index.part,
        num_parts=index.num_parts,
        counts=index.counts,
        num_tokens=sum(shard.num_tokens for shard in index.shards),
        num_rejected=index.num_rejected,
        rejected_path=out / "rejected.jsonl",
        num_conversations=len(usable),
        num_dropped=num_dropped,
        already_complete=already_complete,
    )


def _rejected_lines(records: list[Record]) -> bytes:
    rejected = [r for record in records for r in record.rejected]
    return encode_lines([{"audio": r.audio, "reason": r.reason, "line": r.line} for r in rejected])


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _complete(index: ShardIndex, records: list[Record], rejected_path: Path) -> ShardIndex:
    """Fill in the index from the records of its shards."""
    rejected = [r for record in records for r in record.rejected]
    counts = {split: sum(record.shard.counts[split] for record in records) for split in SPLITS}
    is_whole = index.num_parts == 1
    if is_whole and not counts["train"]:
        reason = f", the first because: {rejected[0].reason}" if rejected else ""
        raise ValueError(
            f"no train row is left of {index.num_rows} rows in {index.manifest}, expected at least "
            f"one; {len(rejected)} were rejected{reason}. See {rejected_path}"
        )
    mean, std = _statistics(records) if is_whole else ((), ())
    # Records do not know of prompts, which were written later.
    listed = {(shard.sha256, shard.rows_sha256): shard for shard in index.shards}
    found = [listed.get((r.shard.sha256, r.shard.rows_sha256), r.shard) for r in records]
    clips = [(record.longest_clip, record.longest_clip_name) for record in records]
    longest_clip, longest_clip_name = max(clips, key=lambda clip: clip[0], default=(0, ""))
    return replace(
        index,
        complete=True,
        latent_mean=mean,
        latent_std=std,
        counts=counts,
        num_rejected=len(rejected),
        longest_clip=longest_clip,
        longest_clip_name=longest_clip_name,
        shards=tuple(found),
        conditioner=index.conditioner if all(shard.prompts_sha256 for shard in found) else None,
    )


def _statistics(records: list[Record]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population deviation of the train latents: twice (D,)."""
    num_tokens = sum(record.num_train_tokens for record in records)
    mean = torch.tensor([r.total for r in records], dtype=torch.float64).sum(0) / num_tokens
    square = torch.tensor([r.total_square for r in records], dtype=torch.float64).sum(0)
    # Rounding may leave a constant channel a variance just below zero.
    std = (square / num_tokens - mean.square()).clamp(min=0).sqrt()  # (D,)
    return tuple(mean.tolist()), tuple(std.tolist())
