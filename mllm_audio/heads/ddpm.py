"""The paper's head: denoising diffusion with learned variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mllm_audio.diffusion.noise import Noise
from mllm_audio.diffusion.samplers import NOISE_SAMPLERS
from mllm_audio.diffusion.schedule import Schedule, cosine_schedule
from mllm_audio.heads.adaln_mlp import AdaLNMLP, predict_under
from mllm_audio.heads.base import HeadConfig, SamplingConfig, draw_normal, find_sampler


class DDPMHead(nn.Module):
    """Denoise the next latent along a cosine schedule.

    The loss is the squared error of the predicted noise plus the variational bound, which trains
    the variance only (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1, as MAR weighs it).
    """

    def __init__(self, config: HeadConfig, latent_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.config = config
        self.network = AdaLNMLP(
            latent_dim, condition_dim, 2 * latent_dim, config.width, config.num_blocks
        )

    def schedule(
        self, num_inference_steps: int, device: torch.device, spacing: str = "even"
    ) -> Schedule:
        """Give the chain in `num_inference_steps` steps, spaced by a key of `SPACINGS`.

        The tables are no buffers: those would follow the module to half precision.
        """
        num_train_timesteps = self.config.num_train_timesteps
        return cosine_schedule(num_train_timesteps, num_inference_steps, device, spacing)

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
        timesteps, noise = self._draw(latents, generator)
        mse, bound = self.loss_terms(latents, embedding, timesteps, noise, channel_weight)
        return (mse + bound).view(repeats, len(condition)).mean(0)

    def noised(
        self, latents: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise (P, D) latents as the loss does, as `Head.noised`."""
        timesteps, noise = self._draw(latents, generator)
        schedule = self.schedule(self.config.num_train_timesteps, latents.device)
        return schedule.add_noise(latents, noise, timesteps), timesteps

    def _draw(self, latents: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw (P,) timesteps evenly, and (P, D) noise."""
        device = latents.device
        timesteps = torch.randint(
            self.config.num_train_timesteps,
            (len(latents),),
            generator=generator,
            device=device if generator is None else generator.device,
        ).to(device)
        return timesteps, draw_normal(latents.shape, device, generator)

    def loss_terms(
        self,
        latents: Tensor,
        condition_embedding: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        channel_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score (P, D) latents at given (P,) timesteps and (P, D) noise.

        Returns:
            (P,) squared error of the predicted noise, and (P,) variational bound in bits per
            channel, through which no gradient reaches the predicted noise.
        """
        schedule = self.schedule(self.config.num_train_timesteps, latents.device)
        latents = latents.float()
        noisy = schedule.add_noise(latents, noise, timesteps)  # (P, D)
        output = self.network(noisy, timesteps, condition_embedding)
        noise_pred, variance_output = output.chunk(2, dim=-1)  # (P, D) each
        squared = (noise - noise_pred) ** 2
        if channel_weight is not None:
            squared = squared * channel_weight
        clean_pred = schedule.predict_clean(noisy, noise_pred.detach(), timesteps)
        mean = schedule.posterior_mean(clean_pred, noisy, timesteps)
        log_variance = schedule.log_variance(variance_output, timesteps)
        bits = torch.where(
            timesteps[:, None] == 0,
            _discretised_nll(latents, mean, log_variance),
            _gaussian_kl(
                schedule.posterior_mean(latents, noisy, timesteps),
                schedule.posterior_log_variance[timesteps, None],
                mean,
                log_variance,
            ),
        ) / math.log(2)  # (P, D)
        return squared.mean(-1), bits.mean(-1)

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        unconditional: Tensor | None,
        config: SamplingConfig,
        noise: Noise,
    ) -> Tensor:
        """Draw (R, D) float32 latents under (R, Z) conditions, as `Head.sample`."""
        sampler = find_sampler(NOISE_SAMPLERS, config.sampler or "ddpm", self.config.name)
        schedule = self.schedule(config.num_inference_steps, condition.device, sampler.spacing)
        timesteps, scale = sampler.places(schedule), config.guidance_scale
        return sampler.run(
            predict_under(self.network, condition, unconditional, scale, timesteps),
            noise.draw,
            schedule,
            config.temperature,
            self.config.clamp_predicted,
            **({"eta": config.eta} if sampler.takes_eta else {}),
        )


def _gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(first || second) of diagonal normals, in nats, (P, D)."""
    difference = log_variance - other_log_variance
    distance = (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return (difference.exp() - difference - 1 + distance) / 2


def _normal_cdf(value: Tensor) -> Tensor:
    """Approximate the standard normal's distribution function by a tanh, as MAR."""
    return (1 + (math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)).tanh()) / 2


def _discretised_nll(latents: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Give (P, D) nats of latents in bins of width 2/255, the outermost open at +-1.

    Ho et al. 2020, section 3.3: made for 8-bit images, kept because MAR keeps it.
    """
    scale = (-log_variance / 2).exp()
    below = _normal_cdf((latents - mean - 1 / 255) * scale)
    above = _normal_cdf((latents - mean + 1 / 255) * scale)
    above = torch.where(latents > 0.999, 1.0, above)
    below = torch.where(latents < -0.999, 0.0, below)
    return -(above - below).clamp(min=1e-12).log()
