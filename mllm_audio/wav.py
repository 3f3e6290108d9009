"""Read, write and resample sound files: the only import of an audio I/O library."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from mllm_audio.types import Clip

SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16"}  # what `write` makes of each suffix
LEVEL = 0.5  # peak after `normalize_level`
RATES = (1_000, 192_000)  # Hz that `read_bytes` takes
MAX_CHANNELS = 2  # that `read_bytes` takes


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What the header of a sound file says."""

    num_samples: int  # per channel
    sample_rate: int  # Hz
    num_channels: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.num_samples / self.sample_rate


def info(path: str | Path) -> FileInfo:
    """Read the header of a sound file, not its samples.

    Raises:
        ValueError: if the file is missing, or not sound that libsndfile reads.
    """
    _check_exists(path)
    try:
        header = soundfile.info(str(path))
    except soundfile.SoundFileError as error:
        raise ValueError(_unreadable(path, error)) from error
    return FileInfo(
        num_samples=header.frames, sample_rate=header.samplerate, num_channels=header.channels
    )


def read(path: str | Path, sample_rate: int) -> Clip:
    """Read a sound file as mono float32 at `sample_rate`, its channels averaged.

    Raises:
        ValueError: if the file is missing, corrupt or empty, or holds NaN or infinite samples.
    """
    samples, file_rate = _read_samples(path)
    waveform = torch.from_numpy(samples.mean(axis=1))  # (S,)
    return Clip(resample(waveform, file_rate, sample_rate), sample_rate)


def read_bytes(data: bytes, file_format: str, sample_rate: int, max_seconds: float) -> Clip:
    """Read a sound file of a stranger, held in memory, as `read` does.

    What it would take to decode it is bounded before it is: a small FLAC file can hold hours.

    Args:
        data: the file.
        file_format: that it must be in, wav or flac.
        sample_rate: of the clip, Hz.
        max_seconds: that it may last.

    Raises:
        ValueError: if it is not such a file, or too long, or has other channels or rates than
            `MAX_CHANNELS` and `RATES`, or as `read`.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, file_format, max_seconds)
            samples = file.read(file.frames, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(_unreadable(f"the {file_format} data", error)) from error
    _check_samples("the sound", samples)
    waveform = torch.from_numpy(samples.mean(axis=1))  # (S,)
    return Clip(resample(waveform, file.samplerate, sample_rate), sample_rate)


def _check_header(file: soundfile.SoundFile, file_format: str, max_seconds: float) -> None:
    """Refuse an open file that is of another format, or too much to decode."""
    if file.format not in {"wav": ("WAV", "WAVEX"), "flac": ("FLAC",)}[file_format]:
        raise ValueError(f"found {file.format} data, expected {file_format}; name its format")
    low, high = RATES
    if not low <= file.samplerate <= high or file.channels > MAX_CHANNELS:
        raise ValueError(
            f"found {file.channels} channels at {file.samplerate} Hz, expected at most "
            f"{MAX_CHANNELS} at {low} to {high} Hz; convert it"
        )
    if file.frames > max_seconds * file.samplerate:
        raise ValueError(
            f"the sound lasts {file.frames / file.samplerate:.2f} s, expected at most "
            f"{max_seconds:g} s; cut it"
        )


def read_first_channel(path: str | Path) -> Clip:
    """Read the first channel of a sound file as float32 at the file's own rate.

    Raises:
        ValueError: as `read`.
    """
    samples, file_rate = _read_samples(path)
    return Clip(torch.from_numpy(samples[:, 0].copy()), file_rate)


def _read_samples(path: str | Path) -> tuple[np.ndarray, int]:
    """Read the (S, channels) float32 samples of a file and their rate."""
    _check_exists(path)
    try:
        samples, file_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(_unreadable(path, error)) from error
    _check_samples(path, samples)
    return samples, file_rate


def _check_samples(name: str | Path, samples: np.ndarray) -> None:
    """Refuse a file without samples, or with some that are no numbers."""
    if len(samples) == 0:
        raise ValueError(f"{name} holds no samples; remove it or record it again")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} holds NaN or infinite samples; export it again")


def write(path: str | Path, waveform: Tensor, sample_rate: int) -> None:
    """Write a (S,) waveform as 16 bit WAV or FLAC, whichever the suffix says.

    A waveform with a peak above 1 is scaled down to 1 as a whole.

    Raises:
        ValueError: if the suffix is unknown, or the waveform is not (S,) or not finite.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUBTYPES:
        raise ValueError(f"{path} ends in {suffix!r}; name it with {' or '.join(SUBTYPES)}")
    samples = waveform.detach().float().cpu()
    if samples.ndim != 1:
        raise ValueError(f"{path}: a waveform is (S,), not {tuple(samples.shape)}; pass one row")
    if not samples.isfinite().all():
        raise ValueError(f"{path}: the waveform holds NaN or infinite samples; nothing written")
    if samples.numel():
        samples = samples / samples.abs().max().clamp_min(1.0)
    soundfile.write(str(path), samples.numpy(), sample_rate, subtype=SUBTYPES[suffix])


def flac_bytes(samples: np.ndarray, sample_rate: int) -> bytes:
    """Write (S,) int16 samples as a FLAC file in memory."""
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, subtype="PCM_16", format="FLAC")
    return file.getvalue()


class FlacStream:
    """Encode a waveform of known length as 16 bit FLAC while it comes.

    What was returned is never changed, so the header says that the checksum is unknown, which the
    format allows. It allows that of the length too, but libsndfile does not read such files.
    """

    def __init__(self, sample_rate: int, num_samples: int) -> None:
        self.num_samples, self.has_header = num_samples, False
        self.sink = _Sink()
        self.file = soundfile.SoundFile(
            self.sink, "w", sample_rate, channels=1, subtype="PCM_16", format="FLAC"
        )

    def push(self, samples: np.ndarray) -> bytes:
        """Take the next (S,) int16 samples; return the frames that are complete."""
        self.file.write(samples)
        return self._taken()

    def finish(self) -> bytes:
        """Return the rest."""
        self.file.close()
        return self._taken()

    def _taken(self) -> bytes:
        """Take what was written, the length in its header."""
        data = self.sink.take()
        if self.has_header or not data:
            return data
        self.has_header = True
        high, low = divmod(self.num_samples, 2**32)  # 36 bits at the end of 26 bytes
        return data[:21] + bytes([data[21] | high]) + low.to_bytes(4, "big") + data[26:]


class _Sink(io.RawIOBase):
    """A file that keeps what is written behind its end, and drops what is written before it."""

    def __init__(self) -> None:
        self.position, self.size, self.new = 0, 0, bytearray()

    def write(self, data: Any) -> int:
        if self.position == self.size:
            self.new += data
            self.size += len(data)
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def take(self) -> bytes:
        """Return what is new."""
        new, self.new = bytes(self.new), bytearray()
        return new


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample a (S,) float32 waveform on the CPU with soxr; return it as it is at equal rates."""
    if from_rate == to_rate:
        return waveform
    return torch.from_numpy(soxr.resample(waveform.numpy(), from_rate, to_rate))


def normalize_level(waveform: Tensor) -> Tensor:
    """Remove the mean of (..., S) waveforms and scale each to a peak of 0.5; silence stays silent.

    What AudioLDM (Liu et al. 2023, arXiv:2301.12503) does to every training clip.
    """
    # In float64 a constant clip becomes silence, not amplified rounding errors.
    centred = waveform.double() - waveform.double().mean(dim=-1, keepdim=True)
    peak = centred.abs().amax(dim=-1, keepdim=True)
    return (centred / (peak + 1e-8) * LEVEL).float()


def _check_exists(path: str | Path) -> None:
    """Raise unless `path` is a file, which libsndfile would only call a system error."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; check the path")


def _unreadable(path: str | Path, error: Exception) -> str:
    """Say on one line that libsndfile cannot read `path`."""
    reason = " ".join(str(getattr(error, "error_string", error)).split())
    return f"{path} is not readable sound ({reason}); convert it to WAV or FLAC"
