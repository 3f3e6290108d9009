"""The protocol every conditioner follows: a caption to prompt embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class PromptStream:
    """Embeddings of one kind that stand in front of the audio."""

    name: str  # of the encoder they come from
    length: int  # L, sequence elements that they take
    dim: int  # channels of one, before the model projects them


class Conditioner(Protocol):
    """A frozen encoder of captions, or several."""

    @property
    def streams(self) -> tuple[PromptStream, ...]:
        """What it makes of a caption, in order."""

    @property
    def fingerprint(self) -> str:
        """Identify settings and weights: equal ones give equal embeddings."""

    def embed(self, captions: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Embed captions.

        Returns:
            For each caption and stream (l, D_s) float32 on the CPU, l at most the stream's length:
            what is shorter is followed by zeros, see `pad`.
        """


def pad(embeddings: Sequence[Tensor], streams: Sequence[PromptStream]) -> tuple[Tensor, ...]:
    """Fill each (l, D_s) stream with zeros to its (L, D_s).

    The language model attends to all of a prompt's elements, so that batches stay dense and the
    null prompt is as long. What stands behind a caption's last token is the bias of the projection,
    alike in every caption.
    """
    return tuple(
        functional.pad(embedding.float(), (0, 0, 0, stream.length - len(embedding)))
        for embedding, stream in zip(embeddings, streams, strict=True)
    )
