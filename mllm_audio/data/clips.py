"""Read the clips of a prepared folder, their latents left on disk until they are asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mllm_audio.data.manifest import SPLITS
from mllm_audio.data.shards import ROWS, find_damage, read_index


class ShardReader:
    """Read latents of one shard through a memory map, opened at the first read.

    It can be pickled: each process of a data loader maps the file again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _tensors(self) -> Any:
        return safe_open(self.path, framework="pt")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def read(self, name: str) -> list[int]:
        """Read one of the small tensors, `offsets` or `num_samples`."""
        return self._tensors.get_tensor(name).tolist()

    def latents(self, start: int, stop: int) -> Tensor:
        """Read latents `start` to `stop` of the shard: (stop - start, D) float32."""
        return self._tensors.get_slice("latents")[start:stop].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedClip:
    """One clip of a prepared folder. Its latents stay on disk until they are asked for."""

    name: str  # audio path as the manifest writes it
    captions: tuple[str, ...]  # the caption, then its alternative wordings
    split: str  # one of SPLITS
    extra: dict[str, str]  # other columns of the manifest
    num_samples: int  # waveform samples before padding
    num_tokens: int  # N
    reader: ShardReader
    start: int  # of its latents in the shard
    first_caption: int  # number of its caption among all wordings of the shard

    def latents(self) -> Tensor:
        """Read the clip's latents: (N, D) float32, as the tokenizer made them."""
        return self.reader.latents(self.start, self.start + self.num_tokens)


def load_split(folder: Path | str, split: str, *, verify: bool = True) -> list[PreparedClip]:
    """List the clips of one split, perhaps none, latents left on disk.

    Args:
        folder: a complete prepared folder.
        split: one of SPLITS.
        verify: compare the checksum of every file first; reads the whole folder once.

    Raises:
        ValueError: if the folder is incomplete, a file is damaged, or there is no such split.
    """
    folder = Path(folder)
    index = read_index(folder)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    clips: list[PreparedClip] = []
    for shard in index.shards:
        damaged = find_damage(folder, shard) if verify else None
        if damaged is not None:
            raise ValueError(
                f"{damaged} is missing or differs from its checksum in index.json; repair it with "
                f"`{index.command(folder)}`"
            )
        clips += [clip for clip in read_shard(folder / shard.file) if clip.split == split]
    return clips


def read_shard(path: Path) -> list[PreparedClip]:
    """List the clips of a shard, of every split, latents left on disk; nothing is verified."""
    reader = ShardReader(path)
    offsets, num_samples = reader.read("offsets"), reader.read("num_samples")
    with path.with_suffix(ROWS).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    first_captions = accumulate((len(row["captions"]) for row in rows), initial=0)
    return [
        PreparedClip(
            name=row["audio"],
            captions=tuple(row["captions"]),
            split=row["split"],
            extra=row["extra"],
            num_samples=num_samples[i],
            num_tokens=offsets[i + 1] - offsets[i],
            reader=reader,
            start=offsets[i],
            first_caption=first_caption,
        )
        for i, (row, first_caption) in enumerate(zip(rows, first_captions, strict=False))
    ]
