"""Conversations and captions as the engine takes them: ids, and the audio that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.data.layout import Audio, ChatRow, Prompt, Text
from mllm_audio.data.messages import Message, render, to_row
from mllm_audio.generation.interleaved import num_positions
from mllm_audio.generation.room import Room
from mllm_audio.text import SpecialIds


@dataclass(frozen=True)
class Prepared:
    """What a reply begins behind."""

    ids: list[int]
    latents: Tensor  # (K, D), of the `<|audio|>` ids
    learned: tuple[bool, ...] = ()  # of each span
    prompts: tuple[Tensor, ...] = ()  # of each of the conditioner's streams (L_s, D_s)
    open_latents: Tensor | None = None  # (N, D) of the span at its end that goes on


def prepare_conversation(
    messages: Sequence[Message],
    text_tokenizer: PreTrainedTokenizerBase,
    special: SpecialIds,
    hear: Callable[[Any], Tensor],
    room: Room,
    *,
    continue_final_message: bool,
) -> Prepared:
    """Lay a conversation out as `Voice.generate_interleaved` does.

    Args:
        messages: of the conversation.
        text_tokenizer: with a chat template, or without.
        special: ids of the markers.
        hear: makes (N, D) latents of what an audio part refers to.
        room: that the reply must fit.
        continue_final_message: go on with the last message.

    Raises:
        ValueError: if it cannot be written or heard, or leaves no room for a reply.
    """
    pieces = render(
        messages,
        text_tokenizer,
        add_generation_prompt=not continue_final_message,
        continue_final_message=continue_final_message,
    )
    row = to_row(pieces, hear)
    last = row[-1]
    is_open = continue_final_message and isinstance(last, Audio)
    given = last.latents if is_open and isinstance(last, Audio) else None
    room.check(num_positions(row) - int(is_open), None if given is None else len(given))
    ids, spans = _ids(row, special, is_open=is_open)
    nothing = torch.zeros(0, room.audio.latent_dim)
    latents = torch.cat([nothing, *(span.latents for span in spans)])
    return Prepared(ids, latents, tuple(span.learned for span in spans), open_latents=given)


def prepare_caption(prompt: Tensor | Prompt, special: SpecialIds, room: Room) -> Prepared:
    """Lay the prompt of one sound out as `Voice.generate` does.

    Raises:
        ValueError: if it leaves no room for the sound.
    """
    if isinstance(prompt, Prompt):
        streams = prompt.embeddings
        ids = [special.cond] * sum(map(len, streams))
    else:
        streams, ids = (), prompt.tolist()
    longest = room.lengths[1]
    if len(ids) + 1 + longest > room.limit:
        raise ValueError(
            f"the caption has {len(ids)} text tokens, the model has room for "
            f"{room.limit - longest - 1} beside {longest} latents; shorten it, or ask for fewer "
            "seconds"
        )
    nothing = torch.zeros(0, room.audio.latent_dim)
    return Prepared(
        [*ids, special.audio_start], nothing, (True,), prompts=streams, open_latents=nothing
    )


def _ids(row: ChatRow, special: SpecialIds, *, is_open: bool) -> tuple[list[int], list[Audio]]:
    """Give the ids of a row, a place for each latent, and its spans."""
    ids: list[int] = []
    spans: list[Audio] = []
    for index, part in enumerate(row):
        if isinstance(part, Text):
            ids += part.input_ids.tolist()
            continue
        spans.append(part)
        ids += [special.audio_start, *[special.audio] * len(part.latents)]
        if not (is_open and index + 1 == len(row)):
            ids.append(special.audio_end)
    return ids, spans
