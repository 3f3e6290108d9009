"""Turn a manifest of sound files into shards of latents: resumable, parallel, deterministic.

`shards.py` describes what is written. Every file appears whole or not at all, and a shard counts as
finished once its record is written, after the shard itself. So a run may be killed at any moment;
the next run with the same arguments keeps the finished shards, and the result is the same bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.config import from_dict, to_dict
from mllm_audio.data import shards
from mllm_audio.data.manifest import (
    SPLITS,
    ManifestRow,
    hash_fraction,
    read_manifest,
    with_validation,
)
from mllm_audio.data.shards import PrepareSettings, ShardIndex, ShardInfo, TokenizerInfo
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.tokenizers.base import AudioTokenizer

Part = tuple[int, list[ManifestRow]]  # number of a shard, and its rows
FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a call of `prepare` left in the folder."""

    folder: Path
    counts: dict[str, int]  # clips per split
    num_tokens: int  # latents of all clips
    num_rejected: int  # rows left out
    rejected_path: Path  # names each of them, and why
    already_complete: bool  # nothing had to be written

    def __str__(self) -> str:
        """Summarise for the terminal."""
        state = "was already complete" if self.already_complete else "is complete"
        counts = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        text = f"{self.folder} {state}: {counts} clips, {self.num_tokens} latents"
        if self.num_rejected:
            text += f"; {self.num_rejected} rows rejected, see {self.rejected_path}"
        return text


@dataclass(frozen=True, kw_only=True)
class _Rejection:
    line: int  # of the manifest
    audio: str
    reason: str
    stamp: int | None  # of the file when it was rejected: a repaired file is tried again


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What `records/*.json` keeps of a finished shard."""

    shard: ShardInfo
    counts: dict[str, int]  # clips per split
    rejected: tuple[_Rejection, ...]
    num_train_tokens: int
    # (D,) of the train latents. Sums of squares are safe here: a float16 squared has 22
    # significant bits, float64 holds 53.
    total: tuple[float, ...]
    total_square: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that a worker needs beside its rows."""

    out: Path
    audio_folder: Path  # where the manifest's paths start
    tokenizer_spec: str
    settings: PrepareSettings


def prepare(
    manifest: Path | str,
    out: Path | str,
    tokenizer_spec: str,
    *,
    max_seconds: float = 10.24,
    crop: str = "head",
    validation_share: float = 0.02,
    seed: int = 0,
    shard_size: int = 512,
    num_workers: int = 0,
    longest_file_seconds: float = 3600.0,
    progress: bool = True,
) -> PrepareReport:
    """Encode every sound file of a manifest into the folder `out`, or continue doing so.

    Files that cannot be used are named in `out/rejected.jsonl`; they are tried again when they
    have changed. Manifest, tokenizer and settings must stay the same for one folder.

    Args:
        manifest: see `manifest.py`.
        out: a new or empty folder, or one that `prepare` began.
        tokenizer_spec: what `load_tokenizer` accepts.
        max_seconds: see `PrepareSettings`, as for the next four and `longest_file_seconds`.
        crop: "head", "random" or "reject".
        validation_share: in [0, 1).
        seed: of the random crops.
        shard_size: manifest rows per shard.
        num_workers: processes that encode, each on one core; 0 encodes in this one.
        longest_file_seconds: longer files are rejected unread.
        progress: show a progress bar.

    Raises:
        ValueError: if the manifest or a setting is wrong, `out` was begun with other settings, or
            no row can be used.
        FileNotFoundError: if there is no such manifest.
        OSError: if `out` cannot be written; the run can be continued.
        RuntimeError: if a worker process dies.
    """
    # float(): an index must not differ because someone wrote 10 for 10.0.
    settings = PrepareSettings(
        max_seconds=float(max_seconds),
        crop=crop,
        validation_share=float(validation_share),
        seed=seed,
        shard_size=shard_size,
        longest_file_seconds=float(longest_file_seconds),
    )
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}, expected 0 or more processes")
    manifest, out = Path(manifest), Path(out)
    rows = with_validation(read_manifest(manifest), validation_share)
    tokenizer = load_tokenizer(tokenizer_spec)
    index = _open_folder(out, _plan(manifest, len(rows), tokenizer_spec, tokenizer, settings))
    job = _Job(
        out=out,
        audio_folder=manifest.parent,
        tokenizer_spec=tokenizer_spec,
        settings=settings,
    )
    starts = range(0, len(rows), shard_size)
    parts = [(number, rows[i : i + shard_size]) for number, i in enumerate(starts)]
    todo: list[Part] = []
    with tqdm(total=len(rows), unit="clip", desc="prepare", disable=not progress) as bar:
        for part in parts:
            if _is_finished(job, part[0]):
                bar.update(len(part[1]))
            else:
                todo.append(part)
        if num_workers:
            _encode_in_workers(job, todo, num_workers, bar.update)
        else:
            _encode_here(job, todo, tokenizer, bar.update)
    already_complete = index.complete and not todo
    if not already_complete:
        index = _finish(out, index, len(parts))
    return PrepareReport(
        folder=out,
        counts=index.counts,
        num_tokens=sum(shard.num_tokens for shard in index.shards),
        num_rejected=index.num_rejected,
        rejected_path=out / "rejected.jsonl",
        already_complete=already_complete,
    )


def _plan(
    manifest: Path,
    num_rows: int,
    tokenizer_spec: str,
    tokenizer: AudioTokenizer,
    settings: PrepareSettings,
) -> ShardIndex:
    return ShardIndex(
        manifest=str(manifest),
        manifest_sha256=shards.file_sha256(manifest),
        num_rows=num_rows,
        tokenizer=TokenizerInfo(
            spec=tokenizer_spec,
            fingerprint=tokenizer.fingerprint,
            sample_rate=tokenizer.sample_rate,
            latent_dim=tokenizer.latent_dim,
            tokens_per_column=tokenizer.tokens_per_column,
        ),
        settings=settings,
    )


def _open_folder(out: Path, plan: ShardIndex) -> ShardIndex:
    """Begin a new folder, or check that an old one was begun with the same plan."""
    if (out / "index.json").is_file():
        index = shards.read_index(out, allow_incomplete=True)
        _check_same(out, index, plan)
    else:
        # A run killed before its first index leaves at most the temporary file of that index.
        if out.exists() and (
            not out.is_dir() or {p.name for p in out.iterdir()} - {"index.json.tmp"}
        ):
            raise ValueError(
                f"{out} exists and was not made by prepare, expected a new or empty folder; choose "
                "another one"
            )
        out.mkdir(parents=True, exist_ok=True)
        index = plan
        shards.write_index(out, index)
    for name in ("shards", "records"):
        (out / name).mkdir(exist_ok=True)
    return index


def _check_same(out: Path, found: ShardIndex, asked: ShardIndex) -> None:
    pairs = {
        setting.name: (getattr(found.settings, setting.name), getattr(asked.settings, setting.name))
        for setting in fields(PrepareSettings)
    }
    pairs["tokenizer fingerprint"] = (found.tokenizer.fingerprint, asked.tokenizer.fingerprint)
    pairs["SHA-256 of the manifest"] = (found.manifest_sha256, asked.manifest_sha256)
    changes = [
        f"{name} was {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new
    ]
    if changes:
        raise ValueError(
            f"{out} was prepared differently: {'; '.join(changes)}. Choose another output folder, "
            f"or continue this one with `{found.command(out)}`"
        )


def _is_finished(job: _Job, number: int) -> bool:
    path = _record_path(job.out, number)
    if not path.is_file():
        return False
    try:
        record = _read_record(path)
    except (ValueError, TypeError):  # damaged on disk: as good as missing
        return False
    unchanged = all(_stamp(job.audio_folder / r.audio) == r.stamp for r in record.rejected)
    return unchanged and shards.find_damage(job.out, record.shard) is None


def _encode_here(
    job: _Job, todo: Sequence[Part], tokenizer: AudioTokenizer, advance: Callable[[], Any]
) -> None:
    num_threads = torch.get_num_threads()
    # One thread, as in a worker: sums split over threads differ in their last bits.
    torch.set_num_threads(1)
    try:
        for part in todo:
            _encode_shard(job, part, tokenizer, advance)
    finally:
        torch.set_num_threads(num_threads)


def _encode_in_workers(
    job: _Job, todo: Sequence[Part], num_workers: int, advance: Callable[[int], Any]
) -> None:
    # Spawned, not forked: a fork copies the locks of torch's threads, which no longer run.
    context = multiprocessing.get_context("spawn")
    num_workers = min(num_workers, len(todo))
    counts = context.RawArray("q", num_workers)  # one slot per writer, so no lock is needed
    failures = context.SimpleQueue()
    workers: list[BaseProcess] = [
        context.Process(
            target=_work, args=(job, todo[i::num_workers], counts, i, failures), daemon=True
        )
        for i in range(num_workers)
    ]
    seen = 0
    try:
        for worker in workers:
            worker.start()
        while True:
            running = [worker.sentinel for worker in workers if worker.is_alive()]
            advance(sum(counts) - seen)
            seen = sum(counts)
            if not failures.empty():
                raise failures.get()
            for worker in workers:
                if worker.exitcode:
                    raise RuntimeError(
                        f"a worker process ended with exit code {worker.exitcode}, expected 0 "
                        "(-9 is often a lack of memory); run the same command with fewer workers, "
                        "finished shards are kept"
                    )
            if not running:
                return
            wait(running, timeout=0.2)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _work(job: _Job, todo: Sequence[Part], counts: Any, slot: int, failures: Any) -> None:
    """Encode shards in a process of its own."""
    # Ctrl-C reaches the whole process group; the parent alone answers it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def advance() -> None:
        counts[slot] += 1

    try:
        _encode_here(job, todo, load_tokenizer(job.tokenizer_spec), advance)
    except Exception as error:
        failures.put(error)


def _exit_with_parent() -> None:
    """End this process when the parent was killed, which ends no worker by itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_shard(
    job: _Job, part: Part, tokenizer: AudioTokenizer, advance: Callable[[], Any]
) -> None:
    """Encode the rows of one shard and write it, its record last."""
    number, candidates = part
    rows, clips, num_samples, rejected = [], [], [], []
    total = torch.zeros(tokenizer.latent_dim, dtype=torch.float64)  # (D,)
    total_square = total.clone()  # (D,)
    num_train_tokens = 0
    for row in candidates:
        path = job.audio_folder / row.audio
        stamp = _stamp(path)
        try:
            waveform = _load(row, path, tokenizer.sample_rate, job.settings)  # (S,)
            latents = _encode(tokenizer, waveform)  # (N, D) float16
        except _RejectedError as error:
            rejected.append(
                _Rejection(line=row.line, audio=row.audio, reason=str(error), stamp=stamp)
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
    record = _Record(
        shard=shards.write_shard(job.out, number, rows, clips, num_samples, tokenizer.latent_dim),
        counts={split: sum(row.split == split for row in rows) for split in SPLITS},
        rejected=tuple(rejected),
        num_train_tokens=num_train_tokens,
        total=tuple(total.tolist()),
        total_square=tuple(total_square.tolist()),
    )
    shards.write_atomic(_record_path(job.out, number), json.dumps(to_dict(record)).encode())


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


def _finish(out: Path, index: ShardIndex, num_shards: int) -> ShardIndex:
    """Write rejected.jsonl and the completed index from the records of all shards."""
    records = [_read_record(_record_path(out, number)) for number in range(num_shards)]
    rejected = [r for record in records for r in record.rejected]
    shards.write_atomic(
        out / "rejected.jsonl",
        shards.encode_lines(
            [{"audio": r.audio, "reason": r.reason, "line": r.line} for r in rejected]
        ),
    )
    counts = {split: sum(record.counts[split] for record in records) for split in SPLITS}
    if not counts["train"]:
        reason = f", the first because: {rejected[0].reason}" if rejected else ""
        raise ValueError(
            f"no train row is left of {index.num_rows} rows in {index.manifest}, expected at least "
            f"one; {len(rejected)} were rejected{reason}. See {out / 'rejected.jsonl'}"
        )
    num_tokens = sum(record.num_train_tokens for record in records)
    mean = torch.tensor([r.total for r in records], dtype=torch.float64).sum(0) / num_tokens
    square = torch.tensor([r.total_square for r in records], dtype=torch.float64).sum(0)
    # Rounding may leave a constant channel a variance just below zero.
    std = (square / num_tokens - mean.square()).clamp(min=0).sqrt()  # (D,)
    index = replace(
        index,
        complete=True,
        latent_mean=tuple(mean.tolist()),
        latent_std=tuple(std.tolist()),
        counts=counts,
        num_rejected=len(rejected),
        shards=tuple(record.shard for record in records),
    )
    shards.write_index(out, index)
    return index


def _record_path(out: Path, number: int) -> Path:
    return out / "records" / f"{number:05d}.json"


def _read_record(path: Path) -> _Record:
    record: _Record = from_dict(_Record, json.loads(path.read_text(encoding="utf-8")), str(path))
    return record


def _stamp(path: Path) -> int | None:
    """Return when the file last changed in any way, None if it cannot be seen."""
    try:
        return path.stat().st_ctime_ns
    except (OSError, ValueError):
        return None
