"""What every embedder gives, and the protocol it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ClipFeatures:
    """What an embedder makes of one clip."""

    features: Tensor  # (n, E) float32, n = 1 unless the embedder cuts a clip into pieces
    logits: Tensor | None = None  # (K,) float32, of an embedder that is a classifier


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an embedder's weights came from."""

    path: Path  # file or folder
    sha256: str  # of its weights and settings


class Embedder(Protocol):
    """A frozen network that hears clips."""

    @property
    def name(self) -> str:
        """What metrics append: `panns` in `fd_panns`."""

    @property
    def sample_rate(self) -> int:
        """Hz."""

    @property
    def source(self) -> Source:
        """Where the weights came from."""

    @property
    def fingerprint(self) -> str:
        """Identify weights and settings: equal ones give equal features."""

    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear (S,) waveforms at `sample_rate`, of any lengths; none depends on another."""
