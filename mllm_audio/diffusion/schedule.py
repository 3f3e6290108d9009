"""Noise schedules as tables, and the two straight formulas of flow matching.

Diffusion: Ho et al. 2020 (arXiv:2006.11239), with the cosine schedule, learned variance and
respacing of Nichol & Dhariwal 2021 (arXiv:2102.09672). Flow matching: Lipman et al. 2023
(arXiv:2210.02747) with the linear path; time 0 is noise, time 1 is data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Where the spacing "log_snr" starts, in the half log SNR of `Schedule`. Beyond it the cosine
# schedule has no signal left, and a step to the clean latents multiplies an error of the predicted
# noise by up to 20,000 (here 164). The authors of DPM-Solver stop at -4.8 (Lu et al. 2022,
# arXiv:2206.00927, appendix D: T = 0.9946).
LEAST_LOG_SNR = -5.1


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
    # gain of the half log SNR, log(signal_scale / noise_scale), to the next cleaner step; entry 0,
    # to the clean latents, is infinite
    log_snr_gain: Tensor

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


def even_timesteps(log_snr: Tensor, num_inference_steps: int) -> Tensor:
    """Spread (K,) timesteps evenly over the (N,) of the training chain, both ends kept, as MAR."""
    last, gaps = len(log_snr) - 1, num_inference_steps - 1
    return torch.tensor([round(i * last / gaps) for i in range(num_inference_steps)])


def log_snr_timesteps(log_snr: Tensor, num_inference_steps: int) -> Tensor:
    """Spread (K,) timesteps evenly in half log SNR, (N,), from `LEAST_LOG_SNR` on.

    Lu et al. 2022 (arXiv:2211.01095) space their solvers so. The cleanest timestep is left to the
    last step, which goes to the clean latents in any case. Where the chain has fewer timesteps than
    asked for, the next free ones are taken, and below `LEAST_LOG_SNR` where there are no others.
    """
    last = max(int((log_snr >= LEAST_LOG_SNR).sum()), num_inference_steps) - 1
    share = torch.arange(1, num_inference_steps + 1) / num_inference_steps  # (K,)
    wanted = torch.lerp(log_snr[0], log_snr[last], share.double())
    nearest = (log_snr - wanted[:, None]).abs().argmin(1)  # (K,), ascending, some of them equal
    order = torch.arange(num_inference_steps)
    distinct = (nearest - order).cummax(0).values + order
    return torch.minimum(distinct, last - order.flip(0))


# Which timesteps of the training chain, from its half log SNR and their number.
SPACINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "even": even_timesteps,
    "log_snr": log_snr_timesteps,
}


@lru_cache(maxsize=256)
def cosine_schedule(
    num_train_timesteps: int,
    num_inference_steps: int,
    device: torch.device,
    spacing: str = "even",
) -> Schedule:
    """Build the cosine schedule, respaced to `num_inference_steps` steps by a key of `SPACINGS`.

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
        alphas_cumprod = (1 - train_betas).cumprod(0)  # (N,)
        timesteps = SPACINGS[spacing](_log_snr(alphas_cumprod), num_inference_steps)
        return chain_of(timesteps, alphas_cumprod[timesteps], device)


def chain_of(timesteps: Tensor, alphas_cumprod: Tensor, device: torch.device) -> Schedule:
    """Tabulate the chain through (K,) float64 signal powers, falling, at (K,) timesteps; K >= 2."""
    kept = alphas_cumprod
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
        "log_snr_gain": _log_snr(previous) - _log_snr(kept),
    }
    return Schedule(
        timesteps=timesteps.to(device),
        **{name: table.float().to(device) for name, table in tables.items()},
    )


def _log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Give half the log of signal power over noise power; infinite without noise."""
    return (alphas_cumprod.log() - (1 - alphas_cumprod).log()) / 2


def path_point(latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Walk from (R, D) noise to (R, D) latents: the point at (R,) times in [0, 1]."""
    return (1 - times[:, None]) * noise + times[:, None] * latents


def path_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the (R, D) velocity of `path_point`, the same at all times."""
    return latents - noise
