"""Noise schedules as tables, and the two straight formulas of flow matching.

Diffusion: Ho et al. 2020 (arXiv:2006.11239), with the cosine schedule, learned variance and
respacing of Nichol & Dhariwal 2021 (arXiv:2102.09672). Flow matching: Lipman et al. 2023
(arXiv:2210.02747) with the linear path; time 0 is noise, time 1 is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A diffusion chain of K steps, each table (K,) float32; index 0 is the cleanest.

    Methods take `index`: (R,) int64, or one int for all rows. The noise is the standard normal
    that was mixed in, as the network predicts it.
    """

    timesteps: Tensor  # (K,) int64, where each step lies on the training chain
    betas: Tensor  # variance added by each step
    alphas_cumprod: Tensor  # signal power left after each step
    signal_scale: Tensor  # sqrt(alphas_cumprod)
    noise_scale: Tensor  # sqrt(1 - alphas_cumprod)
    posterior_mean_clean: Tensor  # weight of the clean latent in the posterior mean
    posterior_mean_noisy: Tensor  # weight of the noisy latent in it
    posterior_log_variance: Tensor  # lower bound of the learned variance; entry 0 repeats entry 1
    log_betas: Tensor  # upper bound of the learned variance

    def __len__(self) -> int:
        return len(self.timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, index: Tensor | int) -> Tensor:
        """Noise (R, D) clean latents up to step `index`."""
        return _at(self.signal_scale, index) * latents + _at(self.noise_scale, index) * noise

    def predict_clean(self, noisy: Tensor, noise: Tensor, index: Tensor | int) -> Tensor:
        """Invert `add_noise`: (R, D) clean latents if `noise` is right."""
        return (noisy - _at(self.noise_scale, index) * noise) / _at(self.signal_scale, index)

    def posterior_mean(self, latents: Tensor, noisy: Tensor, index: Tensor | int) -> Tensor:
        """Mean (R, D) of the next cleaner latents, given the clean and the noisy ones."""
        clean_weight = _at(self.posterior_mean_clean, index)
        return clean_weight * latents + _at(self.posterior_mean_noisy, index) * noisy

    def log_variance(self, output: Tensor, index: Tensor | int) -> Tensor:
        """Interpolate between the bounds: (R, D) network output -1 is the lower, 1 the upper."""
        lower, upper = _at(self.posterior_log_variance, index), _at(self.log_betas, index)
        return lower + (output + 1) / 2 * (upper - lower)


def _at(table: Tensor, index: Tensor | int) -> Tensor:
    """Read `table` so that the result broadcasts against (R, D): (R, 1), or (1,) for an int."""
    return table[index].unsqueeze(-1)


@lru_cache(maxsize=32)
def cosine_schedule(
    num_train_timesteps: int, num_inference_steps: int, device: torch.device
) -> Schedule:
    """Build the cosine schedule, respaced to `num_inference_steps` evenly spread steps.

    Tables are computed in float64. Cached, because sampling asks for the same one at every
    position; treat the tables as constants.

    Raises:
        ValueError: if `num_inference_steps` is not within 2..num_train_timesteps.
    """
    if not 2 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}; a chain of {num_train_timesteps} "
            f"training timesteps is sampled in 2 to {num_train_timesteps} steps"
        )
    # Built while sampling, used in training: an inference tensor could not be differentiated by.
    with torch.inference_mode(False):
        edges = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        power = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        train_betas = (1 - power[1:] / power[:-1]).clamp(max=0.999)
        last = num_train_timesteps - 1
        timesteps = torch.tensor(
            [round(i * last / (num_inference_steps - 1)) for i in range(num_inference_steps)]
        )
        kept = (1 - train_betas).cumprod(0)[timesteps]  # alphas_cumprod, (K,)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        betas = 1 - kept / previous
        variance = betas * (1 - previous) / (1 - kept)  # of the posterior; 0 at index 0
        tables = {
            "betas": betas,
            "alphas_cumprod": kept,
            "signal_scale": kept.sqrt(),
            "noise_scale": (1 - kept).sqrt(),
            "posterior_mean_clean": betas * previous.sqrt() / (1 - kept),
            "posterior_mean_noisy": (1 - previous) * (1 - betas).sqrt() / (1 - kept),
            "posterior_log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
            "log_betas": betas.log(),
        }
        return Schedule(
            timesteps=timesteps.to(device),
            **{name: table.float().to(device) for name, table in tables.items()},
        )


def path_point(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Walk from (R, D) noise to (R, D) latents: the point at (R,) times in [0, 1]."""
    return (1 - times[:, None]) * noise + times[:, None] * latents


def path_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the (R, D) velocity of `path_point`, the same at all times."""
    return latents - noise
