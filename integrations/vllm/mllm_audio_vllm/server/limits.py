"""Bounds on what one request may ask of everybody's model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.heads import build_head
from mllm_audio.heads.base import HeadConfig, SamplingConfig

MAX_STEPS = 250  # head calls per latent: the requests of a batch wait for the longest


def check_sampling(head: HeadConfig, config: GenerationConfig, is_guided: bool) -> None:
    """Refuse settings that the head would refuse within the engine, where it costs everybody.

    Raises:
        ValueError: with what the head says, or if it is too much work.
    """
    for sampling in (
        config.sampling_at(0, 2),
        config.sampling_at(1, 2),
    ):  # steps may change between
        steps = sampling.num_inference_steps
        if steps > MAX_STEPS:
            raise ValueError(f"num_inference_steps is {steps}, this server allows {MAX_STEPS}")
        _rehearse(head, replace(sampling, guidance_scale=2.0 if is_guided else 1.0))


@lru_cache(maxsize=256)
def _rehearse(head: HeadConfig, sampling: SamplingConfig) -> None:
    """Draw one number with a head of one channel: whatever it refuses, it refuses here."""
    small = build_head(replace(head, width=1, num_blocks=1), 1, 1)
    zero = torch.zeros(1, dtype=torch.long)
    state = torch.zeros(1, 1)
    with torch.inference_mode():
        small.sample(state, state, sampling, Noise(zero, zero, 1))
