"""Turn a manifest of sound files into shards of latents: resumable, parallel, deterministic.

`shards.py` describes what is written. Every file appears whole or not at all, and a shard counts as
finished once its record is written, after the shard itself. So a run may be killed at any moment;
the next run with the same arguments keeps the finished shards, and the result is the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from mllm_audio.data import conversations, encode, prepared, shards
from mllm_audio.data.encode import Job, Part
from mllm_audio.data.manifest import ManifestRow, read_manifest, with_validation
from mllm_audio.data.prepared import PrepareReport
from mllm_audio.data.prompts import embed_captions
from mllm_audio.data.shards import PrepareSettings, ShardIndex, TokenizerInfo
from mllm_audio.data.workers import encode_in_workers
from mllm_audio.files import file_sha256
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.tokenizers.base import AudioTokenizer


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
    pad: bool = False,
    part: int = 1,
    num_parts: int = 1,
    conditioner_spec: str | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Encode every sound file of a manifest into the folder `out`, or continue doing so.

    Files that cannot be used are named in `out/rejected.jsonl`; they are tried again when they
    have changed. Manifest, tokenizer and settings must stay the same for one folder.

    Args:
        manifest: see `manifest.py`, or `conversations.py` for rows with messages.
        out: a new or empty folder, or one that `prepare` began.
        tokenizer_spec: what `load_tokenizer` accepts.
        max_seconds: see `PrepareSettings`, as for the next four and `longest_file_seconds`.
        crop: "head", "random" or "reject".
        validation_share: in [0, 1).
        seed: of the random crops.
        shard_size: manifest rows per shard.
        num_workers: processes that encode, each on one core; 0 encodes in this one.
        longest_file_seconds: longer files are rejected unread.
        pad: see `PrepareSettings`.
        part: from 1 to `num_parts`: encode only this part of the shards, for `merge` to join.
        num_parts: folders that the shards are spread over.
        conditioner_spec: what `load_conditioner` accepts, to embed the captions too; None leaves
            the prompts that are there.
        progress: show a progress bar.

    Raises:
        ValueError: if the manifest or a setting is wrong, `out` was begun with other settings or is
            being prepared by another process, or no row can be used.
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
        pad=pad,
    )
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}, expected 0 or more processes")
    if not 1 <= part <= num_parts:
        raise ValueError(f"found part {part}/{num_parts}, expected i/n with i from 1 to n")
    manifest, out = Path(manifest), Path(out)
    rows, chats = _read(manifest, validation_share)
    if chats is not None and conditioner_spec is not None:
        raise ValueError(
            f"{manifest} holds conversations, which a language model reads as text; leave "
            "--conditioner out, or prepare captions"
        )
    tokenizer = load_tokenizer(tokenizer_spec)
    plan = replace(
        _plan(manifest, len(rows), tokenizer_spec, tokenizer, settings),
        part=part,
        num_parts=num_parts,
        conversations_sha256=None if chats is None else hashlib.sha256(chats).hexdigest(),
    )
    job = Job(
        out=out, audio_folder=manifest.parent, tokenizer_spec=tokenizer_spec, settings=settings
    )
    parts = [(k, rows[k * shard_size : (k + 1) * shard_size]) for k in plan.numbers]
    with prepared.claimed(out):
        index = prepared.begin(out, plan)
        is_changed = _encode(job, parts, tokenizer, num_workers, progress)
        report = prepared.finish(out, index, chats, is_changed=is_changed)
        if conditioner_spec is None:
            return report
        complete = shards.read_index(out, allow_incomplete=True)
        is_changed = embed_captions(out, complete, conditioner_spec, progress=progress)
        return replace(report, already_complete=report.already_complete and not is_changed)


def _read(manifest: Path, validation_share: float) -> tuple[list[ManifestRow], bytes | None]:
    """Read the rows to encode, with splits, and for conversations the bytes to keep of them."""
    if conversations.holds_conversations(manifest):
        return conversations.plan_conversations(manifest, validation_share)
    return with_validation(read_manifest(manifest), validation_share), None


def _encode(
    job: Job, parts: Sequence[Part], tokenizer: AudioTokenizer, num_workers: int, progress: bool
) -> bool:
    """Encode the shards that are not finished; tell whether there were any."""
    todo: list[Part] = []
    num_rows = sum(len(rows) for _, rows in parts)
    with tqdm(total=num_rows, unit="clip", desc="prepare", disable=not progress) as bar:
        for part in parts:
            if _is_finished(job, part[0]):
                bar.update(len(part[1]))
            else:
                todo.append(part)
        if num_workers:
            encode_in_workers(job, todo, num_workers, bar.update)
        else:
            encode.encode_parts(job, todo, tokenizer, bar.update)
    return bool(todo)


def _plan(
    manifest: Path,
    num_rows: int,
    tokenizer_spec: str,
    tokenizer: AudioTokenizer,
    settings: PrepareSettings,
) -> ShardIndex:
    return ShardIndex(
        manifest=str(manifest),
        manifest_sha256=file_sha256(manifest),
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


def _is_finished(job: Job, number: int) -> bool:
    path = encode.record_path(job.out, number)
    if not path.is_file():
        return False
    try:
        record = encode.read_record(path)
    except (ValueError, TypeError):  # damaged on disk: as good as missing
        return False
    unchanged = all(
        encode.file_stamp(job.audio_folder / r.audio) == r.stamp for r in record.rejected
    )
    return unchanged and shards.find_damage(job.out, record.shard) is None
