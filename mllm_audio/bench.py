"""What `mllm-audio bench data` measures: how fast training is fed, without a model."""

from __future__ import annotations

import random
import resource
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mllm_audio.data.config import DataConfig
from mllm_audio.data.dataset import TrainingData
from mllm_audio.data.encode import write_shard
from mllm_audio.data.manifest import ManifestRow
from mllm_audio.data.remote import open_folder
from mllm_audio.data.shards import PrepareSettings, ShardIndex, TokenizerInfo, write_index
from mllm_audio.data.stream import ClipStream, ShardedClips, captions
from mllm_audio.masking import MaskingConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.text import SpecialIds, train_text_tokenizer
from mllm_audio.tokenizers import load_tokenizer

COLUMN_SECONDS = AudioConfig().column_seconds  # of the tokenizers there are
BYTES_PER_VALUE = 2  # of a stored latent, float16
WORDS = "a the low high soft loud beep sweep rain wind dog bird then while twice again far near"
HOURS_AT_SCALE, CLIPS_AT_SCALE, TOKENS_AT_SCALE = 1000, 360_000, 256  # clips of 10 s, padded


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """The settings of a run that reading depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass(frozen=True, kw_only=True)
class ReadReport:
    """How fast one process was fed."""

    num_clips: int  # of the train split
    num_bytes: int  # of all latents on disk
    hours: float  # of all clips
    bytes_per_clip: float  # of latents on disk
    latent_dim: int  # D
    start_seconds: float  # to read the captions and train the text tokenizer
    first_seconds: float  # to the first step's batches
    seconds: float  # measured after that
    num_steps: int  # in `seconds`
    num_samples: int  # in `seconds`
    masking_ratio: float  # mean over the steps
    memory_bytes: int  # that the peak of resident memory grew by since the start

    def __str__(self) -> str:
        """Print one figure a line."""
        rate = self.num_samples / self.seconds
        at_scale = CLIPS_AT_SCALE * TOKENS_AT_SCALE * self.latent_dim * BYTES_PER_VALUE
        return "\n".join(
            [
                f"disk               {self.num_bytes / 1e9:.3g} GB of latents",
                f"train clips        {self.num_clips:,}",
                f"hours              {self.hours:.4g}, all splits",
                f"start              {self.start_seconds:.2f} s for captions and text tokenizer",
                f"first batch after  {self.first_seconds:.2f} s",
                f"samples/s/worker   {rate:,.0f} at masking ratio {self.masking_ratio:.2f}",
                f"steps/s            {self.num_steps / self.seconds:.1f}",
                f"latents            {rate * self.bytes_per_clip / 1e6:.0f} MB/s of float16",
                f"memory             {self.memory_bytes / 1e6:.0f} MB more at the peak",
                f"{HOURS_AT_SCALE:,} h            {CLIPS_AT_SCALE:,} clips x {TOKENS_AT_SCALE} x "
                f"{self.latent_dim} x {BYTES_PER_VALUE} bytes = {at_scale / 1e9:.1f} GB, read by "
                f"one worker in {CLIPS_AT_SCALE / rate / 60:.1f} minutes",
            ]
        )


def bench_data(
    location: Path | str,
    config: ReadConfig,
    *,
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    num_ranks: int = 1,
    seconds: float = 10.0,
) -> ReadReport:
    """Read a prepared folder or URL as the first of `num_ranks` training processes does.

    Args:
        location: of what `prepare` wrote.
        config: as in a run.
        batch_size: rows of a step, over all processes.
        micro_batch_size: rows at once; None: the process's share of the batch.
        num_ranks: processes, of which one is simulated.
        seconds: to measure for, after the first step.

    Raises:
        ValueError: if the folder or the sizes do not fit.
    """
    started, memory = time.monotonic(), _peak_memory()
    folder = open_folder(location, config.data)
    tokenizer = train_text_tokenizer(set(captions(folder, ["train"])))
    source = ShardedClips(ClipStream(folder, "train", config.data.shuffle_shards), tokenizer)
    data = TrainingData(
        source=source,
        special=SpecialIds.of(tokenizer),
        masking=config.masking,
        config=config.data,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size or max(1, batch_size // num_ranks),
        seed=0,
    )
    ready = time.monotonic()
    with closing(data.steps(0, 0, num_ranks)) as steps:
        next(steps)
        first = now = time.monotonic()
        ratios, num_samples = [], 0
        while now - first < seconds:
            batches = next(steps)
            ratios.append(batches[0].masking_ratio)
            num_samples += sum(len(batch.names) for batch in batches)
            now = time.monotonic()
    index = folder.index
    num_tokens = sum(shard.num_tokens for shard in index.shards)
    num_bytes = num_tokens * index.latent_dim * BYTES_PER_VALUE
    return ReadReport(
        num_clips=len(source),
        num_bytes=num_bytes,
        hours=num_tokens / index.tokenizer.tokens_per_column * COLUMN_SECONDS / 3600,
        bytes_per_clip=num_bytes / sum(shard.num_clips for shard in index.shards),
        latent_dim=index.latent_dim,
        start_seconds=ready - started,
        first_seconds=first - ready,
        seconds=now - first,
        num_steps=len(ratios),
        num_samples=num_samples,
        masking_ratio=sum(ratios) / len(ratios),
        memory_bytes=_peak_memory() - memory,
    )


def _peak_memory() -> int:
    """Return the most memory this process has had resident so far, mapped files too, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_synthetic(out: Path, hours: float) -> None:
    """Write a prepared folder of random latents in clips of 10.24 s, as `dct` would shape them.

    Raises:
        ValueError: if `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists, expected a new or empty folder for synthetic latents")
    tokenizer, settings, draw = load_tokenizer("dct"), PrepareSettings(), random.Random(0)
    num_samples = round(settings.max_seconds * tokenizer.sample_rate)
    num_tokens = num_samples // tokenizer.samples_per_column * tokenizer.tokens_per_column
    rows = [
        ManifestRow(f"{n}.wav", (" ".join(draw.choices(WORDS.split(), k=10)),), "train", {}, n + 1)
        for n in range(max(1, round(hours * 3600 / settings.max_seconds)))
    ]
    (out / "shards").mkdir(parents=True, exist_ok=True)
    generator, shards = torch.Generator().manual_seed(0), []
    for number, start in enumerate(range(0, len(rows), settings.shard_size)):
        own = rows[start : start + settings.shard_size]
        shape = (len(own), num_tokens, tokenizer.latent_dim)
        latents = torch.randn(shape, generator=generator).half()  # (n, N, D)
        samples = [num_samples] * len(own)
        shards.append(write_shard(out, number, own, list(latents), samples, tokenizer.latent_dim))
    index = ShardIndex(
        manifest="synthetic",
        manifest_sha256="",
        num_rows=len(rows),
        tokenizer=TokenizerInfo(
            spec="dct",
            fingerprint=tokenizer.fingerprint,
            sample_rate=tokenizer.sample_rate,
            latent_dim=tokenizer.latent_dim,
            tokens_per_column=tokenizer.tokens_per_column,
        ),
        settings=settings,
        complete=True,
        latent_mean=(0.0,) * tokenizer.latent_dim,
        latent_std=(1.0,) * tokenizer.latent_dim,
        counts={"train": len(rows), "validation": 0, "test": 0},
        longest_clip=num_tokens,
        longest_clip_name=rows[0].audio,
        shards=tuple(shards),
    )
    write_index(out, index)
