"""What every embedder gives, and the protocol it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

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

    name: str  # what metrics append: `panns` in `fd_panns`
    sample_rate: int  # Hz
    source: Source
    fingerprint: str  # equal ones give equal features

    def embed(self, waveforms: Sequence[Tensor]) -> list[ClipFeatures]:
        """Hear (S,) waveforms at `sample_rate`, of any lengths; none depends on another."""


@runtime_checkable
class CaptionEmbedder(Protocol):
    """An embedder whose captions and clips share one space."""

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions: (n, E)."""


@runtime_checkable
class Classifier(Protocol):
    """An embedder that names classes of its own."""

    labels: tuple[str, ...]  # in the order of the logits
    label_column: str  # of caption rows
