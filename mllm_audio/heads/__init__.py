"""Heads: a hidden state to a distribution over the next latent."""

from __future__ import annotations

from collections.abc import Callable

from mllm_audio.config import nearest
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
        raise ValueError(
            f"unknown head {config.name!r}; {nearest(config.name, HEADS)} "
            f"(heads: {', '.join(HEADS)})"
        )
    return HEADS[config.name](config, latent_dim, condition_dim)
