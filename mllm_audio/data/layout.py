"""Interleaved rows of text and audio laid out as a `Batch`: positions, targets, packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mllm_audio.masking import end_weights
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch

IGNORED = -100  # in `Batch.text_labels`: nothing is learned here
TIME_BLOCK = 8  # rows are padded to a multiple: few shapes, so few compiled CPU kernels


@dataclass(frozen=True)
class Text:
    """A stretch of text in an interleaved row."""

    input_ids: Tensor  # (L,) int64
    learned: Tensor | None = None  # (L,) bool, ids the model learns to say; None: none of them


@dataclass(frozen=True)
class Prompt:
    """What a conditioner makes of a caption."""

    embeddings: tuple[Tensor, ...]  # of each stream (L, D_s), what is missing is zeros


@dataclass(frozen=True)
class Audio:
    """A span of audio in an interleaved row."""

    latents: Tensor  # (N, D)
    kept: Tensor  # (K,) int64, increasing content positions that stay in the sequence
    learned: bool = True  # its latents are predicted; false for audio that a user sends
    announced: bool = False  # the model learns to open the span, after text that it says
    heard: Tensor | None = None  # (K, D), what stands at the kept positions; None: their latents
    next_kept: bool = True  # each predicts the next kept one; false: the immediate next
    # (K + 1,) int64: a copy behind the start and each kept latent predicts the so-many-th next one,
    # as `generation/parallel.py` asks it; 0 or None: no copy
    far: Tensor | None = None
    own: bool = False  # all positions stay; those that are not kept predict their own latent


ChatRow = Sequence[Text | Audio]
Row = Sequence[Text | Prompt | Audio]
PADDING = {  # of the fields with an entry per element
    "input_ids": 0,
    "position_ids": 0,
    "is_null": False,
    "is_audio": False,
    "is_prompt": False,
    "predicts": False,
    "text_labels": IGNORED,
}


def collate(
    rows: Sequence[Row],
    names: Sequence[str],
    special: SpecialIds,
    *,
    unconditional: Sequence[bool] | None = None,
    masking_ratio: float = 0.0,
    end_of_audio: bool = True,
    pack_tokens: int | None = None,
) -> Batch:
    """Lay interleaved rows out side by side, padded on the right, or packed behind one another.

    Position ids count the tokens that masking dropped, so a kept latent stands where it stood.
    Right padding needs no attention mask: causal attention never looks at it. Packed rows carry
    `segment_ids`, and attention does not cross them.

    Args:
        rows: text and audio parts in order, any number of each.
        names: one per row, for error messages.
        special: ids of the audio tokens.
        unconditional: rows whose text the null prompt replaces; none by default.
        masking_ratio: the ratio the rows' `kept` positions were drawn with.
        end_of_audio: whether the last latent of a span predicts the end.
        pack_tokens: put rows behind one another up to this many elements; None pads each.
    """
    spans = [part for row in rows for part in row if isinstance(part, Audio)]
    latent_dim = spans[0].latents.shape[1] if spans else 0
    layout = _Layout(special, masking_ratio, end_of_audio, latent_dim)
    pieces, lengths = [layout.nothing()], []
    for row, null in zip(rows, unconditional or [False] * len(rows), strict=True):
        own = layout.row(row, null)
        pieces += own
        lengths.append(sum(len(piece["input_ids"]) for piece in own))
    # The pieces of all rows behind one another: (E,) for the elements.
    values = {f: torch.cat([piece[f] for piece in pieces if f in piece]) for f in pieces[0]}
    values["text_labels"] = _text_labels(values["input_ids"], values.pop("learned"), lengths)
    packed, segments = [[length] for length in lengths], None
    if pack_tokens is not None:
        packed = _pack(lengths, pack_tokens)
        numbers = torch.cat([torch.arange(1, len(group) + 1) for group in packed])  # (rows,)
        segments = numbers.repeat_interleave(torch.tensor(lengths))  # (E,)
        segments = _padded(segments, packed, 0)
    values |= {name: _padded(values[name], packed, PADDING[name]) for name in PADDING}
    return Batch(
        **values,
        segment_ids=segments,
        prompts=stacked([part for row in rows for part in row if isinstance(part, Prompt)]),
        has_copies=any(span.far is not None for span in spans),
        masking_ratio=masking_ratio,
        names=tuple(names),
        num_elements=sum(lengths),
    )


def stacked(prompts: Sequence[Prompt]) -> tuple[Tensor, ...]:
    """Put the streams of all prompts side by side, each (B', L, D_s)."""
    return tuple(
        torch.stack(stream) for stream in zip(*(p.embeddings for p in prompts), strict=True)
    )


def _text_labels(input_ids: Tensor, learned: Tensor, lengths: Sequence[int]) -> Tensor:
    """Give each element the id that follows it in its row, where that is learned: (E,) int64."""
    learned = learned.roll(-1)
    learned[torch.tensor(lengths).cumsum(0) - 1] = False  # nothing follows in the row
    return torch.where(learned, input_ids.roll(-1), IGNORED)


def _padded(values: Tensor, rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Cut (E,) elements into rows, (B, T), each padded on the right to a multiple of `TIME_BLOCK`.

    Args:
        values: elements of all rows.
        rows: number of elements of each stretch of each row.
        padding: what to fill with.
    """
    cut = values.split([sum(row) for row in rows])
    stacked = pad_sequence(list(cut), batch_first=True, padding_value=padding)  # (B, T)
    return F.pad(stacked, (0, -stacked.shape[1] % TIME_BLOCK), value=padding)


def _pack(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group row lengths, order kept, so that no group is longer than `most` in all.

    A row that is longer stands alone. The order is kept because the noise of the loss is drawn in
    it: packed and padded batches have the same loss.
    """
    groups: list[list[int]] = []
    for length in lengths:
        if groups and sum(groups[-1]) + length <= most:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


@dataclass(frozen=True)
class _Layout:
    """What the layout of a row depends on beside the row."""

    special: SpecialIds
    masking_ratio: float
    end_of_audio: bool
    latent_dim: int

    def nothing(self) -> dict[str, Tensor]:
        """Lay out nothing: each field has its type, of which text leaves some out."""
        none = torch.zeros(0, dtype=torch.long)
        return {
            "input_ids": none,
            "position_ids": none,
            "is_null": none.bool(),
            "is_audio": none.bool(),
            "is_prompt": none.bool(),
            "predicts": none.bool(),
            "learned": none.bool(),
            "latents": torch.zeros(0, self.latent_dim),
            "content_positions": none,
            "target_positions": none,
            "target_latents": torch.zeros(0, self.latent_dim),
            "target_is_end": none.bool(),
            "end_weight": none.float(),
        }

    def row(self, row: Row, unconditional: bool) -> list[dict[str, Tensor]]:
        """Lay out one row: for each part its fields of `Batch`, and the elements that are learned.

        Nothing is learned where the text is not there to be continued.
        """
        pieces, position = list[dict[str, Tensor]](), 0
        for index, part in enumerate(row):
            if isinstance(part, Text):
                pieces.append(self.text(part, position, unconditional))
                position += len(part.input_ids)
            elif isinstance(part, Prompt):
                pieces.append(self.prompt(part, position, unconditional))
                position += len(pieces[-1]["input_ids"])
            elif part.own:
                pieces.append(self.own(part, position))
                position += len(part.latents)
            else:
                closed = index + 1 < len(row)
                pieces.append(self.audio(part, position, unconditional, closed))
                position += len(part.latents) + 2
        return pieces

    def text(self, part: Text, position: int, unconditional: bool) -> dict[str, Tensor]:
        length = len(part.input_ids)
        no = torch.zeros(length, dtype=torch.bool)
        return {
            "input_ids": part.input_ids,
            "position_ids": torch.arange(position, position + length),
            "is_null": torch.full_like(no, unconditional),
            "is_audio": no,
            "is_prompt": no,
            "predicts": no,
            "learned": no if part.learned is None or unconditional else part.learned,
        }

    def prompt(self, part: Prompt, position: int, unconditional: bool) -> dict[str, Tensor]:
        length = sum(len(stream) for stream in part.embeddings)
        text = Text(torch.full((length,), self.special.cond))
        piece = self.text(text, position, unconditional)
        return {**piece, "is_prompt": ~piece["is_prompt"]}

    def own(self, part: Audio, position: int) -> dict[str, Tensor]:
        """Lay out a place for every latent; those that are masked predict what belongs there."""
        num_tokens = len(part.latents)
        no = torch.zeros(num_tokens, dtype=torch.bool)
        is_audio = no.clone()
        is_audio[part.kept] = True
        masked = (~is_audio).nonzero()[:, 0]
        return {
            "input_ids": torch.full((num_tokens,), self.special.audio),
            "position_ids": torch.arange(position, position + num_tokens),
            "is_null": no,
            "is_audio": is_audio,
            "is_prompt": no,
            "predicts": ~is_audio,
            "learned": no,
            "latents": part.latents[part.kept],
            "content_positions": part.kept,
            "target_positions": masked,
            "target_latents": part.latents[masked],
            "target_is_end": torch.zeros(len(masked), dtype=torch.bool),
            "end_weight": torch.ones(len(masked)),
        }

    def audio(
        self, part: Audio, position: int, unconditional: bool, closed: bool
    ) -> dict[str, Tensor]:
        """Lay out start, kept latents and, where something follows, the end.

        The start and each kept latent predict the next kept one, or the immediate next, and their
        copies one behind it; the end is target position N, beyond it there is none.
        """
        num_tokens, num_kept = len(part.latents), len(part.kept)
        heard = part.latents[part.kept] if part.heard is None else part.heard
        # Start, kept latents, end: at 0, 1 + content position, N + 1 from where the span begins.
        places = torch.cat([torch.tensor([-1]), part.kept, torch.tensor([num_tokens])])
        ones = torch.ones(1 + num_kept, dtype=torch.long)
        far = 0 * ones if part.far is None else part.far
        # Those that predict by their number, 0 for the start; a copy has that of its original.
        number = torch.arange(1 + num_kept).repeat_interleave(1 + (far > 0).long())
        is_copy = F.pad(number, (1, 0), value=-1)[:-1] == number
        distance = torch.where(is_copy, far[number], 1)
        ahead = (number + distance).clamp(max=num_kept + 2)
        kept_next = F.pad(places, (0, 1), value=num_tokens + 1)[ahead]
        targets = kept_next if part.next_kept else places[number] + distance
        is_target = part.learned & (targets < num_tokens + int(self.end_of_audio))
        targets = targets[is_target]
        weight = torch.ones(len(number))  # masking leaves these as frequent as they were
        if part.next_kept:
            for asked in (ones,) if part.far is None else (ones, far.clamp(min=1)):
                weights = end_weights(num_tokens, part.kept, self.masking_ratio, asked)
                weight = torch.where(distance == asked[number], weights[number], weight)
        is_audio, end = number > 0, torch.zeros(int(closed), dtype=torch.bool)
        input_ids = torch.where(is_audio, self.special.audio, self.special.audio_start)
        no = torch.zeros(len(number) + len(end), dtype=torch.bool)
        learned = F.pad(no[1:], (1, 0), value=part.announced and not unconditional)
        positions = torch.cat([places[number], places[-1:]]) + (position + 1)
        return {
            "input_ids": F.pad(input_ids, (0, len(end)), value=self.special.audio_end),
            "position_ids": positions[: len(no)],
            "is_null": no,
            "is_audio": torch.cat([is_audio, end]),
            "is_prompt": no,
            "predicts": torch.cat([is_target, end]),
            "learned": learned,
            "latents": heard[number[is_audio] - 1],
            "content_positions": part.kept[number[is_audio] - 1],
            "target_positions": targets,
            "target_latents": F.pad(part.latents, (0, 0, 0, 1))[targets],
            "target_is_end": targets == num_tokens,
            "end_weight": weight[is_target],
        }
