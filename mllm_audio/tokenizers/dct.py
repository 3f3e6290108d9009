"""A tokenizer without weights: low-frequency DCT coefficients of log-mel patches.

Encoding is linear in the log-mel. Decoding inverts the DCT, then looks for a waveform whose mel is
the decoded one with fast Griffin-Lim (Perraudin et al. 2013, DOI 10.1109/WASPAA.2013.6701851).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mllm_audio.tokenizers import mel
from mllm_audio.tokenizers.base import num_columns

LOBE = 5  # bins to each side that share one starting frequency, about one mel band


@dataclass(frozen=True, kw_only=True)
class DCTConfig:
    """What is kept of each patch, and how hard the decoder works."""

    patch_size: int = 16  # frames, and mel bands, of one square patch
    num_coefficients: int = 128  # kept per patch in zigzag order; D
    num_iterations: int = 32  # Griffin-Lim steps of `decode`
    momentum: float = 0.99  # of those steps; 0 is plain Griffin-Lim
    seed: int = 0  # of the phase of each frequency that every decode starts from

    def __post_init__(self) -> None:
        if self.patch_size < 1 or mel.NUM_BANDS % self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size} but must divide {mel.NUM_BANDS} mel bands; "
                "use 8, 16 or 32"
            )
        if not 1 <= self.num_coefficients <= self.patch_size**2:
            raise ValueError(
                f"num_coefficients is {self.num_coefficients} but a patch has 1 to "
                f"{self.patch_size**2} of them"
            )
        if self.num_iterations < 1 or self.momentum < 0:
            raise ValueError(
                f"num_iterations is {self.num_iterations} and momentum {self.momentum}; "
                "the first must be at least 1, the second not negative"
            )


class DCTTokenizer:
    """Log-mel patches of 16 frames x 16 bands <-> their lowest DCT coefficients."""

    name = "dct"
    weights_license = ""  # it has no weights
    sample_rate = mel.SAMPLE_RATE
    hop_length = mel.HOP_LENGTH
    decode_context = 2  # 320 ms, five analysis windows, on each side

    def __init__(self, config: DCTConfig | None = None) -> None:
        self.config = config or DCTConfig()
        self.latent_dim = self.config.num_coefficients
        self.tokens_per_column = mel.NUM_BANDS // self.config.patch_size
        self.samples_per_column = self.config.patch_size * mel.HOP_LENGTH

    @property
    def fingerprint(self) -> str:
        """Short hash of the settings that change latents; those of `decode` do not."""
        settings = {
            "name": self.name,
            "patch_size": self.config.patch_size,
            "num_coefficients": self.config.num_coefficients,
            "order": "zigzag",
            "mel": mel.settings(),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, waveforms: Tensor) -> Tensor:
        """Encode (B, S) float32 waveforms to (B, N, D) latents, S zero-padded to whole columns."""
        num_samples = waveforms.shape[-1]
        columns = num_columns(self, num_samples)
        missing = columns * self.samples_per_column - num_samples
        log_mel = mel.log_mel(functional.pad(waveforms, (0, missing)))  # (B, F, 64)

        size = self.config.patch_size
        patches = log_mel.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3)
        basis = dct_matrix(size).to(log_mel)  # (size, size)
        coefficients = basis @ patches @ basis.T  # (B, C, 4, size, size)
        kept = coefficients.flatten(3)[..., self._kept()]  # (B, C, 4, D)
        return kept.flatten(1, 2)  # (B, N, D), a column's bands together, low first

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, N, D) latents to (B, C * samples_per_column) samples.

        Raises:
            ValueError: if N is not a whole number of columns, or D is not `latent_dim`.
        """
        log_mel = self.decode_log_mel(latents)
        return invert_log_mel(
            log_mel, self.config.num_iterations, self.config.momentum, self.config.seed
        )

    def decode_log_mel(self, latents: Tensor) -> Tensor:
        """Decode (B, N, D) latents to the (B, F, 64) log-mel they stand for."""
        _, num_tokens, dim = latents.shape
        if num_tokens == 0 or num_tokens % self.tokens_per_column or dim != self.latent_dim:
            raise ValueError(
                f"the dct tokenizer decodes (B, N, {self.latent_dim}) latents with N a positive "
                f"multiple of {self.tokens_per_column}, not {tuple(latents.shape)}; "
                "pass whole columns"
            )
        size = self.config.patch_size
        coefficients = latents.new_zeros((*latents.shape[:2], size * size), dtype=torch.float32)
        coefficients[..., self._kept()] = latents.float()
        coefficients = coefficients.unflatten(1, (-1, self.tokens_per_column))
        basis = dct_matrix(size).to(coefficients)
        patches = basis.T @ coefficients.unflatten(-1, (size, size)) @ basis
        return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, F, 64)

    def _kept(self) -> list[int]:
        """Index the kept coefficients in a flattened patch."""
        return zigzag(self.config.patch_size)[: self.config.num_coefficients]


def dct_matrix(size: int) -> Tensor:
    """Return the (size, size) float64 orthonormal DCT-II, one basis vector a row."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi * frequency * position / size) * math.sqrt(2 / size)
    basis[0] *= math.sqrt(0.5)
    return basis


def zigzag(size: int) -> list[int]:
    """List the flat indices of a (time, frequency) patch by rising DCT frequency.

    Diagonals of equal row + column, walked back and forth as JPEG does: (0, 0), (0, 1), (1, 0),
    (2, 0), (1, 1), ...
    """

    def order(index: int) -> tuple[int, int]:
        row, column = divmod(index, size)
        diagonal = row + column
        return diagonal, row if diagonal % 2 else column

    return sorted(range(size * size), key=order)


def invert_log_mel(log_mel: Tensor, num_iterations: int, momentum: float, seed: int) -> Tensor:
    """Find waveforms whose log-mel is (B, F, 64) `log_mel`; return (B, F * HOP_LENGTH) samples.

    A mel leaves most of the spectrum open, so magnitudes are not frozen before phase recovery:
    every Griffin-Lim step keeps the magnitudes of the waveform it reached and scales them, band
    by band, to the wanted mel. That is one step of multiplicative updates for the
    Kullback-Leibler divergence (Lee and Seung 2001).
    """
    filters = mel.mel_filters(log_mel.device)  # (513, 64)
    # No waveform within [-1, 1] lies outside these bounds, but sampled latents may.
    loudest = math.log(mel.WINDOW_LENGTH / 2 * filters.sum(0).max().item())
    wanted = log_mel.float().clamp(math.log(mel.FLOOR), loudest).exp()  # (B, F, 64)

    magnitudes = torch.ones(*log_mel.shape[:2], filters.shape[0], device=log_mel.device)
    magnitudes = _scale_to_mel(magnitudes, wanted, filters)  # (B, F, 513)
    phases = _starting_phases(magnitudes, seed)
    directions = torch.polar(torch.ones_like(phases), phases)

    window = torch.hann_window(mel.WINDOW_LENGTH, device=log_mel.device)
    # The window vanishes at the very ends, which are cut away below.
    overlap = _add_frames((window**2).expand(1, log_mel.shape[1], -1)).clamp_min(1e-3)

    def synthesise(spectrum: Tensor) -> Tensor:
        return _add_frames(torch.fft.irfft(spectrum, n=mel.WINDOW_LENGTH) * window) / overlap

    previous: Tensor | None = None
    for _ in range(num_iterations):
        spectrum = mel.stft(synthesise(magnitudes * directions))
        magnitudes = _scale_to_mel(spectrum.abs(), wanted, filters)
        ahead = spectrum if previous is None else spectrum + momentum * (spectrum - previous)
        directions = ahead / ahead.abs().clamp_min(1e-9)
        previous = spectrum
    return synthesise(magnitudes * directions)[:, mel.PADDING : -mel.PADDING]


def _starting_phases(magnitudes: Tensor, seed: int) -> Tensor:
    """Start (B, F, 513) bins as sinusoids at the centre of the magnitudes around them.

    Random phases, or sinusoids at the bins' own frequencies, leave low tones several percent off
    pitch: Griffin-Lim does not move a tone far from where it starts.
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

    # A CPU generator gives the same phases on every device, for every row and batch size.
    offsets = torch.rand(num_bins, generator=torch.Generator().manual_seed(seed)).to(bins.device)
    first = centres[:, :1].round().long().clamp(0, num_bins - 1)
    # Neighbouring bins of a windowed sinusoid are half a turn apart.
    turns = turns - turns[:, :1] + offsets[first] + bins / 2
    return (turns % 1 * (2 * math.pi)).float()


def _scale_to_mel(magnitudes: Tensor, wanted: Tensor, filters: Tensor) -> Tensor:
    """Move (B, F, 513) magnitudes towards the (B, F, 64) mel `wanted`; they stay nonnegative."""
    ratio = wanted / (magnitudes @ filters).clamp_min(1e-8)  # (B, F, 64)
    return magnitudes * (ratio @ (filters / filters.sum(1, keepdim=True).clamp_min(1e-8)).T)


def _add_frames(frames: Tensor) -> Tensor:
    """Add (B, F, 1024) frames at their places: (B, F * HOP_LENGTH + 2 * PADDING)."""
    batch, num_frames, length = frames.shape
    hop = mel.HOP_LENGTH
    blocks = math.ceil(length / hop)
    frames = functional.pad(frames, (0, blocks * hop - length)).unflatten(2, (blocks, hop))
    total = frames.new_zeros(batch, num_frames + blocks - 1, hop)
    for block in range(blocks):
        total[:, block : block + num_frames] += frames[:, :, block]
    return total.flatten(1)[:, : num_frames * hop + length - hop]
