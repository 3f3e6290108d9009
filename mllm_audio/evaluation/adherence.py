"""Judge whether a sound is what its label says: an independent recogniser of the built-in events.

Classical signal analysis with thresholds set on real soundscapes, never on generated ones. It
shares nothing with the synthesis but the grammar of labels, `kind:pitch:count` per group with
groups separated by spaces and the pitch empty where a kind has none: `beep:low:2 sweep_up::1`.
A segment that fits no kind is heard as `unknown`, so a malformed event is never accepted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from mllm_audio.types import Clip

SAMPLE_RATE = 16_000  # Hz, the only rate the thresholds hold for
WINDOW = 512  # samples of a spectrum, 32 ms
LEVEL_WINDOW = 256  # samples of a level measurement, 16 ms
HOP = 64  # samples between frames, 4 ms
FRAME_SECONDS = HOP / SAMPLE_RATE
BEAT_FRAMES = 7  # level dips shorter than this belong to one event: beating partials
VALLEY_DB = 15.0  # depth of the gap that separates two events
FAINTEST_DB = -30.0  # events below this, relative to the loudest, are smear
SILENCE_DB = -60.0  # level of a clip that holds nothing, relative to full scale
TRIM_DB = -20.0  # an event lasts while it is within this of its own maximum
BUZZ_SHARE = 0.02  # power of a buzz that lies above its fundamental, at least
PITCH_HZ = {"low": (220.0, 420.0), "mid": (750.0, 1350.0), "high": (2000.0, 3300.0)}
FREQUENCIES = np.arange(WINDOW // 2 + 1) * SAMPLE_RATE / WINDOW


@dataclass(frozen=True)
class HeardGroup:
    """`count` equal events in a row."""

    kind: str
    pitch: str  # empty where the kind has none
    count: int

    @property
    def label(self) -> str:
        """The label grammar's form of the group, `kind:pitch:count`."""
        return f"{self.kind}:{self.pitch}:{self.count}"


@dataclass(frozen=True, kw_only=True)
class AdherenceReport:
    """Shares of clips, each in [0, 1]; NaN where no label speaks of the attribute."""

    num_clips: int
    all: float  # kinds, pitches, counts and order are all right
    kind: float  # the set of kinds is right
    pitch: float  # the set of pitch classes is right, among labels that name one
    count: float  # the counts are right, whatever their order
    order: float  # kinds and pitches come in the right order, among labels of several groups


def recognise(waveform: Tensor, sample_rate: int) -> tuple[HeardGroup, ...]:
    """Hear the groups of events in a sound.

    Args:
        waveform: (S,) samples; the level does not matter above -60 dB of full scale.
        sample_rate: must be 16,000 Hz.

    Returns:
        Groups in order, neighbours with the same kind and pitch merged; empty for silence.
    """
    if sample_rate != SAMPLE_RATE or waveform.ndim != 1:
        raise ValueError(
            f"got a waveform of shape {tuple(waveform.shape)} at {sample_rate} Hz but the "
            f"recogniser needs (S,) at {SAMPLE_RATE} Hz; mix to mono and resample first"
        )
    samples = waveform.detach().cpu().double().numpy()
    if len(samples) < WINDOW:
        return ()
    samples = samples - samples.mean()
    level = _level(samples)
    if level.max() < SILENCE_DB:
        return ()
    power = _spectra(samples)
    events = [_classify(power[start:end]) for start, end in _segments(level)]
    return tuple(
        HeardGroup(kind, pitch, len(list(run))) for (kind, pitch), run in itertools.groupby(events)
    )


def parse_label(label: str) -> tuple[HeardGroup, ...]:
    """Read a label such as `beep:low:2 sweep_up::1`.

    Raises:
        ValueError: if a group does not have the form `kind:pitch:count`.
    """
    groups = []
    for text in label.split():
        parts = text.split(":")
        if len(parts) != 3 or not parts[2].isdigit():
            raise ValueError(
                f"label {label!r} holds {text!r} but groups look like 'beep:low:2' or "
                "'click::3'; write kind:pitch:count"
            )
        groups.append(HeardGroup(parts[0], parts[1], int(parts[2])))
    return tuple(groups)


def adheres(waveform: Tensor, sample_rate: int, label: str) -> bool:
    """Tell whether (S,) samples hold exactly the events of `label`, in its order."""
    return recognise(waveform, sample_rate) == parse_label(label)


def adherence(pairs: Iterable[tuple[Clip, str]]) -> AdherenceReport:
    """Judge clips against their labels, whole and by attribute.

    Raises:
        ValueError: if there are no pairs.
    """
    heard_and_wanted = [
        (recognise(clip.waveform, clip.sample_rate), parse_label(label)) for clip, label in pairs
    ]
    if not heard_and_wanted:
        raise ValueError("adherence got no clips; give at least one (clip, label) pair")
    verdicts: dict[str, list[bool]] = {k: [] for k in ("all", "kind", "pitch", "count", "order")}
    for heard, wanted in heard_and_wanted:
        verdicts["all"].append(heard == wanted)
        verdicts["kind"].append({g.kind for g in heard} == {g.kind for g in wanted})
        verdicts["count"].append(sorted(g.count for g in heard) == sorted(g.count for g in wanted))
        if any(g.pitch for g in wanted):
            verdicts["pitch"].append(_pitches(heard) == _pitches(wanted))
        if len(wanted) > 1:
            sequences = [[(g.kind, g.pitch) for g in groups] for groups in (heard, wanted)]
            verdicts["order"].append(sequences[0] == sequences[1])
    shares = {k: sum(v) / len(v) if v else math.nan for k, v in verdicts.items()}
    return AdherenceReport(num_clips=len(heard_and_wanted), **shares)


def _pitches(groups: tuple[HeardGroup, ...]) -> set[str]:
    return {g.pitch for g in groups if g.pitch}


def _level(samples: np.ndarray) -> np.ndarray:
    """Measure the (F,) level of (S,) samples in dB, with short dips filled."""
    window = np.hanning(LEVEL_WINDOW)
    energy = np.convolve(samples**2, window / window.sum(), "same")[::HOP]  # (F,)
    level = 10 * np.log10(energy + 1e-12)
    # A grey closing: the maximum over BEAT_FRAMES, then the minimum over them.
    reach = BEAT_FRAMES // 2
    dilated = sliding_window_view(np.pad(level, reach, mode="edge"), BEAT_FRAMES).max(1)
    return sliding_window_view(np.pad(dilated, reach, mode="edge"), BEAT_FRAMES).min(1)


def _spectra(samples: np.ndarray) -> np.ndarray:
    """Analyse (S,) samples into (F, 257) power, frame i centred on sample i * HOP."""
    frames = sliding_window_view(np.pad(samples, WINDOW // 2), WINDOW)[::HOP]
    return np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2


def _turns(values: np.ndarray, depth: float) -> tuple[list[int], list[int]]:
    """Find the alternating maxima and minima of a curve, ignoring wiggles less than `depth`."""
    maxima: list[int] = []
    minima: list[int] = []
    rising, extreme = True, 0
    for i, value in enumerate(values):
        further = value - values[extreme] if rising else values[extreme] - value
        if further > 0:
            extreme = i
        elif further < -depth:
            (maxima if rising else minima).append(extreme)
            rising, extreme = not rising, i
    if rising:  # a last fall is not known to be a valley
        maxima.append(extreme)
    return maxima, minima


def _segments(level: np.ndarray) -> list[tuple[int, int]]:
    """Cut a (F,) level curve at its valleys into events, as half-open frame ranges."""
    _, valleys = _turns(level, VALLEY_DB)
    floor = np.quantile(level, 0.1)
    segments = []
    for start, end in itertools.pairwise([0, *valleys, len(level)]):
        peak = level[start:end].max(initial=-np.inf)
        if peak > level.max() + FAINTEST_DB:
            threshold = max(peak + TRIM_DB, (peak + floor) / 2)
            inside = start + np.flatnonzero(level[start:end] > threshold)
            segments.append((int(inside[0]), int(inside[-1]) + 1))
    return segments


def _classify(power: np.ndarray) -> tuple[str, str]:
    """Name the kind and pitch class of one event from its (F, 257) spectra."""
    seconds = len(power) * FRAME_SECONDS
    spectrum = power.mean(0)  # (257,)
    smooth = np.convolve(spectrum, np.ones(3) / 3, "same")
    # Noise is flat everywhere; a buzz may be flat above, where its harmonics crowd, never below.
    if _flatness(smooth, 100, 7600) > 0.1 and _flatness(spectrum, 150, 1600) > 0.16:
        if seconds < 0.05:
            return "click", ""
        return ("noise" if seconds < 0.16 else "unknown"), ""
    if _share(spectrum, 40, 210) > 0.6:
        return ("knock" if seconds < 0.12 else "unknown"), ""
    if seconds > 0.14:
        return _classify_moving(power), ""
    fundamental = _fundamental(spectrum)
    pitch = next((k for k, (lo, hi) in PITCH_HZ.items() if lo <= fundamental < hi), "")
    if seconds < 0.05 or not pitch:
        return "unknown", ""
    return ("buzz" if _share(spectrum, 1.5 * fundamental, 8000) > BUZZ_SHARE else "beep"), pitch


def _classify_moving(power: np.ndarray) -> str:
    """Tell sweeps and warbles apart by the octaves that (F, 257) spectra travel."""
    audible = power[:, FREQUENCIES > 150]
    octaves = np.log2(FREQUENCIES[FREQUENCIES > 150][audible.argmax(1)])  # (F,)
    octaves = np.median(sliding_window_view(octaves, 3), axis=1)  # lone jumps are not motion
    num_end = len(octaves) // 5
    rise = np.median(octaves[-num_end:]) - np.median(octaves[:num_end])
    num_turns = sum(map(len, _turns(octaves, 0.2)))
    trend = abs(np.corrcoef(octaves, np.arange(len(octaves)))[0, 1]) if np.ptp(octaves) else 0.0
    if abs(rise) > 1 and trend > 0.8:
        return "sweep_up" if rise > 0 else "sweep_down"
    return "warble" if num_turns >= 4 and np.ptp(octaves) < 1.2 else "unknown"


def _fundamental(spectrum: np.ndarray) -> float:
    """Return the frequency in Hz of the lowest strong peak of a (257,) power spectrum."""
    inner = spectrum[1:-1]
    is_peak = (inner >= spectrum[:-2]) & (inner > spectrum[2:]) & (inner > 0.03 * spectrum.max())
    return float(FREQUENCIES[1 + np.flatnonzero(is_peak)[0]]) if is_peak.any() else 0.0


def _share(spectrum: np.ndarray, low: float, high: float) -> float:
    """Return the share of a (257,) power spectrum between two frequencies in Hz."""
    inside = (low <= FREQUENCIES) & (high > FREQUENCIES)
    return float(spectrum[inside].sum() / (spectrum.sum() + 1e-20))


def _flatness(spectrum: np.ndarray, low: float, high: float) -> float:
    """Return the geometric over the arithmetic mean of a band: 1 for white noise, 0 for a tone."""
    band = spectrum[(low <= FREQUENCIES) & (high > FREQUENCIES)] + 1e-20
    return float(np.exp(np.log(band).mean()) / band.mean())
