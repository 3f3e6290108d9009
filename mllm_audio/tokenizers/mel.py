"""Log-mel spectrogram of AudioLDM's training code: 64 bands, 10 ms, natural log of magnitude.

The settings are those of Liu et al. 2023 (arXiv:2301.12503); its VAEs and vocoders expect them,
and the DCT tokenizer uses the same frames so that both have the same columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

SAMPLE_RATE = 16_000  # Hz
HOP_LENGTH = 160  # samples per frame, 10 ms
WINDOW_LENGTH = 1024  # samples, also the FFT length
PADDING = (WINDOW_LENGTH - HOP_LENGTH) // 2  # samples reflected at each end: S // HOP_LENGTH frames
NUM_BANDS = 64
MAX_FREQUENCY = 8000.0  # Hz, the lower edge is 0
FLOOR = 1e-5  # smallest mel magnitude, before the logarithm


@lru_cache(maxsize=8)
def mel_filters(device: torch.device) -> Tensor:
    """Return the (513, NUM_BANDS) triangular filters, slaney scale and area norm."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=WINDOW_LENGTH // 2 + 1,
        num_mel_filters=NUM_BANDS,
        min_frequency=0.0,
        max_frequency=MAX_FREQUENCY,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).to(device=device, dtype=torch.float32)


def stft(padded: Tensor) -> Tensor:
    """Analyse (B, S + 2 * PADDING) samples into (B, F, 513) complex bins, frames not centred."""
    window = torch.hann_window(WINDOW_LENGTH, device=padded.device)
    frames = padded.unfold(-1, WINDOW_LENGTH, HOP_LENGTH)  # (B, F, 1024)
    return torch.fft.rfft(frames * window)


def log_mel(waveforms: Tensor) -> Tensor:
    """Analyse (B, S) float32 waveforms into a (B, S // HOP_LENGTH, NUM_BANDS) log-mel.

    Raises:
        ValueError: if S is not longer than PADDING, which the reflection needs.
    """
    if waveforms.shape[-1] <= PADDING:
        raise ValueError(
            f"the log-mel reflects {PADDING} samples at each end but got {waveforms.shape[-1]}; "
            f"pad the waveform to at least {PADDING + 1} samples"
        )
    padded = functional.pad(waveforms.float(), (PADDING, PADDING), mode="reflect")
    mel = stft(padded).abs() @ mel_filters(waveforms.device)  # (B, F, NUM_BANDS)
    return mel.clamp_min(FLOOR).log()


def settings() -> dict[str, float]:
    """Return the numbers above, for tokenizer fingerprints."""
    return {
        "sample_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "window_length": WINDOW_LENGTH,
        "num_bands": NUM_BANDS,
        "max_frequency": MAX_FREQUENCY,
        "floor": FLOOR,
    }
