"""How rows are read and become batches."""

from __future__ import annotations

from dataclasses import dataclass

from mllm_audio.config import check_range


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The size of a batch is `TrainConfig`'s."""

    unconditional_share: float = 0.1  # share of rows whose text is the null prompt, for guidance
    length_group: int = 8  # batches shuffled together and sorted by length, to pad less; 1 = off
    replay_share: float = 0.0  # share of each batch that is replayed text
    pack_tokens: int | None = None  # pack a batch into rows of this many elements; None pads
    shuffle_shards: int = 16  # rows of this many shards are shuffled together, and open at once
    prefetch_steps: int = 2  # steps prepared in the background while one runs; 0 = none
    # Of shards that are read from a URL; by default a folder of this user in the system's temporary
    # one, which is on the machine itself where a home folder often is not.
    cache_dir: str | None = None
    cache_gib: float = 32.0  # what it may hold, GiB; the shards used longest ago go first

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("data", self, 0, 1, "unconditional_share")
        check_range("data", self, 0, 0.9, "replay_share")
        check_range("data", self, 1, 1_000_000, "length_group", "pack_tokens", "shuffle_shards")
        check_range("data", self, 0, 1000, "prefetch_steps")
        check_range("data", self, 0, 1_000_000, "cache_gib", open_low=True)
