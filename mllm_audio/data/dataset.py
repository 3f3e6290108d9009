"""Sources of rows to batches: masking, replayed text, and the order of an epoch.

Everything here is a pure function of (seed, step) and (seed, epoch, row), so a resumed run sees
the batches the uninterrupted one would have seen, with no state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.config import check_range
from mllm_audio.data.layout import Audio, Row, Text, collate
from mllm_audio.data.shards import PreparedClip
from mllm_audio.masking import MaskingConfig, sample_kept_positions, sample_ratio
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How rows become batches."""

    unconditional_share: float = 0.1  # share of rows whose text is the null prompt, for guidance
    length_group: int = 8  # batches shuffled together and sorted by length, to pad less; 1 = off
    replay_share: float = 0.0  # share of each batch that is replayed text
    pack_tokens: int | None = None  # pack a batch into rows of this many elements; None pads

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("data", self, 0, 1, "unconditional_share")
        check_range("data", self, 0, 0.9, "replay_share")
        check_range("data", self, 1, 1_000_000, "length_group", "pack_tokens")


def seeded(*parts: int | str) -> torch.Generator:
    """Make a generator whose state depends on `parts` alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class RowSource(Protocol):
    """Rows to train on, by number."""

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """Count the elements of row `index`, about: rows of like length share a batch."""

    def name(self, index: int) -> str:
        """Say where row `index` came from, for error messages."""

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Build row `index`, its audio unmasked; `generator` picks among wordings."""


@dataclass(frozen=True)
class CaptionedClips:
    """Clips that follow one of their captions."""

    clips: Sequence[PreparedClip]
    text_tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.clips)

    def length(self, index: int) -> int:
        """Count the latents of a clip."""
        return self.clips[index].num_tokens

    def name(self, index: int) -> str:
        """Name the clip's sound file."""
        return self.clips[index].name

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Put the clip behind a caption drawn from its wordings."""
        clip = self.clips[index]
        text = Text(prompt_ids(self.text_tokenizer, self.caption(index, generator)))
        return [text, Audio(clip.latents(), torch.arange(clip.num_tokens))]

    def caption(self, index: int, generator: torch.Generator) -> str:
        """Draw one of a clip's wordings."""
        captions = self.clips[index].captions
        return captions[int(torch.randint(len(captions), (1,), generator=generator))]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows of one split, and which of them make up each optimizer step."""

    source: RowSource
    special: SpecialIds
    masking: MaskingConfig
    config: DataConfig
    batch_size: int
    seed: int
    end_of_audio: bool = True
    replay: RowSource | None = None  # text mixed in to hold what the model knew

    @property
    def num_replayed(self) -> int:
        """Count the replayed rows of a batch; at least one row is the source's."""
        if self.replay is None:
            return 0
        return min(round(self.batch_size * self.config.replay_share), self.batch_size - 1)

    @property
    def rows_per_batch(self) -> int:
        """Count the source's rows of a batch."""
        return self.batch_size - self.num_replayed

    @property
    def batches_per_epoch(self) -> int:
        """Count the batches of one pass; a last, smaller one is dropped if there is another."""
        return max(1, len(self.source) // self.rows_per_batch)

    def epoch(self, epoch: int) -> list[list[int]]:
        """Order one pass over the rows: every row at most once, batches of similar length."""
        generator = seeded("order", self.seed, epoch)
        order = torch.randperm(len(self.source), generator=generator).tolist()
        size = self.rows_per_batch
        group = size * self.config.length_group
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            chunk = sorted(order[start : start + group], key=self.source.length)
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        full = [batch for batch in batches if len(batch) == size] or batches
        return [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]

    def steps(self, first: int) -> Iterator[Batch]:
        """Yield the batches of optimizer steps `first`, `first + 1`, ... without end."""
        epoch, skip = divmod(first, self.batches_per_epoch)
        while True:
            for index, rows in enumerate(self.epoch(epoch)[skip:], start=skip):
                yield self.batch(rows, epoch, epoch * self.batches_per_epoch + index)
            epoch, skip = epoch + 1, 0

    def batch(self, indices: Sequence[int], epoch: int, step: int) -> Batch:
        """Build the batch of one optimizer step: one masking ratio, masks of their own per span."""
        ratio = sample_ratio(self.masking, seeded("ratio", self.seed, step))
        rows: list[Row] = []
        unconditional = []
        for index in indices:
            generator = seeded("clip", self.seed, epoch, index)
            row = self.source.row(index, generator)
            hidden = float(torch.rand((), generator=generator)) < self.config.unconditional_share
            # Without audio to learn, nothing would be left of a row whose text is hidden.
            learns_audio = any(isinstance(part, Audio) and part.learned for part in row)
            unconditional.append(hidden and learns_audio)
            rows.append([_masked(part, ratio, generator) for part in row])
        names = [self.source.name(index) for index in indices]
        if self.replay is not None and self.num_replayed:
            generator = seeded("replay", self.seed, step)
            drawn = torch.randint(len(self.replay), (self.num_replayed,), generator=generator)
            rows += [self.replay.row(index, generator) for index in drawn.tolist()]
            names += [self.replay.name(index) for index in drawn.tolist()]
            unconditional += [False] * self.num_replayed
        return collate(
            rows,
            names,
            self.special,
            unconditional=unconditional,
            masking_ratio=ratio,
            end_of_audio=self.end_of_audio,
            pack_tokens=self.config.pack_tokens,
        )


def _masked(part: Text | Audio, ratio: float, generator: torch.Generator) -> Text | Audio:
    """Drop a share of the latents that the model learns; what a user sends is heard whole."""
    if isinstance(part, Text) or not part.learned:
        return part
    return replace(part, kept=sample_kept_positions(len(part.latents), ratio, generator))


def prompt_ids(text_tokenizer: PreTrainedTokenizerBase, caption: str) -> Tensor:
    """Tokenize a caption, (L,) int64; a special token written in it is plain text.

    Raises:
        ValueError: for a caption with no text.
    """
    if not caption.strip():
        raise ValueError("found an empty caption, expected a description of the sound to make")
    ids = text_tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
