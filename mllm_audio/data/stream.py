"""Captioned clips streamed from shards, a few of which are open at a time."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mllm_audio.conditioners.base import PromptStream, pad
from mllm_audio.data.captioned import CaptionedClips
from mllm_audio.data.clips import PreparedClip, read_shard
from mllm_audio.data.layout import Audio, Prompt, Row
from mllm_audio.data.prompts import PromptReader
from mllm_audio.data.remote import PreparedFolder
from mllm_audio.data.shards import LATENTS, PROMPTS, ROWS, ShardInfo

READERS = 8  # files checked or fetched at once


class ClipStream(Sequence[PreparedClip]):
    """The clips of one split, by number; names, lengths and latents are read as they are needed.

    Args:
        folder: that they are in.
        split: one of SPLITS.
        shuffle_shards: shards whose rows are shuffled together. Twice as many stay open, as rows
            may be left over from those before; the one used longest ago is closed for another.
        streams: of the conditioner that `prompt` reads.
    """

    def __init__(
        self,
        folder: PreparedFolder,
        split: str,
        shuffle_shards: int,
        streams: Sequence[PromptStream] = (),
    ) -> None:
        self.folder, self.split, self.streams = folder, split, streams
        self._suffixes = (ROWS, LATENTS, *([PROMPTS] if streams else []))
        self._shards = [shard for shard in folder.index.shards if shard.counts[split]]
        stops = [0, *accumulate(shard.counts[split] for shard in self._shards)]
        self.groups = [range(*ends) for ends in pairwise(stops)]
        self._stops = stops[1:]
        self._open = lru_cache(maxsize=2 * shuffle_shards)(self._read)
        self._open_prompts = lru_cache(maxsize=2 * shuffle_shards)(self._read_prompts)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
        self._expected: dict[int, Future[None]] = {}  # by the number of the shard

    def __len__(self) -> int:
        """Count the clips."""
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: Any) -> Any:
        """Look a clip up, by an int; its latents stay on disk."""
        number = bisect_right(self._stops, index)
        return self._open(number)[index - self.groups[number].start]

    def prompt(self, index: int, wording: int) -> tuple[Tensor, ...]:
        """Read the streams, each (L, D_s), of one of a clip's wordings."""
        reader = self._open_prompts(bisect_right(self._stops, index))
        return pad(reader.read(self[index].first_caption + wording), self.streams)

    def expect(self, groups: Sequence[range]) -> None:
        """Check or fetch the shards of these groups in the background, in order, and no others."""
        numbers = [bisect_right(self._stops, group.start) for group in groups]
        for number in self._expected.keys() - numbers:
            self._expected.pop(number).cancel()
        for number in numbers:
            if number not in self._expected:
                shard = self._shards[number]
                self._expected[number] = self._readers.submit(self._fetch, shard)

    def _fetch(self, shard: ShardInfo) -> None:
        for suffix in self._suffixes:
            self.folder.file(shard, suffix)

    def _read(self, number: int) -> list[PreparedClip]:
        if number in self._expected:
            self._expected.pop(number).result()
        shard = self._shards[number]
        self._fetch(shard)
        clips = read_shard(self.folder.file(shard, LATENTS))
        return [clip for clip in clips if clip.split == self.split]

    def _read_prompts(self, number: int) -> PromptReader:
        path = self.folder.file(self._shards[number], PROMPTS)
        return PromptReader(path, [stream.name for stream in self.streams])


@dataclass(frozen=True)
class ShardedClips(CaptionedClips):
    """Clips that follow one of their captions, streamed from shards."""

    clips: ClipStream

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Put the clip behind a caption drawn from its wordings, as text or embedded."""
        if not self.clips.streams:
            return super().row(index, generator)
        clip = self.clips[index]
        prompt = Prompt(self.clips.prompt(index, self.wording(index, generator)))
        return [prompt, Audio(clip.latents(), torch.arange(clip.num_tokens))]

    def groups(self) -> Sequence[range]:
        """List the rows of each shard."""
        return self.clips.groups

    def expect(self, groups: Sequence[range]) -> None:
        """Check or fetch the shards of these groups in the background."""
        self.clips.expect(groups)


def captions(folder: PreparedFolder, splits: Sequence[str]) -> Iterator[str]:
    """Read every wording of every clip of some splits, in order."""
    shards = [shard for shard in folder.index.shards if any(shard.counts[s] for s in splits)]
    with ThreadPoolExecutor(READERS, thread_name_prefix="captions") as readers:
        for path in readers.map(lambda shard: folder.file(shard, ROWS), shards):
            with path.open(encoding="utf-8") as file:
                for row in map(json.loads, file):
                    if row["split"] in splits:
                        yield from row["captions"]
