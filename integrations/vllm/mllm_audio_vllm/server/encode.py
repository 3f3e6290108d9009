"""Waveforms to the bytes of the formats that clients ask for, whole and as they come."""

from __future__ import annotations

import struct
from typing import Protocol

import numpy as np
from torch import Tensor

from mllm_audio import wav

CONTENT_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "pcm": "audio/pcm"}
UNKNOWN = 0xFFFFFFFF  # size in the header of a WAV file that is not over yet


class Encoder(Protocol):
    """Turns (S,) waveforms into the bytes of one sound file, as they come."""

    def push(self, waveform: Tensor) -> bytes:
        """Take more samples; return the bytes that are certain."""

    def finish(self) -> bytes:
        """Return the rest."""


def new_encoder(audio_format: str, sample_rate: int, num_samples: int | None) -> Encoder:
    """Begin a sound file: wav, flac, or pcm, which is samples alone.

    Flac whose length is not known comes as a whole at the end: its header states it.
    """
    if audio_format == "flac":
        return _WholeFlac(sample_rate) if num_samples is None else _Flac(sample_rate, num_samples)
    header = wav_header(sample_rate, num_samples and 2 * num_samples)
    return _Pcm(header if audio_format == "wav" else b"")


def encode(waveform: Tensor, audio_format: str, sample_rate: int) -> bytes:
    """Write a whole sound file: wav, flac or pcm16."""
    if audio_format == "flac":
        return wav.flac_bytes(to_int16(waveform), sample_rate)
    samples = to_int16(waveform).tobytes()
    header = wav_header(sample_rate, len(samples)) if audio_format == "wav" else b""
    return header + samples


def to_int16(waveform: Tensor) -> np.ndarray:
    """Turn a (S,) waveform into 16 bit samples; what is beyond [-1, 1] is clipped."""
    samples = waveform.detach().float().cpu().clamp(-1, 1).numpy()
    return np.round(samples * 32767).astype("<i2")


def wav_header(sample_rate: int, num_bytes: int | None) -> bytes:
    """Write the header of a 16 bit mono WAV file of `num_bytes` of samples; None: open-ended."""
    riff, data = (UNKNOWN, UNKNOWN) if num_bytes is None else (36 + num_bytes, num_bytes)
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", riff, b"WAVE") + fmt + struct.pack("<4sI", b"data", data)


class _Pcm:
    """Samples behind a header."""

    def __init__(self, header: bytes) -> None:
        self.header = header

    def push(self, waveform: Tensor) -> bytes:
        header, self.header = self.header, b""
        return header + to_int16(waveform).tobytes()

    def finish(self) -> bytes:
        return self.header


class _Flac:
    """FLAC frames."""

    def __init__(self, sample_rate: int, num_samples: int) -> None:
        self.stream = wav.FlacStream(sample_rate, num_samples)

    def push(self, waveform: Tensor) -> bytes:
        return self.stream.push(to_int16(waveform))

    def finish(self) -> bytes:
        return self.stream.finish()


class _WholeFlac:
    """A FLAC file, all of it at the end."""

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate, self.samples = sample_rate, [np.zeros(0, np.int16)]

    def push(self, waveform: Tensor) -> bytes:
        self.samples.append(to_int16(waveform))
        return b""

    def finish(self) -> bytes:
        return wav.flac_bytes(np.concatenate(self.samples), self.sample_rate)
