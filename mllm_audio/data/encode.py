"""Encode the sound files of one shard: read, check, crop, level, encode, write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from mllm_audio import wav
from mllm_audio.config import from_dict, to_dict
from mllm_audio.data.manifest import SPLITS, ManifestRow, hash_fraction
from mllm_audio.data.shards import PrepareSettings, ShardInfo, shard_file
from mllm_audio.files import encode_lines, write_atomic
from mllm_audio.tokenizers.base import AudioTokenizer

Part = tuple[int, list[ManifestRow]]  # number of a shard, and its rows
FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A manifest row that was left out."""

    line: int  # of the manifest
    audio: str  # path as the manifest writes it
    reason: str
    stamp: int | None  # of the file when it was rejected: a repaired file is tried again


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `records/*.json` keeps of a finished shard."""

    shard: ShardInfo
    longest_clip: int  # most latents of any clip
    longest_clip_name: str  # first such clip
    rejected: tuple[Rejection, ...]
    num_train_tokens: int  # latents of the train clips
    # (D,) of the train latents. Sums of squares are safe here: a float16 squared has 22
    # significant bits, float64 holds 53.
    total: tuple[float, ...]
    total_square: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs beside its rows."""

    out: Path
    audio_folder: Path  # where the manifest's paths start
    tokenizer_spec: str
    settings: PrepareSettings


def encode_parts(
    job: Job, todo: Sequence[Part], tokenizer: AudioTokenizer, advance: Callable[[], Any]
) -> None:
    """Encode shards in this process, calling `advance` after each row."""
    num_threads = torch.get_num_threads()
    # One thread, as in a worker: sums split over threads differ in their last bits.
    torch.set_num_threads(1)
    try:
        for part in todo:
            _encode_shard(job, part, tokenizer, advance)
    finally:
        torch.set_num_threads(num_threads)


def record_path(out: Path, number: int) -> Path:
    """Where the record of a shard is kept."""
    return out / "records" / f"{number:05d}.json"


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError, TypeError: if it is damaged.
    """
    record: Record = from_dict(Record, json.loads(path.read_text(encoding="utf-8")), str(path))
    return record


def file_stamp(path: Path) -> int | None:
    """Return when the file last changed in any way, None if it cannot be seen."""
    try:
        return path.stat().st_ctime_ns
    except (OSError, ValueError):
        return None


def _encode_shard(
    job: Job, part: Part, tokenizer: AudioTokenizer, advance: Callable[[], Any]
) -> None:
    """Encode the rows of one shard and write it, its record last."""
    number, candidates = part
    rows, clips, num_samples, rejected = [], [], [], []
    total = torch.zeros(tokenizer.latent_dim, dtype=torch.float64)  # (D,)
    total_square = total.clone()  # (D,)
    num_train_tokens = 0
    for row in candidates:
        path = job.audio_folder / row.audio
        stamp = file_stamp(path)
        try:
            waveform = _load(row, path, tokenizer.sample_rate, job.settings)  # (S,)
            latents = _encode(tokenizer, _padded(waveform, tokenizer, job.settings))  # (N, D)
        except _RejectedError as error:
            rejected.append(
                Rejection(line=row.line, audio=row.audio, reason=str(error), stamp=stamp)
            )
        else:
            rows.append(row)
            clips.append(latents)
            num_samples.append(len(waveform))
            if row.split == "train":
                # Of the stored values, so that the statistics are those of what training reads.
                values = latents.double()  # (N, D)
                total += values.sum(0)
                total_square += values.square().sum(0)
                num_train_tokens += len(values)
        advance()
    lengths = [len(clip) for clip in clips]
    longest_clip = max(lengths, default=0)
    record = Record(
        shard=write_shard(job.out, number, rows, clips, num_samples, tokenizer.latent_dim),
        longest_clip=longest_clip,
        longest_clip_name=rows[lengths.index(longest_clip)].audio if rows else "",
        rejected=tuple(rejected),
        num_train_tokens=num_train_tokens,
        total=tuple(total.tolist()),
        total_square=tuple(total_square.tolist()),
    )
    write_atomic(record_path(job.out, number), json.dumps(to_dict(record)).encode())


def write_shard(
    folder: Path,
    number: int,
    rows: Sequence[ManifestRow],
    latents: Sequence[Tensor],
    num_samples: Sequence[int],
    latent_dim: int,
) -> ShardInfo:
    """Write shard `number`: for each row its (N, D) float16 latents and its waveform length."""
    lengths = torch.tensor([0, *(len(clip) for clip in latents)])
    tensors = {
        "latents": torch.cat([torch.empty(0, latent_dim, dtype=torch.float16), *latents]),
        "offsets": lengths.cumsum(0),
        "num_samples": torch.tensor(num_samples, dtype=torch.int64),
    }
    texts = [
        {"audio": row.audio, "captions": row.captions, "split": row.split, "extra": row.extra}
        for row in rows
    ]
    file = shard_file(number)
    data, lines = save(tensors), encode_lines(texts)
    write_atomic(folder / file, data)
    write_atomic((folder / file).with_suffix(".jsonl"), lines)
    return ShardInfo(
        file=file,
        sha256=hashlib.sha256(data).hexdigest(),
        rows_sha256=hashlib.sha256(lines).hexdigest(),
        num_clips=len(rows),
        num_tokens=len(tensors["latents"]),
        counts={split: sum(row.split == split for row in rows) for split in SPLITS},
    )


class _RejectedError(Exception):
    """A sound file that cannot be used; the text says why."""


def _load(row: ManifestRow, path: Path, sample_rate: int, settings: PrepareSettings) -> Tensor:
    """Read, check, crop and level one file: (S,) float32."""
    try:
        seconds = wav.info(path).seconds
        if seconds > settings.longest_file_seconds:
            limit = settings.longest_file_seconds
            raise _RejectedError(f"too long: {seconds:.1f} s, longest_file_seconds is {limit:g}")
        waveform = wav.read(path, sample_rate).waveform  # (S,)
    except (ValueError, OSError) as error:
        raise _RejectedError(str(error)) from error
    if not len(waveform):
        raise _RejectedError(f"{path} holds no samples at {sample_rate} Hz: too short")
    num_kept = max(1, round(settings.max_seconds * sample_rate))
    surplus = len(waveform) - num_kept
    if surplus > 0:
        if settings.crop == "reject":
            seconds = len(waveform) / sample_rate
            raise _RejectedError(
                f"too long: {seconds:.2f} s, max_seconds is {settings.max_seconds:g}"
            )
        start = 0
        if settings.crop == "random":
            start = int(hash_fraction(f"{settings.seed}\0{row.audio}") * (surplus + 1))
        waveform = waveform[start : start + num_kept]
    return wav.normalize_level(waveform)


def _padded(waveform: Tensor, tokenizer: AudioTokenizer, settings: PrepareSettings) -> Tensor:
    """Pad (S,) with silence to the length of the longest clip, if that is asked for."""
    surplus = round(settings.max_seconds * tokenizer.sample_rate) - len(waveform)
    return F.pad(waveform, (0, surplus)) if settings.pad else waveform


def _encode(tokenizer: AudioTokenizer, waveform: Tensor) -> Tensor:
    """Encode (S,) to (N, D) float16, refusing what float16 cannot hold."""
    with torch.inference_mode():
        latents = tokenizer.encode(waveform[None])[0].cpu()  # (N, D)
    if not torch.isfinite(latents).all():
        raise _RejectedError("its latents are not finite")
    largest = latents.abs().max().item()
    if largest > FLOAT16_MAX:
        raise _RejectedError(f"its latents reach {largest:.4g}, float16 holds {FLOAT16_MAX:.0f}")
    return latents.half()
