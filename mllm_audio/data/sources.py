"""Rows to train on: conversations, captioned clips put as conversations, and text to replay.

All of them are tokenised and measured when a source is made: training must not stop at a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mllm_audio.data.captioned import CaptionedClips
from mllm_audio.data.clips import PreparedClip
from mllm_audio.data.conversations import Conversation, caption_conversation, parse_conversation
from mllm_audio.data.dataset import InMemory
from mllm_audio.data.layout import Row, Text
from mllm_audio.data.manifest import read_rows
from mllm_audio.data.messages import AudioPiece, render, to_row


@dataclass(frozen=True)
class ConversationSource(InMemory):
    """Conversations as rows.

    Raises:
        ValueError: naming the conversation, if it cannot be rendered, has no assistant message or
            an unknown sound file, or is longer than `max_positions`.
    """

    conversations: Sequence[Conversation]
    clips: Mapping[str, PreparedClip]  # by name
    text_tokenizer: PreTrainedTokenizerBase
    max_positions: int  # of the backbone

    def __post_init__(self) -> None:
        """Check every conversation."""
        for index, length in enumerate(self._lengths):
            _check_length(length, self.max_positions, self.name(index))

    @cached_property
    def _lengths(self) -> list[int]:
        return [
            _num_ids(_pieces(c, self.text_tokenizer, self.clips))
            + sum(self.clips[name].num_tokens + 2 for name in c.audio)
            for c in self.conversations
        ]

    def __len__(self) -> int:
        """Count the conversations."""
        return len(self.conversations)

    def length(self, index: int) -> int:
        """Count the positions of a conversation."""
        return self._lengths[index]

    def name(self, index: int) -> str:
        """Name the file and line of a conversation."""
        return self.conversations[index].name

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Render a conversation; there is nothing to draw."""
        pieces = _pieces(self.conversations[index], self.text_tokenizer, self.clips)
        return to_row(pieces, lambda name: self.clips[name].latents())


@dataclass(frozen=True)
class ClipConversations(CaptionedClips):
    """Captioned clips as conversations: the caption asks, the clip answers.

    Raises:
        ValueError: naming the clip, if one of its captions cannot be rendered, or it is longer
            than `max_positions` with one.
    """

    max_positions: int  # of the backbone

    def __post_init__(self) -> None:
        """Check every wording."""
        lengths: dict[str, int] = {}  # of a caption, with the template and the ends of the audio
        for clip in self.clips:
            for caption in clip.captions:
                if caption not in lengths:
                    with _located(clip.name):
                        pieces = render(caption_conversation(clip, caption), self.text_tokenizer)
                    lengths[caption] = _num_ids(pieces) + 2
                length = lengths[caption] + clip.num_tokens
                _check_length(length, self.max_positions, clip.name)

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Ask for the clip with a caption drawn from its wordings."""
        clip = self.clips[index]
        messages = caption_conversation(clip, self.caption(index, generator))
        return to_row(render(messages, self.text_tokenizer), lambda _: clip.latents())


@dataclass(frozen=True)
class TextSource(InMemory):
    """Text without audio as rows, mixed in so that a language model keeps what it knew."""

    texts: Sequence[Text]
    names: Sequence[str]  # file and line of each

    @classmethod
    def read(
        cls,
        path: Path | str,
        text_tokenizer: PreTrainedTokenizerBase,
        max_positions: int,
        block_tokens: int | None = None,
    ) -> TextSource:
        """Tokenise JSON lines of {"text": ...} or {"messages": ...}.

        A text is cut into blocks, and every id is learned; a special token written in it is plain
        text. Of messages the model learns what the assistant says, as in conversations.

        Args:
            path: of the file.
            text_tokenizer: with `SPECIAL_TOKENS`.
            max_positions: of the backbone; messages may not be longer.
            block_tokens: of a text; `max_positions` by default.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming file and line, if a row is of neither form, holds audio, is too long
                or has nothing to learn; or if there are no rows.
        """
        path = Path(path)
        size = min(block_tokens or max_positions, max_positions)
        texts: list[Text] = []
        names: list[str] = []
        for line, values in read_rows(path):
            if "messages" in values:
                blocks = [_chat_text(parse_conversation(path, line, values), text_tokenizer)]
                _check_length(len(blocks[0].input_ids), max_positions, f"{path}:{line}")
            else:
                blocks = _plain_text(f"{path}:{line}", values, text_tokenizer, size)
            texts += blocks
            names += [f"{path.name}:{line}"] * len(blocks)
        if not texts:
            raise ValueError(f"{path} has no rows, expected at least one with text or messages")
        return cls(texts, names)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.texts)

    def length(self, index: int) -> int:
        """Count the ids of a row."""
        return len(self.texts[index].input_ids)

    def name(self, index: int) -> str:
        """Name the file and line of a row."""
        return self.names[index]

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Return a row; there is nothing to draw."""
        return [self.texts[index]]


def _pieces(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    clips: Mapping[str, PreparedClip],
) -> list[Text | AudioPiece]:
    """Render a conversation that has something to learn, and known sound files only."""
    with _located(conversation.name):
        missing = [audio for audio in conversation.audio if audio not in clips]
        if missing:
            raise ValueError(
                f"audio {missing[0]!r} is not among the {len(clips)} prepared clips; prepare it"
            )
        if all(message.role != "assistant" for message in conversation.messages):
            raise ValueError("no assistant message, expected one to learn from; add it")
        return render(conversation.messages, tokenizer)


def _chat_text(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Render messages without audio."""
    if conversation.audio:
        raise ValueError(
            f"{conversation.name}: found audio {conversation.audio[0]!r} in text to replay, "
            "expected text alone; take the row out"
        )
    (text,) = _pieces(conversation, tokenizer, {})
    assert isinstance(text, Text)
    return text


def _plain_text(
    where: str, values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, block_tokens: int
) -> list[Text]:
    """Cut a text into blocks; a block of one id has nothing to predict and is left out."""
    text = values.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{where}: found {' '.join(repr(values).split())[:60]}, expected text or messages; "
            "fill it in or remove it"
        )
    ids = tokenizer(text, add_special_tokens=True, split_special_tokens=True, verbose=False)
    blocks = torch.tensor(ids["input_ids"]).split(block_tokens)
    return [Text(b, torch.ones(len(b), dtype=torch.bool)) for b in blocks if len(b) > 1]


def _num_ids(pieces: Sequence[Text | AudioPiece]) -> int:
    return sum(len(piece.input_ids) for piece in pieces if isinstance(piece, Text))


def _check_length(length: int, max_positions: int, name: str) -> None:
    if length > max_positions:
        raise ValueError(
            f"{name} has {length} elements, text and audio together, the backbone takes "
            f"{max_positions}; shorten it or take it out"
        )


@contextmanager
def _located(name: str) -> Iterator[None]:
    """Say in an error where it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
