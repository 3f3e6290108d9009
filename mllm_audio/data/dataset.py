"""Sources of rows to batches: masking, replayed text, and the order of an epoch.

Everything here is a pure function of (seed, step) and (seed, epoch, row), so a resumed run sees
the batches the uninterrupted one would have seen, with no state to save, and a step holds the same
rows and masks however many processes share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.data.config import DataConfig
from mllm_audio.data.layout import Audio, Prompt, Row, Text, collate
from mllm_audio.data.prefetch import prefetched
from mllm_audio.masking import (
    MaskingConfig,
    sample_far,
    sample_kept_positions,
    sample_known_positions,
    sample_ratio,
)
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch


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

    def groups(self) -> Sequence[range]:
        """List the rows that are stored together, none of them empty."""

    def expect(self, groups: Sequence[range]) -> None:
        """Begin to read these groups in the background, and no others."""


class InMemory(Sized):
    """Rows that are at hand: one group, nothing to read ahead."""

    def groups(self) -> Sequence[range]:
        """List all rows as one group."""
        return [range(len(self))] if len(self) else []

    def expect(self, groups: Sequence[range]) -> None:
        """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The rows of one split, and which of them make up each optimizer step."""

    source: RowSource
    special: SpecialIds
    masking: MaskingConfig
    config: DataConfig
    batch_size: int  # rows of an optimizer step, over all processes
    seed: int
    end_of_audio: bool = True
    replay: RowSource | None = None  # text mixed in to hold what the model knew
    micro_batch_size: int | None = None  # rows computed at once; None: the whole batch
    statistics: tuple[Tensor, Tensor] | None = None  # mean and std, (D,), of what replaces latents

    def __post_init__(self) -> None:
        """Check that a batch is whole micro-batches."""
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(
                f"train.batch_size={self.batch_size} is not a multiple of train.micro_batch_size="
                f"{self.micro_batch_size}; change one of them"
            )

    @property
    def num_micro_batches(self) -> int:
        """Count the micro-batches of an optimizer step, over all processes."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    @property
    def num_replayed(self) -> int:
        """Count the replayed rows of a batch; at least one row is the source's."""
        if self.replay is None:
            return 0
        return min(round(self.batch_size * self.config.replay_share), self.batch_size - 1)

    @property
    def rows_per_batch(self) -> int:
        """Count the source's rows of a batch; with fewer rows than that, all of them."""
        return max(1, min(self.batch_size - self.num_replayed, len(self.source)))

    @property
    def batches_per_epoch(self) -> int:
        """Count the batches of one pass; rows that would be part of another are left out."""
        return max(1, len(self.source) // self.rows_per_batch)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[int]]:
        """Order one pass over the rows: every row at most once, batches of similar length.

        Groups of rows are permuted and taken `shuffle_shards` at a time; the rows of such a block
        are permuted and cut into batches, and what is left over goes to the next block. Rows of
        blocks that lie before the first batch that is asked for are not read.

        Args:
            epoch: number of the pass, from 0.
            skip: leave out this many batches at the beginning.
        """
        generator = seeded("order", self.seed, epoch)
        size, left = self.rows_per_batch, torch.empty(0, dtype=torch.long)
        blocks = self._blocks(epoch)
        following = [*blocks[1:], *self._blocks(epoch + 1)[:1]]
        try:
            for block, next_block in zip(blocks, following, strict=True):
                rows = torch.cat([left, *(torch.arange(g.start, g.stop) for g in block)])
                rows = rows[torch.randperm(len(rows), generator=generator)]
                num_batches = len(rows) // size
                rows, left = rows[: num_batches * size], rows[num_batches * size :]
                order = torch.randperm(num_batches, generator=generator).tolist()
                if skip >= num_batches:
                    skip -= num_batches
                    continue
                self.source.expect([*block, *next_block])
                batches = self._of_similar_length(rows.tolist())
                yield from (batches[i] for i in order[skip:])
                skip = 0
        finally:
            self.source.expect([])

    def _blocks(self, epoch: int) -> list[list[range]]:
        """Permute the groups of rows, and take a few at a time."""
        groups, size = self.source.groups(), self.config.shuffle_shards
        order = torch.randperm(len(groups), generator=seeded("groups", self.seed, epoch)).tolist()
        return [[groups[i] for i in order[k : k + size]] for k in range(0, len(order), size)]

    def _of_similar_length(self, rows: list[int]) -> list[list[int]]:
        """Cut rows into whole batches, sorted by length within `length_group` batches."""
        size = self.rows_per_batch
        group = size * self.config.length_group
        batches: list[list[int]] = []
        for start in range(0, len(rows), group):
            chunk = sorted(rows[start : start + group], key=self.source.length)
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return batches

    def steps(self, first: int, rank: int = 0, world_size: int = 1) -> Generator[list[Batch]]:
        """Yield what one process computes of optimizer steps `first`, `first + 1`, ... without end.

        Micro-batch m of a step is that of process m % world_size. A thread prepares the next
        `prefetch_steps` steps; closing the generator ends it.

        Args:
            first: number of the first step, from 0.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ValueError: if micro-batches cannot be shared out evenly, or rows do not fill them.
        """
        num, size = self.num_micro_batches, self.batch_size - self.num_replayed
        if num % world_size:
            raise ValueError(
                f"a step has {num} micro-batches for {world_size} processes, expected a multiple; "
                "change train.micro_batch_size"
            )
        found, needed = len(self.source), size if num > 1 else 1
        if found < needed:
            raise ValueError(
                f"found {found} training rows, expected at least {needed} for {num} micro-batches; "
                f"prepare more, or set train.batch_size to {found} or less"
            )
        steps = self._steps(first, range(rank, num, world_size))
        return prefetched(steps, self.config.prefetch_steps)

    def _steps(self, first: int, parts: range) -> Generator[list[Batch]]:
        epoch, skip = divmod(first, self.batches_per_epoch)
        numbers = count(first)
        while True:
            for rows, step in zip(self.epoch(epoch, skip), numbers, strict=False):
                yield [self.batch(rows, epoch, step, part) for part in parts]
            epoch, skip = epoch + 1, 0

    def batch(
        self, indices: Sequence[int], epoch: int, step: int, part: int | None = None
    ) -> Batch:
        """Build a batch: one masking ratio for the step, masks of their own per span.

        Args:
            indices: the source's rows of the whole step.
            epoch: number of the pass.
            step: number of the optimizer step.
            part: number of a micro-batch; None is the whole step.
        """
        ratio = sample_ratio(self.masking, seeded("ratio", self.seed, step))
        plan = [(self.source, index, ("clip", self.seed, epoch, index)) for index in indices]
        if self.replay is not None and self.num_replayed:
            generator = seeded("replay", self.seed, step)
            drawn = torch.randint(len(self.replay), (self.num_replayed,), generator=generator)
            plan += [
                (self.replay, index, ("replay", self.seed, step, number))
                for number, index in enumerate(drawn.tolist())
            ]
        if part is not None:  # strided: replayed rows and lengths are spread evenly
            plan = plan[part :: self.num_micro_batches]
        rows: list[Row] = []
        unconditional, share = [], self.config.unconditional_share
        for source, index, draws in plan:
            generator = seeded(*draws)
            row = source.row(index, generator)
            hidden = False
            if source is not self.replay:
                hidden = float(torch.rand((), generator=generator)) < share
                # Without audio to learn, nothing would be left of a row whose text is hidden.
                hidden &= any(isinstance(piece, Audio) and piece.learned for piece in row)
                row = [self._masked(piece, ratio, generator) for piece in row]
            unconditional.append(hidden)
            rows.append(row)
        return collate(
            rows,
            [source.name(index) for source, index, _ in plan],
            self.special,
            unconditional=unconditional,
            masking_ratio=ratio,
            end_of_audio=self.end_of_audio,
            pack_tokens=self.config.pack_tokens,
        )

    def _masked(
        self, part: Text | Prompt | Audio, ratio: float, generator: torch.Generator
    ) -> Text | Prompt | Audio:
        """Hide a share of the latents that the model learns; what a user sends is heard whole."""
        if not isinstance(part, Audio) or not part.learned:
            return part
        masking, num_tokens = self.masking, len(part.latents)
        if masking.hidden == "own":
            known = sample_known_positions(num_tokens, ratio, generator)
            return replace(part, own=True, kept=known)
        kept = sample_kept_positions(num_tokens, ratio, generator)
        part = replace(part, next_kept=masking.next_kept)
        if masking.hidden == "drop":
            return replace(part, kept=kept, far=self._far(kept, generator))
        assert self.statistics is not None
        mean, std = self.statistics  # (D,) each
        noise = torch.zeros_like(part.latents)  # (N, D)
        if masking.hidden == "gaussian":
            noise = torch.randn(part.latents.shape, generator=generator)
        heard = mean + std * noise  # (N, D)
        heard[kept] = part.latents[kept]
        every = torch.arange(num_tokens)
        return replace(part, kept=every, heard=heard, far=self._far(every, generator))

    def _far(self, kept: Tensor, generator: torch.Generator) -> Tensor | None:
        """Choose what copies of the start and of each of (K,) kept latents predict: (K + 1,)."""
        return sample_far(self.masking, 1 + len(kept), generator)


def prompt_ids(text_tokenizer: PreTrainedTokenizerBase, caption: str) -> Tensor:
    """Tokenize a caption, (L,) int64; a special token written in it is plain text.

    Raises:
        ValueError: for a caption with no text.
    """
    if not caption.strip():
        raise ValueError("found an empty caption, expected a description of the sound to make")
    ids = text_tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
