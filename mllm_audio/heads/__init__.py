"""Heads: a hidden state to a distribution over the next latent."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mllm_audio.heads.base import Head, HeadConfig
from mllm_audio.heads.ddpm import DDPMHead
from mllm_audio.heads.flow import FlowHead

HEADS: dict[str, Callable[[HeadConfig, int, int], Head]] = {"ddpm": DDPMHead, "flow": FlowHead}


def build_head(config: HeadConfig, latent_dim: int, condition_dim: int) -> Head:
    """Build the head that `config.name` names; every head is an `nn.Module`.

    Raises:
        ValueError: if no head has that name.
    """
    if config.name not in HEADS:
        nearest = difflib.get_close_matches(config.name, HEADS, n=1, cutoff=0)
        raise ValueError(
            f"head.name is {config.name!r}; known heads are {', '.join(HEADS)}; "
            f"did you mean {nearest[0]!r}?"
        )
    return HEADS[config.name](config, latent_dim, condition_dim)
