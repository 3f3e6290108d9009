"""A conditioner without weights: each word of a caption is a fixed random vector.

It takes the place of trained encoders where there are none, to train and test models of prompt
embeddings: captions with the same words in the same places have the same prompt, and nothing is
known of words that were not trained on.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from mllm_audio.conditioners.base import PromptStream

LENGTH = 12  # words of a caption that are kept
DIM = 64  # channels of a word


class Words:
    """Random vectors of words, with sinusoids of their places added."""

    streams = (PromptStream(name="words", length=LENGTH, dim=DIM),)
    fingerprint = hashlib.sha256(f"words 1 {LENGTH} {DIM}".encode()).hexdigest()[:16]

    @classmethod
    def from_pretrained(cls, sources: dict[str, str], device: torch.device) -> Words:
        """Make one; it takes no weights.

        Raises:
            ValueError: if some are named.
        """
        if sources:
            raise ValueError(
                f"conditioner 'words' has no weights, found {', '.join(sources)}; type just words"
            )
        return cls()

    def embed(self, captions: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Embed captions, each as one (l, D_s) stream, l their words up to `LENGTH`."""
        return [(self._embed(caption),) for caption in captions]

    def _embed(self, caption: str) -> Tensor:
        text = unicodedata.normalize("NFKC", caption).lower()
        words = re.findall(r"\w+", text)[:LENGTH]
        vectors = [_vector(word) for word in words]
        return torch.stack(vectors) + _places(len(words)) if words else torch.zeros(0, DIM)


def _vector(word: str) -> Tensor:
    """Draw the (D_s,) standard normal of a word."""
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "little")
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed))


def _places(count: int) -> Tensor:
    """Give sinusoids of the first places, (count, D_s); Vaswani et al. 2017, section 3.5."""
    rates = torch.exp(torch.arange(0, DIM, 2) * (-math.log(10_000) / DIM))  # (D_s / 2,)
    angles = torch.arange(count)[:, None] * rates  # (count, D_s / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
