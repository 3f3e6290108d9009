"""Solvers of the diffusion chain in few steps, for networks that were trained on all of them.

They read the predicted noise only, so a learned variance takes no part. Arguments as in `samplers`.
"""

from __future__ import annotations

from torch import Tensor

from mllm_audio.diffusion.noise import Draw, Predict
from mllm_audio.diffusion.schedule import Schedule


def ddim(
    predict: Predict,
    draw: Draw,
    schedule: Schedule,
    temperature: float = 1.0,
    clamp_predicted: float | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Run the whole chain of `ddim_step`; returns (R, D) float32 latents.

    First order, one call a step; `predict` returns (R, D) noise, and more that is not read. Without
    `eta` only the starting noise is random.
    """
    noisy = temperature * draw(0).float()  # (R, D)
    for step, index in enumerate(reversed(range(1, len(schedule))), start=1):
        clean = _clean(predict, schedule, index, noisy, clamp_predicted)
        noise = temperature * draw(step).float() if eta else None
        noisy = ddim_step(schedule, index, noisy, clean, noise, eta)
    return _clean(predict, schedule, 0, noisy, clamp_predicted)


def ddim_step(
    schedule: Schedule,
    index: int,
    noisy: Tensor,
    clean: Tensor,
    noise: Tensor | None,
    eta: float = 0.0,
) -> Tensor:
    """Move (R, D) noisy latents one step down the chain, to `index` - 1; returns (R, D).

    Song et al. 2021 (arXiv:2010.02502), eq. 12, with sigma of eq. 16, which is eta times the
    deviation of the posterior: noise_scale sqrt(1 - exp(-2 h)), h the gain of half log SNR.

    Args:
        schedule: the respaced chain.
        index: where `noisy` stands on it, at least 1.
        noisy: (R, D) float32.
        clean: (R, D), the clean latents predicted from it.
        noise: (R, D) standard normal; None where `eta` is 0.
        eta: 0 adds no noise, 1 as much as `ddpm` with the smaller variance.
    """
    noise_pred = (noisy - schedule.signal_scale[index] * clean) / schedule.noise_scale[index]
    renewed = -(eta**2) * (-2 * schedule.log_snr_gain[index]).expm1()  # share of the noise's power
    direction = schedule.noise_scale[index - 1] * (1 - renewed).sqrt()
    moved = schedule.signal_scale[index - 1] * clean + direction * noise_pred
    if noise is None:
        return moved
    return moved + schedule.noise_scale[index - 1] * renewed.sqrt() * noise


def dpmpp_2m(
    predict: Predict,
    draw: Draw,
    schedule: Schedule,
    temperature: float = 1.0,
    clamp_predicted: float | None = None,
) -> Tensor:
    """Integrate the ODE of the chain to second order; returns (R, D) float32 latents.

    DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), algorithm 2: one call a step, and the call
    before it. Only the starting noise is random. `predict` as in `ddim`.
    """
    return _dpmpp_2m(predict, draw, schedule, temperature, clamp_predicted, adds_noise=False)


def dpmpp_2m_sde(
    predict: Predict,
    draw: Draw,
    schedule: Schedule,
    temperature: float = 1.0,
    clamp_predicted: float | None = None,
) -> Tensor:
    """Integrate like `dpmpp_2m`, but the reverse SDE: every step but the last adds noise.

    SDE-DPM-Solver++(2M) of the same paper. In one step of first order it is `ddim` with eta 1.
    """
    return _dpmpp_2m(predict, draw, schedule, temperature, clamp_predicted, adds_noise=True)


def _dpmpp_2m(
    predict: Predict,
    draw: Draw,
    schedule: Schedule,
    temperature: float,
    clamp_predicted: float | None,
    adds_noise: bool,
) -> Tensor:
    """Run either; the first step, with no call before it, and the last are of first order."""
    noisy, before = temperature * draw(0).float(), None  # (R, D)
    for step, index in enumerate(reversed(range(1, len(schedule))), start=1):
        clean = _clean(predict, schedule, index, noisy, clamp_predicted)
        target = clean
        if before is not None:
            ratio = schedule.log_snr_gain[index] / schedule.log_snr_gain[index + 1]
            target = clean + ratio / 2 * (clean - before)
        noise = temperature * draw(step).float() if adds_noise else None
        noisy, before = dpmpp_step(schedule, index, noisy, target, noise), clean
    return _clean(predict, schedule, 0, noisy, clamp_predicted)


def dpmpp_step(
    schedule: Schedule, index: int, noisy: Tensor, target: Tensor, noise: Tensor | None
) -> Tensor:
    """Move (R, D) noisy latents one step down the chain, to `index` - 1; returns (R, D).

    Exact where the clean latents are predicted as `target`, (R, D), all along the step: of the ODE
    without `noise`, of the SDE with (R, D) standard normal. Lu et al. 2022, algorithm 2 and section
    5; sigma, alpha and h are `noise_scale`, `signal_scale` and `log_snr_gain` here.
    """
    gain = schedule.log_snr_gain[index]
    before, after = schedule.noise_scale[index], schedule.noise_scale[index - 1]
    if noise is None:
        weight = -schedule.signal_scale[index - 1] * (-gain).expm1()
        return after / before * noisy + weight * target
    renewed = -(-2 * gain).expm1()  # share of the noise's power that is new
    moved = after / before * (-gain).exp() * noisy
    return (
        moved + schedule.signal_scale[index - 1] * renewed * target + after * renewed.sqrt() * noise
    )


def _clean(
    predict: Predict,
    schedule: Schedule,
    index: int,
    noisy: Tensor,
    clamp_predicted: float | None,
) -> Tensor:
    """Predict the (R, D) clean latents from the noise that `predict` sees in (R, D)."""
    output = predict(noisy, schedule.timesteps[index : index + 1]).float()
    clean = schedule.predict_clean(noisy, output[:, : noisy.shape[1]], index)
    return clean if clamp_predicted is None else clean.clamp(-clamp_predicted, clamp_predicted)
