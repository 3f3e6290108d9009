"""Captions of a prepared folder embedded once: prompts beside the latents of each shard.

shards/00000.prompts.safetensors   caption int64 (sum of wordings), for each clip and wording in
turn the number of its text among the shard's texts
NAME float16 (sum l, D_s) of each stream, the texts'
embeddings one after another
NAME.offsets int64 (texts + 1) into it
with the conditioner's fingerprint and the checksum of the captions in its header. Embedding
again with another conditioner replaces the files; a run that was killed continues.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mllm_audio.conditioners import load_conditioner
from mllm_audio.conditioners.base import Conditioner
from mllm_audio.data.shards import PROMPTS, ConditionerInfo, ShardIndex, ShardInfo, write_index
from mllm_audio.files import file_sha256, write_atomic


class PromptReader:
    """Read the prompts of one shard through a memory map, opened at the first read."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, tuple(names)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "names": self.names}

    @cached_property
    def _tensors(self) -> Any:
        return safe_open(self.path, framework="pt")

    @cached_property
    def _texts(self) -> list[int]:
        texts: list[int] = self._tensors.get_tensor("caption").tolist()
        return texts

    @cached_property
    def _offsets(self) -> dict[str, list[int]]:
        return {k: self._tensors.get_tensor(f"{k}.offsets").tolist() for k in self.names}

    def read(self, caption: int) -> tuple[Tensor, ...]:
        """Read the streams, each (l, D_s) float32, of a caption by its number in the shard."""
        text = self._texts[caption]
        return tuple(
            self._tensors.get_slice(name)[offsets[text] : offsets[text + 1]].float()
            for name, offsets in self._offsets.items()
        )


def embed_captions(folder: Path, index: ShardIndex, spec: str, *, progress: bool) -> bool:
    """Write the prompts of every shard that has none of this conditioner; complete the index.

    Args:
        folder: complete, and held by this process.
        index: of the folder.
        spec: what `load_conditioner` accepts.
        progress: show a progress bar.

    Returns:
        Whether anything had to be written.

    Raises:
        ValueError: if the conditioner cannot be loaded, or an embedding is not finite in float16.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditioner = load_conditioner(spec, device)
    shards, is_changed = [], False
    for shard in tqdm(index.shards, desc="captions", unit="shard", disable=not progress):
        path = (folder / shard.file).with_suffix(PROMPTS)
        # One entry: the order of several is not kept, and with it the bytes would change.
        header = {"made_from": f"{conditioner.fingerprint} {shard.rows_sha256}"}
        if not _is_current(path, shard, header):
            write_atomic(path, _encode(folder / shard.file, conditioner, header))
            is_changed = True
        size = path.stat().st_size
        shards.append(replace(shard, prompts_sha256=file_sha256(path), prompts_size=size))
    info = ConditionerInfo(
        spec=spec, fingerprint=conditioner.fingerprint, streams=conditioner.streams
    )
    complete = replace(index, shards=tuple(shards), conditioner=info)
    if complete != index:
        write_index(folder, complete)
    return is_changed or complete != index


def _is_current(path: Path, shard: ShardInfo, header: dict[str, str]) -> bool:
    """Tell whether a file holds these prompts, whole."""
    if not path.is_file():
        return False
    if shard.prompts_sha256 is not None and file_sha256(path) != shard.prompts_sha256:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.metadata() == header)
    except (SafetensorError, OSError):
        return False


def _encode(shard: Path, conditioner: Conditioner, header: dict[str, str]) -> bytes:
    """Embed the captions of a shard."""
    rows = shard.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    captions = [caption for row in rows for caption in json.loads(row)["captions"]]
    texts = sorted(set(captions))
    numbers = {text: number for number, text in enumerate(texts)}
    tensors = {"caption": torch.tensor([numbers[caption] for caption in captions])}
    embedded = conditioner.embed(texts)
    for place, stream in enumerate(conditioner.streams):
        rows_of = [embeddings[place] for embeddings in embedded]
        lengths = torch.tensor([0, *map(len, rows_of)])
        values = torch.cat([torch.empty(0, stream.dim), *rows_of]).half()
        if not values.isfinite().all():
            raise ValueError(
                f"embeddings {stream.name!r} of the captions in {shard} are not finite in float16; "
                "check the weights of the conditioner"
            )
        tensors |= {stream.name: values, f"{stream.name}.offsets": lengths.cumsum(0)}
    return save(tensors, header)
