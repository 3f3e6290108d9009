"""Samplers: pure functions from noise to latents, driven by a network given as a closure.

Each calls `predict(noisy, timesteps)`, with (R, D) float32 and a (1,) that holds for all rows,
and `draw(step)` for the (R, D) standard normal of a step; step 0 starts the chain.
The places of all calls are known before the first, `Sampler.places`, and nothing here reads a value
back from the device.

`temperature` scales the starting noise and the noise that a step adds, where it adds some; that of
`ddpm`, as in MAR, only the latter. `clamp_predicted` bounds every prediction of the clean latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_audio.diffusion.noise import Draw, Predict
from mllm_audio.diffusion.schedule import Schedule
from mllm_audio.diffusion.solvers import ddim, dpmpp_2m, dpmpp_2m_sde


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Push (R, D) predictions away from unconditional ones, alike or by an (R, 1) of each row.

    MAR's convention (Li et al. 2024, arXiv:2406.11838): 1 is no guidance, 0 is unconditional.
    Papers that write `conditional + w * (conditional - unconditional)` mean w = scale - 1.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def ddpm_step(
    schedule: Schedule,
    index: int,
    noisy: Tensor,
    output: Tensor,
    noise: Tensor,
    temperature: float = 1.0,
    clamp_predicted: float | None = None,
) -> Tensor:
    """Move (R, D) noisy latents one step down the chain; returns (R, D).

    Ho et al. 2020, algorithm 2, with the learned variance of Nichol & Dhariwal 2021, eq. 15.

    Args:
        schedule: the respaced chain.
        index: where `noisy` stands on it; 0 gives clean latents and adds no noise.
        noisy: (R, D) float32.
        output: (R, 2D), predicted noise, then the interpolation weights of the variance.
        noise: (R, D) standard normal.
        temperature: scales the standard deviation of the added noise, nothing else.
        clamp_predicted: bound of the predicted clean latents, or None.
    """
    noise_pred, variance_output = output.chunk(2, dim=-1)  # (R, D) each
    clean = schedule.predict_clean(noisy, noise_pred, index)
    if clamp_predicted is not None:
        clean = clean.clamp(-clamp_predicted, clamp_predicted)
    mean = schedule.posterior_mean(clean, noisy, index)
    if index == 0:
        return mean
    deviation = (schedule.log_variance(variance_output, index) / 2).exp()
    return mean + temperature * deviation * noise


def ddpm(
    predict: Predict,
    draw: Draw,
    schedule: Schedule,
    temperature: float = 1.0,
    clamp_predicted: float | None = None,
) -> Tensor:
    """Run the whole chain of `ddpm_step`; returns (R, D) float32 latents.

    `predict` gets timesteps of the training chain and returns (R, 2D). The first step multiplies
    an error of the predicted noise by several hundred: clamp when the network is not trained out.
    """
    noisy = draw(0).float()  # (R, D)
    for step, index in enumerate(reversed(range(len(schedule))), start=1):
        output = predict(noisy, schedule.timesteps[index : index + 1]).float()  # (R, 2D)
        # The last step adds no noise, so none is drawn for it.
        noise = draw(step).float() if index else noisy
        noisy = ddpm_step(schedule, index, noisy, output, noise, temperature, clamp_predicted)
    return noisy


def even_times(num_inference_steps: int, device: torch.device) -> Tensor:
    """Give the (K,) times at which steps of equal size from 0 to 1 start."""
    return torch.arange(num_inference_steps, device=device) / num_inference_steps


def midpoint_times(num_inference_steps: int, device: torch.device) -> Tensor:
    """Give the (2K,) times of the calls of `midpoint`."""
    times = even_times(num_inference_steps, device)
    return torch.stack([times, times + 0.5 / num_inference_steps], dim=1).flatten()


def heun_times(num_inference_steps: int, device: torch.device) -> Tensor:
    """Give the (2K,) times of the calls of `heun`."""
    times = even_times(num_inference_steps, device)
    return torch.stack([times, times + 1 / num_inference_steps], dim=1).flatten()


def euler(
    predict: Predict, draw: Draw, num_inference_steps: int, temperature: float = 1.0
) -> Tensor:
    """Integrate a velocity from noise at time 0 to latents at 1; returns (R, D) float32.

    First order, one call a step. `predict` gets times in [0, 1) and returns (R, D).
    `temperature` scales the starting noise, the only noise there is.
    """
    latents = temperature * draw(0).float()  # (R, D)
    for time in even_times(num_inference_steps, latents.device).split(1):
        latents = latents + predict(latents, time).float() / num_inference_steps
    return latents


def midpoint(
    predict: Predict, draw: Draw, num_inference_steps: int, temperature: float = 1.0
) -> Tensor:
    """Integrate like `euler`, to second order, with two calls a step."""
    latents = temperature * draw(0).float()  # (R, D)
    half = 0.5 / num_inference_steps
    times = midpoint_times(num_inference_steps, latents.device)
    for time, half_way in times.view(-1, 2, 1).unbind():
        middle = latents + half * predict(latents, time).float()
        latents = latents + 2 * half * predict(middle, half_way).float()
    return latents


def heun(
    predict: Predict, draw: Draw, num_inference_steps: int, temperature: float = 1.0
) -> Tensor:
    """Integrate like `euler`, to second order, with two calls a step: at its start and its end.

    The trapezoidal rule of Karras et al. 2022 (arXiv:2206.00364), algorithm 1. `predict` gets times
    in [0, 1]: a velocity, unlike their score, has no singularity at the data.
    """
    latents = temperature * draw(0).float()  # (R, D)
    size = 1 / num_inference_steps
    times = heun_times(num_inference_steps, latents.device)
    for time, next_time in times.view(-1, 2, 1).unbind():
        start = predict(latents, time).float()
        end = predict(latents + size * start, next_time).float()
        latents = latents + size / 2 * (start + end)
    return latents


def falling_timesteps(schedule: Schedule) -> Tensor:
    """Give the (K,) timesteps of a chain from noise to data, of one call a step."""
    return schedule.timesteps.flip(0)


@dataclass(frozen=True)
class Sampler:
    """A sampler, and what those must know who run it."""

    run: Callable[..., Tensor]
    # the places (C,) of the network's calls, in their order: of a schedule the timesteps, or of a
    # number of steps and a device the times
    places: Callable[..., Tensor]
    calls_per_step: int = 1  # of the network
    spacing: str = "log_snr"  # key in SPACINGS, of the chain of a noise sampler
    takes_eta: bool = False  # has an argument `eta`


# For networks that predict noise and its variance, and for those that predict a velocity.
NOISE_SAMPLERS = {
    "ddpm": Sampler(ddpm, falling_timesteps, spacing="even"),
    "ddim": Sampler(ddim, falling_timesteps, takes_eta=True),
    "dpmpp_2m": Sampler(dpmpp_2m, falling_timesteps),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, falling_timesteps),
}
VELOCITY_SAMPLERS = {
    "euler": Sampler(euler, even_times),
    "midpoint": Sampler(midpoint, midpoint_times, calls_per_step=2),
    "heun": Sampler(heun, heun_times, calls_per_step=2),
}
SAMPLERS = {**NOISE_SAMPLERS, **VELOCITY_SAMPLERS}
