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
class Audio:
    """A span of audio in an interleaved row."""

    latents: Tensor  # (N, D)
    kept: Tensor  # (K,) int64, increasing content positions that stay in the sequence
    learned: bool = True  # its latents are predicted; false for audio that a user sends
    announced: bool = False  # the model learns to open the span, after text that it says


Row = Sequence[Text | Audio]
BY_ELEMENT = ("input_ids", "position_ids", "is_null", "is_audio", "predicts", "text_labels")
BY_LATENT = ("latents", "content_positions")
BY_TARGET = ("target_positions", "target_latents", "target_is_end", "end_weight")


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
    nulls = unconditional or [False] * len(rows)
    laid = [layout.row(row, null) for row, null in zip(rows, nulls, strict=True)]
    segments = None
    if pack_tokens is not None:
        groups = _pack([len(row["input_ids"]) for row in laid], pack_tokens)
        segments = _padded(
            [
                torch.cat([torch.full((len(laid[i]["input_ids"]),), n) for n, i in enumerate(g, 1)])
                for g in groups
            ],
            0,
        )
        laid = [{k: torch.cat([laid[i][k] for i in g]) for k in laid[0]} for g in groups]
    values = {
        f: _padded([row[f] for row in laid], IGNORED if f == "text_labels" else 0)
        for f in BY_ELEMENT
    }
    values |= {f: torch.cat([row[f] for row in laid]) for f in BY_LATENT + BY_TARGET}
    return Batch(**values, segment_ids=segments, masking_ratio=masking_ratio, names=tuple(names))


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows of different length, filled with `value` to a multiple of `TIME_BLOCK`."""
    stacked = pad_sequence(list(rows), batch_first=True, padding_value=value)  # (B, T)
    return F.pad(stacked, (0, -stacked.shape[1] % TIME_BLOCK), value=value)


def _pack(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group row numbers, order kept, so that no group is longer than `most` in all.

    A row that is longer stands alone. The order is kept because the noise of the loss is drawn in
    it: packed and padded batches have the same loss.
    """
    groups: list[list[int]] = []
    filled = most
    for index, length in enumerate(lengths):
        if groups and filled + length <= most:
            groups[-1].append(index)
            filled += length
        else:
            groups.append([index])
            filled = length
    return groups


@dataclass(frozen=True)
class _Layout:
    """What the layout of a row depends on beside the row."""

    special: SpecialIds
    masking_ratio: float
    end_of_audio: bool
    latent_dim: int

    def row(self, row: Row, unconditional: bool) -> dict[str, Tensor]:
        """Build one row's fields of `Batch`, without padding."""
        pieces: list[dict[str, Tensor]] = []
        position = 0
        for index, part in enumerate(row):
            if isinstance(part, Text):
                pieces.append(self.text(part, position, unconditional))
                position += len(part.input_ids)
            else:
                pieces.append(self.audio(part, position, closed=index + 1 < len(row)))
                position += len(part.latents) + 2
        values = {field: torch.cat([piece[field] for piece in pieces]) for field in pieces[0]}
        following = values["input_ids"].roll(-1)
        learned = values.pop("learned").roll(-1)
        learned[-1] = False
        if unconditional:  # its text is not there to be continued
            learned = torch.zeros_like(learned)
        values["text_labels"] = torch.where(learned, following, IGNORED)
        return values

    def text(self, part: Text, position: int, unconditional: bool) -> dict[str, Tensor]:
        length = len(part.input_ids)
        no, none = torch.zeros(length, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
        return {
            "input_ids": part.input_ids,
            "position_ids": torch.arange(position, position + length),
            "is_null": torch.full_like(no, unconditional),
            "is_audio": no,
            "predicts": no,
            "learned": no if part.learned is None else part.learned,
            "latents": torch.zeros(0, self.latent_dim),
            "content_positions": none,
            "target_positions": none,
            "target_latents": torch.zeros(0, self.latent_dim),
            "target_is_end": none.bool(),
            "end_weight": none.float(),
        }

    def audio(self, part: Audio, position: int, closed: bool) -> dict[str, Tensor]:
        """Lay out start, kept latents and, where something follows, the end.

        The start and each kept latent predict the next kept one; the last predicts the end, at
        target position N.
        """
        num_tokens, kept = len(part.latents), part.kept
        length = 1 + len(kept) + int(closed)
        input_ids = torch.full((length,), self.special.audio)
        input_ids[0] = self.special.audio_start
        no = torch.zeros(length, dtype=torch.bool)
        is_audio, predicts, learned = no.clone(), no.clone(), no.clone()
        is_audio[1 : 1 + len(kept)] = True
        learned[0] = part.announced
        offsets = [torch.zeros(1, dtype=torch.long), kept + 1]
        if closed:
            input_ids[-1] = self.special.audio_end
            offsets.append(torch.tensor([num_tokens + 1]))
        num_targets = len(kept) + int(self.end_of_audio) if part.learned else 0
        predicts[:num_targets] = True
        targets = torch.cat([kept, torch.tensor([num_tokens])])[:num_targets]
        end = part.latents.new_zeros(1, self.latent_dim)
        # The start is followed by a latent in any clip, so its prediction needs no weight.
        weight = torch.cat([torch.ones(1), end_weights(num_tokens, kept, self.masking_ratio)])
        return {
            "input_ids": input_ids,
            "position_ids": position + torch.cat(offsets),
            "is_null": no,
            "is_audio": is_audio,
            "predicts": predicts,
            "learned": learned,
            "latents": part.latents[kept],
            "content_positions": kept,
            "target_positions": targets,
            "target_latents": torch.cat([part.latents[kept], end])[:num_targets],
            "target_is_end": targets == num_tokens,
            "end_weight": weight[:num_targets],
        }
