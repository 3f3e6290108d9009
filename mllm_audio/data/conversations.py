"""Conversations: JSON lines of messages, and what `prepare` makes of them.

    messages  list of {"role": ..., "content": ...}, content a text or a list of parts in any order:
              {"type": "text", "text": ...} or {"type": "audio", "audio": PATH}; required
    split     as in a manifest; optional

PATH is relative to the file's folder, or absolute. Other columns are ignored. `prepare` encodes the
sound files and copies the rows, with their splits, to `conversations.jsonl` beside the shards.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mllm_audio.data.clips import PreparedClip, load_split
from mllm_audio.data.manifest import (
    SPLITS,
    ManifestRow,
    check_split,
    choose_validation,
    read_rows,
)
from mllm_audio.data.messages import (
    AudioPart,
    Message,
    TextPart,
    parse_messages,
)
from mllm_audio.data.shards import read_index
from mllm_audio.files import encode_lines

CONVERSATIONS = "conversations.jsonl"  # in a prepared folder


@dataclass(frozen=True)
class Conversation:
    """Messages to train on."""

    messages: tuple[Message, ...]
    split: str  # one of SPLITS
    name: str  # file and line

    @property
    def audio(self) -> list[str]:
        """Sound files in the order they are heard, as the file writes them."""
        parts = [part for message in self.messages for part in message.parts]
        return [part.audio for part in parts if isinstance(part, AudioPart)]


def read_conversations(path: Path | str) -> list[Conversation]:
    """Read and check a JSON-lines file of conversations.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a row is broken or no conversation.
    """
    path = Path(path)
    return [parse_conversation(path, line, values) for line, values in read_rows(path)]


def holds_conversations(path: Path | str) -> bool:
    """Tell whether the first row of a `.jsonl` or `.csv` file is a conversation."""
    first = next(read_rows(path), None)
    return first is not None and "messages" in first[1]


def plan_conversations(path: Path, validation_share: float) -> tuple[list[ManifestRow], bytes]:
    """Decide the splits of a file of conversations, and which sound files to encode.

    Where no row names validation, a share of the rows goes there: by their messages alone, so
    that the choice survives a reordered or grown file. A sound file counts as train if it is heard
    in any train row.

    Returns:
        A row for each sound file, in order, and the bytes of `CONVERSATIONS`.

    Raises:
        ValueError: naming file and line, if a row is broken, no conversation or without an
            assistant message, or if there is no sound file.
    """
    rows = list(read_rows(path))
    conversations = _with_validation(
        [parse_conversation(path, line, values) for line, values in rows], validation_share
    )
    clips: dict[str, ManifestRow] = {}
    for (line, _), conversation in zip(rows, conversations, strict=True):
        if all(message.role != "assistant" for message in conversation.messages):
            raise ValueError(
                f"{path}:{line}: no assistant message, expected one to learn from; add it"
            )
        for audio in conversation.audio:
            clip = clips.setdefault(audio, ManifestRow(audio, (), conversation.split, {}, line))
            if conversation.split == "train":
                clips[audio] = replace(clip, split="train")
    if not clips:
        raise ValueError(
            f"{path} has no audio part in {len(rows)} conversations, expected one at least; text "
            "alone needs no preparing, it can be replayed"
        )
    pairs = zip(rows, conversations, strict=True)
    return list(clips.values()), encode_lines([v | {"split": c.split} for (_, v), c in pairs])


def _with_validation(conversations: list[Conversation], share: float) -> list[Conversation]:
    """Move a share of the training rows to validation, unless a row already names validation."""
    if any(conversation.split == "validation" for conversation in conversations):
        return conversations
    keys = [json.dumps([asdict(message) for message in c.messages]) for c in conversations]
    pairs = list(zip(keys, conversations, strict=True))
    chosen = choose_validation([key for key, c in pairs if c.split == "train"], share)
    return [
        replace(c, split="validation") if c.split == "train" and key in chosen else c
        for key, c in pairs
    ]


def has_conversations(folder: Path | str) -> bool:
    """Tell whether a prepared folder holds conversations, not captions."""
    return (Path(folder) / CONVERSATIONS).is_file()


def usable_conversations(folder: Path | str) -> tuple[list[Conversation], int]:
    """Read the conversations of a prepared folder, of every split.

    Returns:
        Those whose every sound file was encoded, and how many were left out.
    """
    folder = Path(folder)
    read_index(folder)
    rejected = {values["audio"] for _, values in read_rows(folder / "rejected.jsonl")}
    conversations = read_conversations(folder / CONVERSATIONS)
    usable = [c for c in conversations if rejected.isdisjoint(c.audio)]
    return usable, len(conversations) - len(usable)


def load_conversations(folder: Path | str, split: str) -> list[Conversation]:
    """List the conversations of one split; those that name a rejected file are left out.

    Raises:
        ValueError: if the folder is incomplete, a row is broken, there is no such split, or nothing
            is left to train on.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    usable, num_dropped = usable_conversations(folder)
    conversations = [c for c in usable if c.split == split]
    if split == "train" and not conversations:
        raise ValueError(
            f"{folder} has no train conversation left, expected one at least; {num_dropped} name "
            f"a sound file in {Path(folder) / 'rejected.jsonl'}"
        )
    return conversations


def load_clips(folder: Path | str) -> dict[str, PreparedClip]:
    """Load the clips of every split by name: any conversation may name any of them."""
    clips = [clip for s in SPLITS for clip in load_split(folder, s, verify=s == SPLITS[0])]
    return {clip.name: clip for clip in clips}


def caption_conversation(clip: PreparedClip, caption: str) -> tuple[Message, ...]:
    """Put a captioned clip as a request and its answer."""
    request = Message("user", (TextPart(caption),))
    return request, Message("assistant", (AudioPart(clip.name),))


def parse_conversation(path: Path, line: int, values: dict[str, Any]) -> Conversation:
    """Read one row of a file.

    Raises:
        ValueError: naming file and line, if it is no conversation.
    """
    where = f"{path}:{line}"
    if "messages" not in values:
        raise ValueError(
            f"{where}: no 'messages' among the columns {sorted(values)}, expected them in every "
            "row or in none; split the file"
        )
    messages = parse_messages(values["messages"], where)
    conversation = Conversation(messages, check_split(where, values), f"{path.name}:{line}")
    for audio in conversation.audio:
        if not isinstance(audio, str):
            raise ValueError(f"{where}: audio is {audio!r}, expected the path of a sound file")
    return conversation
