"""Prepared sound on disk: latents in shards, captions beside them, one index.

Layout of a folder that `prepare` writes:

    index.json                 `ShardIndex`: what was asked for, then statistics, counts, checksums;
                               `complete` is false while shards are missing
    rejected.jsonl             {"audio", "reason", "line"} of each manifest row that was left out
    conversations.jsonl        the conversations, if `prepare` was given some, with their splits;
                               of parts, the first keeps all
    shards/00000.safetensors   latents float16 (sum N, D), the clips of the shard one after another
                               offsets int64 (n + 1), clip i is latents[offsets[i] : offsets[i + 1]]
                               num_samples int64 (n), waveform samples of each clip before padding
    shards/00000.jsonl         {"audio", "captions", "split", "extra"} of each clip, in that order
    shards/00000.prompts.safetensors   its captions embedded, see `prompts.py`, if asked for
    records/00000.json         what resuming needs to know about the shard; readers ignore it
    .lock                      held by the process at work

Shard k holds the clips of manifest rows k * shard_size to (k + 1) * shard_size, rejected ones left
out. One of n parts of a manifest (`prepare --shard i/n`) holds every n-th shard, under the numbers
and names of the whole. Paths in the index are relative to the folder. Checksums are SHA-256 of the
whole file.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path

from mllm_audio.conditioners.base import PromptStream
from mllm_audio.config import from_dict, to_dict
from mllm_audio.files import file_sha256, write_atomic

FORMAT_VERSION = 2
LATENTS, ROWS, PROMPTS = ".safetensors", ".jsonl", ".prompts.safetensors"  # files of a shard
CROPS = ("head", "random", "reject")


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What decides the contents of the shards, beside manifest and tokenizer."""

    max_seconds: float = 10.24  # longest clip, seconds
    crop: str = "head"  # of longer files keep the "head", a "random" part, or "reject" them
    validation_share: float = 0.02  # of the training files, where no row names validation
    seed: int = 0  # of the random crops
    shard_size: int = 512  # manifest rows per shard
    longest_file_seconds: float = 3600.0  # longer files are rejected unread: they must fit memory
    pad: bool = False  # shorter clips with silence to max_seconds, for models without an end

    def __post_init__(self) -> None:
        for name in ("max_seconds", "longest_file_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected a positive number of seconds")
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}, expected one of {', '.join(CROPS)}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}, expected [0, 1)")
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}, expected at least 1 row")


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that made the latents."""

    spec: str  # what `load_tokenizer` was given
    fingerprint: str  # of its settings and weights
    sample_rate: int  # Hz
    latent_dim: int  # D
    tokens_per_column: int  # latents that share one time column


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard, as the index lists it."""

    file: str  # relative path of the safetensors file; its rows have the suffix .jsonl
    sha256: str  # of that file
    rows_sha256: str  # of the rows beside it
    prompts_sha256: str | None = None  # of the prompts beside it; None: there are none
    prompts_size: int = 0  # of that file, bytes
    num_clips: int  # n
    num_tokens: int  # sum of N
    counts: dict[str, int]  # clips per split


@dataclass(frozen=True, kw_only=True)
class ConditionerInfo:
    """The conditioner that made the prompts."""

    spec: str  # what `load_conditioner` was given
    fingerprint: str  # of its settings and weights
    streams: tuple[PromptStream, ...]


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """`index.json`. The fields from `complete` on are filled in when the last shard is written."""

    format_version: int = FORMAT_VERSION
    manifest: str  # path as it was typed
    manifest_sha256: str
    num_rows: int  # of the manifest
    conversations_sha256: str | None = None  # of conversations.jsonl; None for captions
    part: int = 1  # of `num_parts`: the folder holds shards part - 1, part - 1 + num_parts, ...
    num_parts: int = 1  # folders the shards of the manifest are spread over; 1 is all in this one
    tokenizer: TokenizerInfo
    settings: PrepareSettings
    complete: bool = False
    latent_mean: tuple[float, ...] = ()  # (D,) of the stored train latents; a part has none
    latent_std: tuple[float, ...] = ()  # (D,) population deviation, 0 for a constant channel
    counts: dict[str, int] = field(default_factory=dict)  # clips per split
    num_rejected: int = 0  # rows named in rejected.jsonl
    longest_clip: int = 0  # most latents of any clip of any split
    longest_clip_name: str = ""  # first such clip
    shards: tuple[ShardInfo, ...] = ()
    conditioner: ConditionerInfo | None = None  # None: captions are not embedded

    @property
    def latent_dim(self) -> int:
        """Channels of one latent, D."""
        return self.tokenizer.latent_dim

    @property
    def part_name(self) -> str:
        """Part as `prepare --shard` takes it."""
        return f"{self.part}/{self.num_parts}"

    @property
    def numbers(self) -> range:
        """Numbers of the folder's shards."""
        num_shards = math.ceil(self.num_rows / self.settings.shard_size)
        return range(self.part - 1, num_shards, self.num_parts)

    def command(self, folder: Path) -> str:
        """Phrase the shell command that makes, continues or repairs `folder`."""
        words = ["mllm-audio", "prepare", self.manifest, "--out", str(folder)]
        words += ["--tokenizer", self.tokenizer.spec]
        if self.conditioner is not None:
            words += ["--conditioner", self.conditioner.spec]
        if self.num_parts > 1:
            words += ["--shard", self.part_name]
        for option in fields(self.settings):
            value = getattr(self.settings, option.name)
            if value is True:
                words.append("--" + option.name)
            elif value != option.default:
                words += ["--" + option.name.replace("_", "-"), str(value)]
        return shlex.join(words)


def read_index(folder: Path | str, *, allow_incomplete: bool = False) -> ShardIndex:
    """Read `folder/index.json`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, of another format version, or (unless allowed) not complete or
            only a part.
    """
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no index.json, expected a prepared folder; make one with "
            f"`mllm-audio prepare MANIFEST --out {folder}`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); delete {folder} and prepare it again"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, expected {FORMAT_VERSION}; prepare the "
            "manifest again into a new folder"
        )
    try:
        index: ShardIndex = from_dict(ShardIndex, values, str(path))
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete {folder} and prepare it again"
        ) from error
    if not (index.complete or allow_incomplete):
        raise ValueError(
            f"{folder} is not complete; finish it with `{index.command(Path(folder))}`"
        )
    if index.num_parts > 1 and not allow_incomplete:
        raise ValueError(
            f"{folder} is part {index.part} of {index.num_parts}, expected a whole; join the parts "
            "with `mllm-audio prepare --merge PART... --out DATA`"
        )
    return index


def shard_file(number: int) -> str:
    """Relative path of shard `number`."""
    return f"shards/{number:05d}.safetensors"


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write `folder/index.json`."""
    write_atomic(folder / "index.json", json.dumps(to_dict(index), indent=2).encode() + b"\n")


def find_damage(folder: Path, shard: ShardInfo) -> Path | None:
    """Return the first file of the shard that is missing or differs from its checksum."""
    path = folder / shard.file
    checksums = {LATENTS: shard.sha256, ROWS: shard.rows_sha256, PROMPTS: shard.prompts_sha256}
    for suffix, sha256 in checksums.items():
        file = path.with_suffix(suffix)
        if sha256 is not None and not (file.is_file() and file_sha256(file) == sha256):
            return file
    return None
