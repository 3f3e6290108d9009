"""Prepared clips to interleaved batches: captions, masking, padding, and the order of an epoch.

Everything here is a pure function of (seed, step) and (seed, epoch, clip), so a resumed run sees
the batches the uninterrupted one would have seen, with no state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mllm_audio.config import check_range
from mllm_audio.data.shards import PreparedClip
from mllm_audio.masking import (
    MaskingConfig,
    end_weights,
    sample_kept_positions,
    sample_ratio,
)
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How prepared clips become batches."""

    unconditional_share: float = 0.1  # share of rows whose prompt is the null prompt, for guidance
    length_group: int = 8  # batches shuffled together and sorted by length, to pad less; 1 = off

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("data", self, 0, 1, "unconditional_share")
        check_range("data", self, 1, 1_000_000, "length_group")


@dataclass(frozen=True)
class Text:
    """A stretch of text in an interleaved row."""

    input_ids: Tensor  # (L,) int64


@dataclass(frozen=True)
class Audio:
    """A span of audio in an interleaved row."""

    latents: Tensor  # (N, D)
    kept: Tensor  # (K,) int64, increasing content positions that stay in the sequence


Row = Sequence[Text | Audio]
TIME_BLOCK = 8  # rows are padded to a multiple: few shapes, so few compiled CPU kernels


def seeded(*parts: int | str) -> torch.Generator:
    """Make a generator whose state depends on `parts` alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def collate(
    rows: Sequence[Row],
    names: Sequence[str],
    special: SpecialIds,
    *,
    unconditional: Sequence[bool] | None = None,
    masking_ratio: float = 0.0,
    end_of_audio: bool = True,
) -> Batch:
    """Lay interleaved rows out side by side, padded on the right.

    Position ids count the tokens that masking dropped, so a kept latent stands where it stood.
    Right padding needs no attention mask: causal attention never looks at it.

    Args:
        rows: text and audio parts in order, any number of each.
        names: one per row, for error messages.
        special: ids of the audio tokens.
        unconditional: rows whose prompt the null prompt replaces; none by default.
        masking_ratio: the ratio the rows' `kept` positions were drawn with.
        end_of_audio: whether the last latent of a span predicts the end.
    """
    spans = [part for row in rows for part in row if isinstance(part, Audio)]
    latent_dim = spans[0].latents.shape[1] if spans else 0
    laid = [_lay_out(row, special, masking_ratio, end_of_audio, latent_dim) for row in rows]

    def padded(field: str) -> Tensor:
        rows_of_field = pad_sequence([row[field] for row in laid], batch_first=True)  # (B, T)
        return F.pad(rows_of_field, (0, -rows_of_field.shape[1] % TIME_BLOCK))

    def joined(field: str) -> Tensor:
        return torch.cat([row[field] for row in laid])

    return Batch(
        **{
            f: padded(f) for f in ("input_ids", "position_ids", "is_prompt", "is_audio", "predicts")
        },
        **{f: joined(f) for f in ("latents", "content_positions", "target_positions")},
        **{f: joined(f) for f in ("target_latents", "target_is_end", "end_weight")},
        unconditional=torch.tensor(unconditional or [False] * len(rows)),
        masking_ratio=masking_ratio,
        names=tuple(names),
    )


def _lay_out(
    row: Row, special: SpecialIds, masking_ratio: float, end_of_audio: bool, latent_dim: int
) -> dict[str, Tensor]:
    """Build one row's fields of `Batch`, without padding."""
    pieces: list[dict[str, Tensor]] = []
    position = 0
    for index, part in enumerate(row):
        if isinstance(part, Text):
            pieces.append(_lay_out_text(part, position))
            position += len(part.input_ids)
        else:
            closed = index + 1 < len(row)
            pieces.append(
                _lay_out_audio(part, position, special, masking_ratio, end_of_audio, closed)
            )
            position += len(part.latents) + 2
    for piece in pieces:
        for field in ("latents", "target_latents"):
            piece.setdefault(field, torch.zeros(0, latent_dim))
    return {field: torch.cat([piece[field] for piece in pieces]) for field in pieces[0]}


def _lay_out_text(part: Text, position: int) -> dict[str, Tensor]:
    length = len(part.input_ids)
    no, none = torch.zeros(length, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    return {
        "input_ids": part.input_ids,
        "position_ids": torch.arange(position, position + length),
        "is_prompt": ~no,
        "is_audio": no,
        "predicts": no,
        "content_positions": none,
        "target_positions": none,
        "target_is_end": none.bool(),
        "end_weight": none.float(),
    }


def _lay_out_audio(
    part: Audio,
    position: int,
    special: SpecialIds,
    masking_ratio: float,
    end_of_audio: bool,
    closed: bool,
) -> dict[str, Tensor]:
    """Lay out start, kept latents and, where something follows, the end.

    The start and each kept latent predict the next kept one; the last predicts the end, at
    target position N.
    """
    num_tokens, kept = len(part.latents), part.kept
    length = 1 + len(kept) + int(closed)
    input_ids = torch.full((length,), special.audio)
    input_ids[0] = special.audio_start
    is_audio = torch.zeros(length, dtype=torch.bool)
    is_audio[1 : 1 + len(kept)] = True
    predicts = is_audio.clone()
    predicts[0] = True
    offsets = [torch.zeros(1, dtype=torch.long), kept + 1]
    if closed:
        input_ids[-1] = special.audio_end
        offsets.append(torch.tensor([num_tokens + 1]))
    targets = kept
    target_latents = part.latents[kept]  # (K, D)
    if end_of_audio:
        targets = torch.cat([kept, torch.tensor([num_tokens])])
        target_latents = torch.cat(
            [target_latents, target_latents.new_zeros(1, target_latents.shape[1])]
        )
    else:
        predicts[len(kept)] = False
    # The start is followed by a latent in any clip, so its prediction needs no weight.
    weight = torch.cat([torch.ones(1), end_weights(num_tokens, kept, masking_ratio)])
    return {
        "input_ids": input_ids,
        "position_ids": position + torch.cat(offsets),
        "is_prompt": torch.zeros(length, dtype=torch.bool),
        "is_audio": is_audio,
        "predicts": predicts,
        "latents": part.latents[kept],
        "content_positions": kept,
        "target_positions": targets,
        "target_latents": target_latents,
        "target_is_end": targets == num_tokens,
        "end_weight": weight[: len(targets)],
    }


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The captioned clips of one split, and which of them make up each optimizer step."""

    clips: Sequence[PreparedClip]
    text_tokenizer: PreTrainedTokenizerBase
    masking: MaskingConfig
    config: DataConfig
    batch_size: int
    seed: int
    end_of_audio: bool = True

    @property
    def batches_per_epoch(self) -> int:
        """Count the batches of one pass; a last, smaller one is dropped if there is another."""
        return max(1, len(self.clips) // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """Order one pass over the clips: every clip at most once, batches of similar length."""
        generator = seeded("order", self.seed, epoch)
        order = torch.randperm(len(self.clips), generator=generator).tolist()
        group = self.batch_size * self.config.length_group
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            chunk = sorted(order[start : start + group], key=lambda i: self.clips[i].num_tokens)
            batches += [
                chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)
            ]
        full = [batch for batch in batches if len(batch) == self.batch_size] or batches
        return [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]

    def steps(self, first: int) -> Iterator[Batch]:
        """Yield the batches of optimizer steps `first`, `first + 1`, ... without end."""
        epoch, skip = divmod(first, self.batches_per_epoch)
        while True:
            for index, clips in enumerate(self.epoch(epoch)[skip:], start=skip):
                yield self.batch(clips, epoch, epoch * self.batches_per_epoch + index)
            epoch, skip = epoch + 1, 0

    def batch(self, clip_indices: Sequence[int], epoch: int, step: int) -> Batch:
        """Build the batch of one optimizer step: one masking ratio, masks of their own per clip."""
        ratio = sample_ratio(self.masking, seeded("ratio", self.seed, step))
        rows: list[Row] = []
        unconditional = []
        for index in clip_indices:
            clip, generator = self.clips[index], seeded("clip", self.seed, epoch, index)
            choice = int(torch.randint(len(clip.captions), (1,), generator=generator))
            unconditional.append(
                float(torch.rand((), generator=generator)) < self.config.unconditional_share
            )
            kept = sample_kept_positions(clip.num_tokens, ratio, generator)
            rows.append([self.text(clip.captions[choice]), Audio(clip.latents(), kept)])
        return collate(
            rows,
            [self.clips[index].name for index in clip_indices],
            SpecialIds.of(self.text_tokenizer),
            unconditional=unconditional,
            masking_ratio=ratio,
            end_of_audio=self.end_of_audio,
        )

    def text(self, caption: str) -> Text:
        """Tokenize a caption as a prompt."""
        return Text(prompt_ids(self.text_tokenizer, caption))


def prompt_ids(text_tokenizer: PreTrainedTokenizerBase, caption: str) -> Tensor:
    """Tokenize a caption, (L,) int64; a special token written in it is plain text.

    Raises:
        ValueError: for a caption with no text.
    """
    if not caption.strip():
        raise ValueError("found an empty caption, expected a description of the sound to make")
    ids = text_tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
