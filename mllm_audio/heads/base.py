"""The protocol every head follows: a hidden state to a distribution over the next latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mllm_audio.diffusion.noise import Noise


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head is built from; one set of fields serves every head in `HEADS`."""

    name: str = "ddpm"  # key in HEADS
    width: int = 1024  # channels of the MLP
    num_blocks: int = 3  # AdaLN residual blocks
    batch_multiplier: int = 4  # noise draws per predicted latent in the loss
    num_train_timesteps: int = 1000  # ddpm: length of the noising chain
    clamp_predicted: float | None = None  # guard: clamp of predicted clean latents, in stds; off in the paper


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one latent is drawn; already resolved for the position being drawn."""

    sampler: str | None = None  # key in SAMPLERS; None takes the head's own default
    num_inference_steps: int = 100  # head calls per latent (midpoint: two calls a step)
    guidance_scale: float = 1.0  # MAR's s: uncond + s * (cond - uncond); 1 is no guidance
    temperature: float = 1.0  # scales the standard deviation of the noise


class Head(Protocol):
    """A conditional generative model of one normalised latent."""

    def loss(
        self,
        latents: Tensor,
        condition: Tensor,
        channel_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Score (P, D) normalised latents under (P, Z) conditions; return (P,) float32 losses.

        `channel_weight` is (D,) with mean 1 and weighs the squared error per channel.
        """

    def sample(
        self,
        condition: Tensor,
        unconditional: Tensor | None,
        config: SamplingConfig,
        noise: Noise,
    ) -> Tensor:
        """Draw one (R, D) float32 normalised latent per row of (R, Z) `condition`.

        `unconditional` is (R, Z), or None when `guidance_scale` is 1. `noise.draw(step)` gives
        the (R, D) standard normal of a sampling step; step 0 is the start of the chain.
        """
