"""A waveform for a log-mel whose frames arrive in time: Griffin-Lim over a sliding window.

Fast Griffin-Lim (Perraudin et al. 2013, DOI 10.1109/WASPAA.2013.6701851) on the frames that are
still open, beside sound that is settled and held fixed: the look-ahead of RTISI-LA (Zhu, Beauregard
and Wyse 2007, DOI 10.1109/TASL.2007.899236). What is settled never depends on what comes later than
the look-ahead, so decoding as latents arrive, or a whole clip at once, gives the same samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mllm_audio.tokenizers import mel

LOBE = 5  # bins to each side that share one starting frequency, about one mel band
OVERLAP = mel.WINDOW_LENGTH - mel.HOP_LENGTH  # samples that a frame shares with later ones


class GriffinLim:
    """Look for waveforms whose log-mel is the one that is pushed, some frames at a time.

    A mel leaves most of the spectrum open, so magnitudes are not frozen before phase recovery:
    every step keeps the magnitudes of the waveform it reached and scales them, band by band, to the
    wanted mel. That is one step of multiplicative updates for the Kullback-Leibler divergence (Lee
    and Seung 2001).

    Frames that are pushed together settle together, after they took part in the rounds of
    `look_ahead` + 1 pushes; those of the end in rounds that `finish` adds. The steps of the rounds
    that a frame takes part in add up to `num_iterations`.
    """

    def __init__(self, *, num_iterations: int, look_ahead: int, momentum: float, seed: int) -> None:
        """Begin a waveform; `seed` is of the starting phases."""
        self._num_iterations, self._num_rounds = num_iterations, look_ahead + 1
        self._momentum, self._seed = momentum, seed
        self._rounds = 0  # so far
        self._groups: list[tuple[int, int]] = []  # (frames, rounds so far) of each open push
        self._cut = mel.PADDING  # samples before the waveform, not handed out yet

    def push(self, log_mel: Tensor) -> Tensor:
        """Take the next (B, F, 64) frames; return the (B, S) samples that settle, maybe none."""
        if not self._rounds:
            self._begin(log_mel)
        self._join(log_mel)
        return self._round()

    def finish(self) -> Tensor:
        """Settle the frames that are open; return the (B, S) samples that are left.

        All that came out has F * HOP_LENGTH samples. At least one frame must have been pushed.
        """
        parts = []
        while self._groups:
            parts.append(self._round())
        parts.append((self._tail / self._tail_weight)[:, self._cut : mel.PADDING])
        return torch.cat(parts, dim=1)

    def _begin(self, log_mel: Tensor) -> None:
        """Make the constants, and a state without frames."""
        self._window = torch.hann_window(mel.WINDOW_LENGTH, device=log_mel.device)
        self._filters = mel.mel_filters(log_mel.device)  # (513, 64)
        sums = self._filters.sum(1, keepdim=True)
        self._shares = (self._filters / sums.clamp_min(1e-8)).T.contiguous()  # (64, 513)
        # No waveform within [-1, 1] lies outside these bounds, but sampled latents may.
        loudest = mel.WINDOW_LENGTH / 2 * self._filters.sum(0).max().item()
        self._bounds = math.log(mel.FLOOR), math.log(loudest)

        batch, num_bins = len(log_mel), len(self._filters)
        self._wanted = log_mel.new_zeros(batch, 0, log_mel.shape[2], dtype=torch.float32)
        # Frames as they are, and as the last step found them: the newest are not in it yet.
        self._frames = torch.zeros(
            batch, 0, num_bins, dtype=torch.complex64, device=log_mel.device
        )  # (B, F, 513)
        self._previous = self._frames
        self._turns: Tensor | None = None  # (B, 1, 513) starting phases of the newest frame
        # What settled frames add to the samples of open ones.
        self._tail = self._wanted.new_zeros(batch, OVERLAP)
        self._tail_weight = self._wanted.new_zeros(1, OVERLAP)

    def _join(self, log_mel: Tensor) -> None:
        """Open frames, with starting phases."""
        wanted = log_mel.float().clamp(*self._bounds).exp()
        magnitudes = torch.ones(*wanted.shape[:2], len(self._filters), device=wanted.device)
        magnitudes = self._scale_to_mel(magnitudes, wanted)  # (B, F, 513)
        turns = _starting_turns(magnitudes, self._turns, self._seed)
        self._turns = turns[:, -1:]
        frames = torch.polar(magnitudes, (2 * math.pi * turns).float())
        self._wanted = torch.cat([self._wanted, wanted], dim=1)
        self._frames = torch.cat([self._frames, frames], dim=1)
        self._groups.append((log_mel.shape[1], 0))

    def _round(self) -> Tensor:
        """Revise what is open; return the (B, S) samples of what has settled, maybe none."""
        # Differences of this staircase: any `_num_rounds` in a row add up to `_num_iterations`.
        start, end = (
            self._num_iterations * r // self._num_rounds for r in (self._rounds, self._rounds + 1)
        )
        self._revise(end - start)
        self._rounds += 1
        self._groups = [(size, rounds + 1) for size, rounds in self._groups]
        if self._groups[0][1] < self._num_rounds:
            return self._tail[:, :0]
        return self._settle(self._groups.pop(0)[0])

    def _revise(self, num_steps: int) -> None:
        """Take Griffin-Lim steps with all open frames."""
        weight = self._overlap(self._frames.shape[1])
        for _ in range(num_steps):
            found = mel.stft(self._add(self._frames) / weight)  # (B, F, 513)
            magnitudes = self._scale_to_mel(_magnitudes(found), self._wanted)
            # The newest frames have no step before this one: no momentum.
            before = torch.cat([self._previous, found[:, self._previous.shape[1] :]], dim=1)
            ahead = torch.add(found, found - before, alpha=self._momentum)
            self._frames = ahead * (magnitudes / _magnitudes(ahead).clamp_min(1e-9))
            self._previous = found

    def _settle(self, num_frames: int) -> Tensor:
        """Close the oldest frames; return the (B, S) samples that no open frame reaches."""
        num_samples = num_frames * mel.HOP_LENGTH
        total, weight = self._add(self._frames[:, :num_frames]), self._overlap(num_frames)
        self._tail, self._tail_weight = total[:, num_samples:], weight[:, num_samples:]
        self._wanted = self._wanted[:, num_frames:]
        self._frames = self._frames[:, num_frames:]
        self._previous = self._previous[:, num_frames:]
        cut, self._cut = self._cut, max(0, self._cut - num_samples)
        return (total / weight)[:, cut:num_samples]

    def _add(self, frames: Tensor) -> Tensor:
        """Add (B, F, 513) open frames to what is settled: (B, F * HOP_LENGTH + OVERLAP)."""
        total = _add_frames(torch.fft.irfft(frames, n=mel.WINDOW_LENGTH) * self._window)
        total[:, :OVERLAP] += self._tail
        return total

    def _overlap(self, num_frames: int) -> Tensor:
        """Return the (1, F * HOP_LENGTH + OVERLAP) squared windows over each sample of `_add`."""
        weight = _add_frames((self._window**2).expand(1, num_frames, -1))
        weight[:, :OVERLAP] += self._tail_weight
        return weight.clamp_min(1e-3)  # the window vanishes at the ends of what is known

    def _scale_to_mel(self, magnitudes: Tensor, wanted: Tensor) -> Tensor:
        """Move (B, F, 513) magnitudes towards a (B, F, 64) mel; they stay nonnegative."""
        ratio = wanted / (magnitudes @ self._filters).clamp_min(1e-8)  # (B, F, 64)
        return magnitudes * (ratio @ self._shares)


def _starting_turns(magnitudes: Tensor, before: Tensor | None, seed: int) -> Tensor:
    """Start (B, F, 513) bins as sinusoids at the centre of the magnitudes around them.

    Random phases, or sinusoids at the bins' own frequencies, leave low tones several percent off
    pitch: Griffin-Lim does not move a tone far from where it starts.

    Args:
        magnitudes: (B, F, 513).
        before: (B, 1, 513) phases of the frame before; None: there is none.
        seed: of the phase of each frequency in a first frame.

    Returns:
        (B, F, 513) float64 phases as turns in [0, 1).
    """
    num_bins = magnitudes.shape[2]
    bins = torch.arange(num_bins, device=magnitudes.device, dtype=torch.float32)
    weights = torch.hann_window(2 * LOBE + 3, periodic=False, device=bins.device)[1:-1]

    def around(values: Tensor) -> Tensor:
        return functional.pad(values, (LOBE, LOBE)).unfold(2, 2 * LOBE + 1, 1) @ weights

    centres = around(magnitudes * bins) / around(magnitudes).clamp_min(1e-12)  # (B, F, 513)
    for _ in range(3):  # climb to the nearest peak, so that its bins agree
        nearest = centres.round().long().clamp(0, num_bins - 1)
        centres = centres.gather(2, nearest)
    turns = (centres.double() * mel.HOP_LENGTH / mel.WINDOW_LENGTH).cumsum(1)
    if before is not None:
        return (turns + before) % 1

    # A CPU generator gives the same phases on every device, for every row and batch size.
    offsets = torch.rand(num_bins, generator=torch.Generator().manual_seed(seed)).to(bins.device)
    first = centres[:, :1].round().long().clamp(0, num_bins - 1)
    # Neighbouring bins of a windowed sinusoid are half a turn apart.
    return (turns - turns[:, :1] + offsets[first] + bins / 2) % 1


def _magnitudes(spectrum: Tensor) -> Tensor:
    """Return the absolute values of complex bins, in less than half the time of `abs`."""
    return (spectrum.real.square() + spectrum.imag.square()).sqrt()


def _add_frames(frames: Tensor) -> Tensor:
    """Add (B, F, 1024) frames at their places: (B, F * HOP_LENGTH + OVERLAP)."""
    batch, num_frames, length = frames.shape
    total = frames.new_zeros(batch, num_frames * mel.HOP_LENGTH + length - mel.HOP_LENGTH)
    places = total.unfold(1, length, mel.HOP_LENGTH)  # (B, F, 1024), a view
    apart = math.ceil(length / mel.HOP_LENGTH)
    for first in range(apart):  # frames so far apart do not overlap
        places[:, first::apart] += frames[:, first::apart]
    return total
