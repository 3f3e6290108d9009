"""Join folders that `prepare --shard i/n` made into the one that a single run would have made.

The parts stay as they are. A shard is linked where `out` is on the same file system and copied
elsewhere, its record last, as `prepare` does it; so a killed run is continued by the same command.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from mllm_audio.data import encode, prepared, shards
from mllm_audio.data.conversations import CONVERSATIONS
from mllm_audio.data.prepared import PrepareReport
from mllm_audio.data.shards import LATENTS, PROMPTS, ShardIndex, ShardInfo, shard_file
from mllm_audio.files import write_atomic


@dataclass(frozen=True)
class PartFolder:
    """A folder that holds one part, and its index."""

    path: Path
    index: ShardIndex

    def __str__(self) -> str:
        """Name it in a message."""
        return f"{self.path} (part {self.index.part} of {self.index.num_parts})"

    @property
    def command(self) -> str:
        """Shell command that makes, continues or repairs it."""
        return self.index.command(self.path)


def merge(parts: Sequence[Path | str], out: Path | str, *, progress: bool = True) -> PrepareReport:
    """Join the complete parts of one manifest in the folder `out`, or continue doing so.

    Args:
        parts: every folder that `prepare` made of the manifest, in any order.
        out: a new or empty folder, or one that `merge` began.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: if one of them is no prepared folder.
        ValueError: if a part is incomplete, damaged, missing or there twice, if they were not made
            by one tokenizer with one manifest and one set of settings, or no row can be used.
        OSError: if `out` cannot be written; the run can be continued.
    """
    folders = _ordered([Path(part) for part in parts])
    chats = _conversations(folders[0])
    out, first = Path(out), folders[0].index
    plan = ShardIndex(
        manifest=first.manifest,
        manifest_sha256=first.manifest_sha256,
        num_rows=first.num_rows,
        tokenizer=first.tokenizer,
        settings=first.settings,
        conversations_sha256=first.conversations_sha256,
        conditioner=first.conditioner,
    )
    with prepared.claimed(out):
        index = prepared.begin(out, plan)
        is_changed = False
        for number in tqdm(plan.numbers, unit="shard", desc="merge", disable=not progress):
            is_changed |= _bring(folders[number % len(folders)], number, out)
        index = replace(index, shards=_shards(folders))
        return prepared.finish(out, index, chats, is_changed=is_changed)


def _shards(folders: Sequence[PartFolder]) -> tuple[ShardInfo, ...]:
    """List the shards of all parts in order, as their indices do."""
    every = [shard for folder in folders for shard in folder.index.shards]
    return tuple(sorted(every, key=lambda shard: shard.file))


def _ordered(paths: Sequence[Path]) -> list[PartFolder]:
    """Check that the folders are every part of one whole, and sort them."""
    folders = [PartFolder(path, shards.read_index(path, allow_incomplete=True)) for path in paths]
    first = folders[0]
    by_number: dict[int, PartFolder] = {}
    for folder in folders:
        _check_alike(first, folder)
        twin = by_number.setdefault(folder.index.part, folder)
        if twin is not folder:
            raise ValueError(
                f"{folder} is the same part as {twin.path}, expected it once; name one"
            )
        if not folder.index.complete:
            raise ValueError(f"{folder} is not complete; finish it with `{folder.command}`")
        expected = [shard_file(number) for number in folder.index.numbers]
        found = [shard.file for shard in folder.index.shards]
        if found != expected:
            raise ValueError(
                f"{folder} lists the shards {', '.join(found)}, expected {', '.join(expected)}; "
                f"delete it and type `{folder.command}`"
            )
    num_parts = first.index.num_parts
    missing = [part for part in range(1, num_parts + 1) if part not in by_number]
    if missing:
        command = replace(first.index, part=missing[0]).command(Path("PART"))
        raise ValueError(
            f"found {len(folders)} of {num_parts} parts, missing {', '.join(map(str, missing))}; "
            f"name their folders too, or make the first of them with `{command}`"
        )
    return [by_number[part] for part in sorted(by_number)]


def _check_alike(first: PartFolder, other: PartFolder) -> None:
    """Refuse parts of different wholes."""
    changed = prepared.differences(first.index, other.index)
    if changed:
        shown = "; ".join(f"{name} is {a!r} and {b!r}" for name, (a, b) in changed.items())
        raise ValueError(
            f"{first.path} and {other.path} were prepared differently: {shown}, expected the same; "
            f"prepare one of them again into a new folder, e.g. with "
            f"`{replace(first.index, part=other.index.part).command(Path('PART'))}`"
        )
    embedded = [folder.index.conditioner for folder in (first, other)]
    if embedded[0] != embedded[1]:
        raise ValueError(
            f"{first.path} and {other.path} have prompts of {embedded[0] and embedded[0].spec} and "
            f"{embedded[1] and embedded[1].spec}, expected the same; prepare both with the same "
            "--conditioner"
        )
    if first.index.num_parts != other.index.num_parts:
        raise ValueError(
            f"{first} and {other} are parts of different divisions, expected one n in --shard i/n; "
            "merge the parts of one division"
        )


def _conversations(first: PartFolder) -> bytes | None:
    """Read the conversations, which the first part keeps; None for captions."""
    if first.index.conversations_sha256 is None:
        return None
    path = first.path / CONVERSATIONS
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != first.index.conversations_sha256:
        raise ValueError(
            f"{path} is missing or differs from its checksum in index.json; repair it with "
            f"`{first.command}`"
        )
    return data


def _bring(folder: PartFolder, number: int, out: Path) -> bool:
    """Put a shard and then its record into `out`; tell whether it was not there."""
    shard = folder.index.shards[number // folder.index.num_parts]
    source, target = (encode.record_path(path, number) for path in (folder.path, out))
    try:
        recorded = encode.read_record(source).shard  # which knows of no prompts
        listed = replace(shard, prompts_sha256=None, prompts_size=0)
        damaged = None if recorded == listed else source
    except (OSError, ValueError, TypeError):
        damaged = source
    if damaged is None:
        record = source.read_bytes()
        is_there = target.is_file() and target.read_bytes() == record
        if is_there and shards.find_damage(out, shard) is None:
            return False
        damaged = shards.find_damage(folder.path, shard)
    if damaged is not None:
        raise ValueError(
            f"{damaged} is missing or differs from what index.json of {folder} lists; repair it "
            f"with `{folder.command}`"
        )
    suffixes = [LATENTS] if shard.prompts_sha256 is None else [LATENTS, PROMPTS]
    for suffix in suffixes:
        file = Path(shard.file).with_suffix(suffix)
        _link_or_copy(folder.path / file, out / file)
    rows = Path(shard.file).with_suffix(".jsonl")
    # Written, not linked: that syncs the folder, so the link reaches the disk before the record.
    write_atomic(out / rows, (folder.path / rows).read_bytes())
    write_atomic(target, record)
    return True


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.unlink(missing_ok=True)
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        write_atomic(target, source.read_bytes())
