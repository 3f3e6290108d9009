"""Chat messages of text and audio, and their way through a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.data.layout import Audio, ChatRow, Text
from mllm_audio.data.template import MARK, special_tokens, token_id, write
from mllm_audio.text import AUDIO


@dataclass(frozen=True)
class TextPart:
    """A stretch of text in a message."""

    text: str


@dataclass(frozen=True)
class AudioPart:
    """A piece of audio in a message."""

    audio: Any  # what the caller refers to: a path, a `Clip`, or (N, D) latents


@dataclass(frozen=True)
class Message:
    """What one speaker says in one turn."""

    role: str  # system, user, assistant, or another one that the chat template knows
    parts: tuple[TextPart | AudioPart, ...]


@dataclass(frozen=True)
class AudioPiece:
    """The place of an audio part in a rendered conversation."""

    audio: Any  # what the `AudioPart` refers to
    said: bool  # by the assistant, so that the model learns it


def parse_messages(values: Any, where: str) -> tuple[Message, ...]:
    """Read messages from Hugging Face's form.

    That is a list of {"role": ..., "content": ...}, content a string or a list of {"type": "text",
    "text": ...} and {"type": "audio", "audio": ...}. Other keys are ignored.

    Raises:
        ValueError: saying `where`, and which message and part, if one is not of that form.
    """
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{where}: messages is {_shown(values)}, expected a list of messages")
    return tuple(_message(v, f"{where}: message {n}") for n, v in enumerate(values, 1))


def as_messages(values: Any, where: str) -> tuple[Message, ...]:
    """Take `Message`s as they are, or read them by `parse_messages`."""
    if values and all(isinstance(message, Message) for message in values):
        return tuple(values)
    return parse_messages(values, where)


def render(
    messages: Sequence[Message],
    text_tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> list[Text | AudioPiece]:
    """Write a conversation with the tokenizer's chat template, or `PLAIN_TEMPLATE`.

    The model learns what the assistant says: all that follows the generation prompt, through the
    special token that ends the turn. The text before each reply is tokenised on its own, as at
    inference, where it is all there is.

    Args:
        messages: in order.
        text_tokenizer: with `SPECIAL_TOKENS`.
        add_generation_prompt: end where the assistant's next turn begins.
        continue_final_message: end inside the last turn, the assistant's, for it to go on.

    Raises:
        ValueError: if text holds a special token, a reply is empty, or the template refuses the
            messages or does not write replies as they are.
    """
    if continue_final_message and (add_generation_prompt or messages[-1].role != "assistant"):
        raise ValueError(
            f"the last message is of {messages[-1].role!r}, add_generation_prompt is "
            f"{add_generation_prompt}; only an assistant's message without it can be continued"
        )
    special = special_tokens(text_tokenizer)
    chat = [
        {"role": message.role, "content": _content(message, number, special)}
        for number, message in enumerate(messages, 1)
    ]
    text, replies = write(chat, text_tokenizer, special, add_generation_prompt)
    if continue_final_message:
        text, replies[-1] = text[: replies[-1].end], replace(replies[-1], end_token=MARK)
    parts = [(m.role == "assistant", part) for m in messages for part in m.parts]
    audio = [AudioPiece(part.audio, said) for said, part in parts if isinstance(part, AudioPart)]
    if text.count(AUDIO) != len(audio):
        raise ValueError(
            f"the chat template writes {text.count(AUDIO)} of {len(audio)} audio parts, expected "
            "each once; use roles that it knows, or another template"
        )
    for reply in reversed(replies):
        said = text[reply.start : reply.end] + MARK * (reply.end_token == MARK)
        text = text[: reply.start] + MARK + said + text[reply.end :]
    ids = text_tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
    end_ids = [token_id(text_tokenizer, reply.end_token) for reply in replies]
    mark, place = token_id(text_tokenizer, MARK), token_id(text_tokenizer, AUDIO)
    return list(_pieces(ids["input_ids"], audio, end_ids, mark, place))


def to_row(pieces: Iterable[Text | AudioPiece], latents_of: Callable[[Any], Tensor]) -> ChatRow:
    """Fill in the latents, (N, D) for each audio part, all of them kept."""
    row: list[Text | Audio] = []
    for piece in pieces:
        if isinstance(piece, Text):
            row.append(piece)
        else:
            latents = latents_of(piece.audio)
            kept = torch.arange(len(latents))
            row.append(Audio(latents, kept, learned=piece.said, announced=piece.said))
    return row


def _message(values: Any, where: str) -> Message:
    if not isinstance(values, dict) or not {"role", "content"} <= values.keys():
        raise ValueError(f"{where} is {_shown(values)}, expected an object with role and content")
    role, content = values["role"], values["content"]
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"{where}: role is {_shown(role)}, expected user, assistant or system")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: content is {_shown(content)}, expected text or a list of parts")
    return Message(role, tuple(_part(p, f"{where}: part {n}") for n, p in enumerate(content, 1)))


def _part(values: Any, where: str) -> TextPart | AudioPart:
    kind = values.get("type") if isinstance(values, dict) else None
    if kind not in ("text", "audio"):
        raise ValueError(
            f'{where} is {_shown(values)}, expected {{"type": "text", "text": ...}} or '
            '{"type": "audio", "audio": ...}'
        )
    value = values.get(kind)
    if kind == "text" and isinstance(value, str):
        return TextPart(value)
    if kind == "text" or value is None or (isinstance(value, str) and not value.strip()):
        expected = "a string" if kind == "text" else "the path of a sound file"
        raise ValueError(f"{where}: {kind} is {_shown(value)}, expected {expected}")
    return AudioPart(value)


def _shown(value: Any) -> str:
    """Show a value on one line of an error message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _content(message: Message, number: int, special: Sequence[str]) -> str:
    """Join a message's parts, `AUDIO` in place of audio, refusing text that reads as structure."""
    who = f"message {number} ({message.role})"
    texts = [part.text if isinstance(part, TextPart) else "\0" for part in message.parts]
    for text in (message.role, "".join(texts)):  # joined: neighbours may make up a token
        found = next((token for token in special if token in text), None)
        if found is not None:
            raise ValueError(
                f"{who} holds the special token {found}, expected plain text; remove it from there"
            )
    content = "".join(p.text if isinstance(p, TextPart) else AUDIO for p in message.parts)
    if message.role == "assistant" and not content.strip():
        raise ValueError(f"{who} is empty, expected text or audio; fill it in or remove it")
    return content


def _pieces(
    ids: Iterable[int], audio: Iterable[AudioPiece], end_ids: Iterable[int], mark: int, place: int
) -> Iterator[Text | AudioPiece]:
    """Cut token ids at the places of audio, learned from a mark to the id that ends the reply."""
    audio, end_ids = iter(audio), iter(end_ids)
    text: list[int] = []
    mask: list[bool] = []
    learned, end_id = False, mark
    for token in [*ids, None]:
        if token in (place, None) and text:
            yield Text(torch.tensor(text), torch.tensor(mask))
            text, mask = [], []
        if token == place:
            yield next(audio)
        elif token == mark:
            assert not learned or end_id == mark
            learned = not learned
            end_id = next(end_ids) if learned else mark
        elif token is not None:
            text.append(token)
            mask.append(learned)
            learned = learned and token != end_id
    assert not learned
