"""The kinds of events in the built-in soundscapes, and their synthesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_RATE = 16_000  # Hz
PITCHES = {"low": 300.0, "mid": 1000.0, "high": 2600.0}  # Hz, centre of each class
SHORT_SECONDS, LONG_SECONDS = 0.09, 0.24  # duration of events that fill one column, or two
SWEEP_HZ = (350.0, 2400.0)  # low and high end of a sweep


@dataclass(frozen=True)
class Kind:
    """How one kind of event sounds, and what it is called."""

    columns: int  # 160 ms columns one event fills
    pitched: bool  # whether it comes in the classes of `PITCHES`
    names: tuple[tuple[str, str], tuple[str, str]]  # two wordings, each singular and plural
    synthesize: Callable[[float, torch.Generator], Tensor]  # frequency in Hz -> (S,), peak about 1


def _times(seconds: float) -> Tensor:
    return torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _fade(event: Tensor, seconds: float = 0.008) -> Tensor:
    """Apply raised-cosine ramps to both ends of (S,) samples."""
    num_ramp = round(seconds * SAMPLE_RATE)
    ramp = 0.5 - 0.5 * torch.cos(math.pi * torch.arange(num_ramp) / num_ramp)
    event = event.clone()
    event[:num_ramp] *= ramp
    event[-num_ramp:] *= ramp.flip(0)
    return event


def _tone(frequencies: Tensor) -> Tensor:
    """Sine with the (S,) instantaneous frequencies in Hz."""
    return _fade(
        torch.sin(2 * math.pi * torch.cumsum(frequencies.double(), 0) / SAMPLE_RATE)
    ).float()


def _beep(frequency: float, generator: torch.Generator) -> Tensor:
    return _tone(torch.full_like(_times(SHORT_SECONDS), frequency))


def _buzz(frequency: float, generator: torch.Generator) -> Tensor:
    """Sum the harmonics below 7.8 kHz with amplitudes k ** -0.25: far brighter than a sawtooth."""
    orders = torch.arange(1, int(7800 / frequency) + 1)[:, None]
    # Schroeder's phases (1970) keep the peak low, so the buzz is loud.
    shifts = math.pi * orders * (orders - 1) / len(orders)
    phases = 2 * math.pi * frequency * orders * _times(SHORT_SECONDS) - shifts
    return _fade((torch.sin(phases) * orders**-0.25).sum(0))


def _sweep_up(frequency: float, generator: torch.Generator) -> Tensor:
    times = _times(LONG_SECONDS)
    octaves = math.log2(SWEEP_HZ[1] / SWEEP_HZ[0]) * times / LONG_SECONDS
    return _tone(SWEEP_HZ[0] * frequency / PITCHES["mid"] * 2**octaves)


def _sweep_down(frequency: float, generator: torch.Generator) -> Tensor:
    return _sweep_up(frequency, generator).flip(0)


def _click(frequency: float, generator: torch.Generator) -> Tensor:
    return _fade(torch.randn(round(0.006 * SAMPLE_RATE), generator=generator), 0.001)


def _noise(frequency: float, generator: torch.Generator) -> Tensor:
    event = torch.randn(round(SHORT_SECONDS * SAMPLE_RATE), generator=generator)
    return _fade(event.clamp(-2.5, 2.5))


def _warble(frequency: float, generator: torch.Generator) -> Tensor:
    """Swing the pitch by a third of an octave to either side, three times."""
    times = _times(LONG_SECONDS)
    return _tone(frequency * 2 ** (torch.sin(2 * math.pi * 3 * times / LONG_SECONDS) / 3))


def _knock(frequency: float, generator: torch.Generator) -> Tensor:
    """A thump at 0.13 of the given (mid) frequency that decays within the column."""
    times = _times(SHORT_SECONDS)
    return _fade(
        torch.sin(2 * math.pi * 0.13 * frequency * times) * torch.exp(-times / 0.025), 0.002
    )


KINDS = {
    "beep": Kind(1, True, (("beep", "beeps"), ("tone", "tones")), _beep),
    "buzz": Kind(1, True, (("buzz", "buzzes"), ("buzz", "buzzes")), _buzz),
    "sweep_up": Kind(
        2, False, (("rising sweep", "rising sweeps"), ("upward sweep", "upward sweeps")), _sweep_up
    ),
    "sweep_down": Kind(
        2,
        False,
        (("falling sweep", "falling sweeps"), ("downward sweep", "downward sweeps")),
        _sweep_down,
    ),
    "click": Kind(1, False, (("click", "clicks"), ("tick", "ticks")), _click),
    "noise": Kind(
        1, False, (("noise burst", "noise bursts"), ("burst of noise", "bursts of noise")), _noise
    ),
    "warble": Kind(2, False, (("warble", "warbles"), ("trill", "trills")), _warble),
    "knock": Kind(1, False, (("knock", "knocks"), ("thump", "thumps")), _knock),
}
