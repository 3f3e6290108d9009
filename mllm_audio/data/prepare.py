"""Turn a manifest of sound files into shards of latents: resumable, parallel, deterministic.

`shards.py` describes what is written. Every file appears whole or not at all, and a shard counts as
finished once its record is written, after the shard itself. So a run may be killed at any moment;
the next run with the same arguments keeps the finished shards, and the result is the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from mllm_audio.data import conversations, encode, shards
from mllm_audio.data.encode import Job, Part
from mllm_audio.data.manifest import SPLITS, read_manifest, with_validation
from mllm_audio.data.shards import PrepareSettings, ShardIndex, TokenizerInfo
from mllm_audio.data.workers import encode_in_workers
from mllm_audio.files import encode_lines, file_sha256, write_atomic
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.tokenizers.base import AudioTokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a call of `prepare` left in the folder."""

    folder: Path
    counts: dict[str, int]  # clips per split
    num_tokens: int  # latents of all clips
    num_rejected: int  # rows left out; of conversations, sound files
    rejected_path: Path  # names each of them, and why
    num_conversations: int  # that can be used; 0 for captions
    num_dropped: int  # conversations that name a rejected file
    already_complete: bool  # nothing had to be written

    def __str__(self) -> str:
        """Summarise for the terminal."""
        state = "was already complete" if self.already_complete else "is complete"
        counts = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        text = f"{self.folder} {state}: {counts} clips, {self.num_tokens} latents"
        if self.num_conversations:
            text += f"; {self.num_conversations} conversations"
        if self.num_rejected:
            text += f"; {self.num_rejected} rows rejected, see {self.rejected_path}"
        if self.num_dropped:
            text += f"; {self.num_dropped} conversations that name one of them are left out"
        return text


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
    chats = None  # bytes of conversations.jsonl
    if conversations.holds_conversations(manifest):
        rows, chats = conversations.plan_conversations(manifest, validation_share)
    else:
        rows = with_validation(read_manifest(manifest), validation_share)
    tokenizer = load_tokenizer(tokenizer_spec)
    index = _open_folder(out, _plan(manifest, len(rows), tokenizer_spec, tokenizer, settings))
    audio_folder = manifest.parent
    job = Job(out=out, audio_folder=audio_folder, tokenizer_spec=tokenizer_spec, settings=settings)
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
            encode_in_workers(job, todo, num_workers, bar.update)
        else:
            encode.encode_parts(job, todo, tokenizer, bar.update)
    already_complete = index.complete and not todo and _holds(out, chats)
    if not already_complete:
        index = _finish(out, index, len(parts), chats)
    usable, num_dropped = conversations.usable_conversations(out) if chats else ([], 0)
    return PrepareReport(
        folder=out,
        counts=index.counts,
        num_tokens=sum(shard.num_tokens for shard in index.shards),
        num_rejected=index.num_rejected,
        rejected_path=out / "rejected.jsonl",
        num_conversations=len(usable),
        num_dropped=num_dropped,
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


def _holds(out: Path, chats: bytes | None) -> bool:
    """Tell whether the conversations, if there are any, were written."""
    path = out / conversations.CONVERSATIONS
    return chats is None or (path.is_file() and path.read_bytes() == chats)


def _finish(out: Path, index: ShardIndex, num_shards: int, chats: bytes | None) -> ShardIndex:
    """Write rejected.jsonl, the conversations and, from the records, the completed index."""
    records = [encode.read_record(encode.record_path(out, number)) for number in range(num_shards)]
    rejected = [r for record in records for r in record.rejected]
    write_atomic(
        out / "rejected.jsonl",
        encode_lines([{"audio": r.audio, "reason": r.reason, "line": r.line} for r in rejected]),
    )
    counts = {split: sum(record.counts[split] for record in records) for split in SPLITS}
    if not counts["train"]:
        reason = f", the first because: {rejected[0].reason}" if rejected else ""
        raise ValueError(
            f"no train row is left of {index.num_rows} rows in {index.manifest}, expected at least "
            f"one; {len(rejected)} were rejected{reason}. See {out / 'rejected.jsonl'}"
        )
    if chats is not None:
        write_atomic(out / conversations.CONVERSATIONS, chats)
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
