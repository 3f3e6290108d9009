"""A flow matching head: fewer steps than diffusion, on the same network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_audio.diffusion.noise import Noise
from mllm_audio.diffusion.samplers import VELOCITY_SAMPLERS
from mllm_audio.diffusion.schedule import path_point, path_velocity
from mllm_audio.heads.adaln_mlp import AdaLNMLP, predict_under
from mllm_audio.heads.base import HeadConfig, SamplingConfig, draw_normal, find_sampler

TIME_SCALE = 1000  # times in [0, 1] reach the network in the range of its sinusoids


class FlowHead(nn.Module):
    """Transport noise to the next latent along straight paths.

    Conditional flow matching (Lipman et al. 2023, arXiv:2210.02747) with the logit-normal times
    of Esser et al. 2024 (arXiv:2403.03206).
    """

    def __init__(self, config: HeadConfig, latent_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.config = config
        self.network = AdaLNMLP(
            latent_dim, condition_dim, latent_dim, config.width, config.num_blocks
        )

    def loss(
        self,
        latents: Tensor,
        condition: Tensor,
        channel_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Score (P, D) latents under (P, Z) conditions, as `Head.loss`; returns (P,) float32."""
        repeats = self.config.batch_multiplier
        latents = latents.repeat(repeats, 1)  # (repeats * P, D)
        embedding = self.network.embed_condition(condition).repeat(repeats, 1)
        times, noise = self._draw(latents, generator)
        squared = self.loss_terms(latents, embedding, times, noise, channel_weight)
        return squared.view(repeats, len(condition)).mean(0)

    def noised(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise (P, D) latents as the loss does, as `Head.noised`."""
        times, noise = self._draw(latents, generator)
        return path_point(latents, noise, times), TIME_SCALE * times

    def _draw(self, latents: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw (P,) logit-normal times, and (P, D) noise."""
        times = draw_normal((len(latents),), latents.device, generator)
        times = (times + self.config.time_shift).sigmoid()
        return times, draw_normal(latents.shape, latents.device, generator)

    def loss_terms(
        self,
        latents: Tensor,
        condition_embedding: Tensor,
        times: Tensor,
        noise: Tensor,
        channel_weight: Tensor | None = None,
    ) -> Tensor:
        """Score (P, D) latents at given (P,) times and (P, D) noise: (P,) squared errors."""
        latents = latents.float()
        noisy = path_point(latents, noise, times)  # (P, D)
        velocity = self.network(noisy, TIME_SCALE * times, condition_embedding)
        squared = (velocity - path_velocity(latents, noise)) ** 2
        if channel_weight is not None:
            squared = squared * channel_weight
        return squared.mean(-1)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        unconditional: Tensor | None,
        config: SamplingConfig,
        noise: Noise,
    ) -> Tensor:
        """Draw (R, D) float32 latents under (R, Z) conditions, as `Head.sample`."""
        sampler = find_sampler(VELOCITY_SAMPLERS, config.sampler or "euler", self.config.name)
        times = sampler.places(config.num_inference_steps, condition.device)
        timesteps, scale = TIME_SCALE * times, config.guidance_scale
        return sampler.run(
            predict_under(self.network, condition, unconditional, scale, timesteps),
            noise.draw,
            config.num_inference_steps,
            config.temperature,
        )
