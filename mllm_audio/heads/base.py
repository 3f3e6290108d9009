"""The protocol every head follows: a hidden state to a distribution over the next latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mllm_audio.diffusion.noise import Noise
from mllm_audio.diffusion.samplers import SAMPLERS, Sampler


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head is built from; one set of fields serves every head in `HEADS`."""

    name: str = "ddpm"  # key in HEADS
    width: int = 1024  # channels of the MLP
    num_blocks: int = 3  # AdaLN residual blocks
    batch_multiplier: int = 4  # noise draws per predicted latent in the loss
    num_train_timesteps: int = 1000  # ddpm: length of the noising chain
    # ddpm: bound of the predicted clean latents, in standard deviations; None (the paper) is off
    clamp_predicted: float | None = None
    # flow: mean of the logit-normal training times; below 0 there is more training at the start
    # of the path, where it is decided which sound comes
    time_shift: float = 0.0

    def __post_init__(self) -> None:
        least = {"width": 1, "num_blocks": 1, "batch_multiplier": 1, "num_train_timesteps": 2}
        for field, lowest in least.items():
            if getattr(self, field) < lowest:
                raise ValueError(f"head.{field} is {getattr(self, field)}; set at least {lowest}")
        if self.clamp_predicted is not None and self.clamp_predicted <= 0:
            raise ValueError(
                f"head.clamp_predicted is {self.clamp_predicted}; set a positive number of "
                "standard deviations, or None"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one latent is drawn; already resolved for the position being drawn."""

    sampler: str | None = None  # key in SAMPLERS; None takes the head's own default
    num_inference_steps: int = 100  # head calls per latent (midpoint, heun: two calls a step)
    # MAR's s: uncond + s * (cond - uncond); 1 is no guidance. (R, 1): one for each row
    guidance_scale: float | Tensor = 1.0
    # scales the standard deviation of the noise: that which starts the chain and that which is
    # added on the way; of ddpm the latter alone, of samplers that add none the former
    temperature: float = 1.0
    eta: float = 0.0  # of ddim: share of ddpm's noise that a step adds; 0 adds none

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; set at least 1 (head ddpm: 2)"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; set 0 or more")
        check_eta(self.eta, self.sampler)


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

    def noised(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise (P, D) normalised latents as the loss does, each to a degree of its own.

        Returns:
            (P, D) noisy latents, and the (P,) timesteps that the head's network takes.
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


def check_eta(eta: float, sampler: str | None) -> None:
    """Refuse an `eta` out of range, or with a sampler that has no use for it.

    Raises:
        ValueError: naming the samplers that have one.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; set 0, which adds no noise, to 1, which adds that of ddpm")
    usable = [name for name, known in SAMPLERS.items() if known.takes_eta]
    if eta and sampler not in usable:
        raise ValueError(
            f"eta is {eta} but sampler is {sampler!r}; set sampler to {' or '.join(usable)}, or "
            "eta to 0"
        )


def find_sampler(table: Mapping[str, Sampler], name: str, head_name: str) -> Sampler:
    """Look up the sampler a head was asked to use.

    Raises:
        ValueError: if it is not among those in `table`, the ones this head can use.
    """
    if name not in table:
        raise ValueError(
            f"sampler is {name!r}, which head {head_name!r} cannot use; choose from "
            f"{', '.join(table)}, or None for its default"
        )
    return table[name]


def draw_normal(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw float32 standard normals of `shape` on `device`, wherever `generator` lives."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
