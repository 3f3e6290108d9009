"""Sound files: what is read is what was written, and bad files are named."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mllm_audio import wav

FIXTURES = Path(__file__).parent / "fixtures"


def tone(frequency: float, sample_rate: int, seconds: float = 0.5) -> torch.Tensor:
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    return 0.4 * torch.sin(2 * torch.pi * frequency * time)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".FLAC"])
def test_written_sound_is_read_back_within_16_bits(tmp_path, suffix):
    waveform = tone(440, 16_000)
    wav.write(tmp_path / f"a{suffix}", waveform, 16_000)
    clip = wav.read(tmp_path / f"a{suffix}", 16_000)
    assert clip.sample_rate == 16_000
    assert clip.waveform.dtype == torch.float32
    torch.testing.assert_close(clip.waveform, waveform, rtol=0, atol=1 / 32768)


def test_channels_are_averaged(tmp_path):
    left, right = tone(440, 16_000), tone(880, 16_000)
    stereo = torch.stack([left, right], dim=1).numpy()
    soundfile.write(tmp_path / "a.wav", stereo, 16_000, subtype="FLOAT")
    clip = wav.read(tmp_path / "a.wav", 16_000)
    torch.testing.assert_close(clip.waveform, (left + right) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("file_rate", [8_000, 44_100])
def test_reading_resamples_and_keeps_the_tone(tmp_path, file_rate):
    soundfile.write(tmp_path / "a.wav", tone(440, file_rate).numpy(), file_rate, subtype="FLOAT")
    waveform = wav.read(tmp_path / "a.wav", 16_000).waveform
    assert len(waveform) == 8_000
    expected = tone(440, 16_000)
    torch.testing.assert_close(waveform[800:-800], expected[800:-800], rtol=0, atol=1e-3)


def test_info_tells_the_duration(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((11_025, 2)), 44_100)
    header = wav.info(tmp_path / "a.wav")
    assert (header.num_samples, header.sample_rate, header.num_channels) == (11_025, 44_100, 2)
    assert header.seconds == 0.25


@pytest.mark.parametrize("probe", [wav.info, lambda path: wav.read(path, 16_000)])
@pytest.mark.parametrize("content", [None, b"", b"RIFF but not really sound"])
def test_missing_and_corrupt_files_are_named_on_one_line(tmp_path, content, probe):
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.wav is not") as caught:
        probe(path)
    assert "\n" not in str(caught.value)


def test_empty_and_non_finite_sound_is_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(ValueError, match=r"empty\.wav holds no samples"):
        wav.read(tmp_path / "empty.wav", 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav holds NaN"):
        wav.read(tmp_path / "nan.wav", 16_000)


def test_loud_sound_is_scaled_down_not_clipped_or_wrapped(tmp_path):
    loud = 5 * tone(440, 16_000)
    wav.write(tmp_path / "a.wav", loud, 16_000)
    waveform = wav.read(tmp_path / "a.wav", 16_000).waveform
    torch.testing.assert_close(waveform, loud / loud.abs().max(), rtol=0, atol=2 / 32768)


def test_writing_refuses_unknown_suffixes_shapes_and_nan(tmp_path):
    with pytest.raises(ValueError, match=r"'\.mp3'; name it with \.wav or \.flac"):
        wav.write(tmp_path / "a.mp3", torch.zeros(8), 16_000)
    with pytest.raises(ValueError, match=r"not \(1, 8\)"):
        wav.write(tmp_path / "a.wav", torch.zeros(1, 8), 16_000)
    with pytest.raises(ValueError, match="NaN"):
        wav.write(tmp_path / "a.wav", torch.tensor([0.0, torch.nan]), 16_000)
    assert list(tmp_path.iterdir()) == []


def test_level_matches_audioldm():
    fixture = np.load(FIXTURES / "audioldm_mel.npz")
    level = wav.normalize_level(torch.from_numpy(fixture["waveform"]))
    torch.testing.assert_close(level, torch.from_numpy(fixture["normalized"]), rtol=1e-5, atol=1e-6)


def test_level_of_silence_and_of_a_constant_is_zero():
    rows = torch.tensor([[0.0] * 4001, [0.3] * 4001, [1.0, -1.0] * 2000 + [0.0]])
    level = wav.normalize_level(rows)
    assert level.abs().amax(dim=1).tolist() == pytest.approx([0.0, 0.0, 0.5], abs=1e-7)


def test_import_is_light():
    code = (
        "import sys, mllm_audio.wav; print({'transformers', 'diffusers', 'scipy'} & {*sys.modules})"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "set()"


def to_bytes(samples, sample_rate, file_format, subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format=file_format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["wav", "flac"])
def test_bytes_read_as_the_file_does(tmp_path, file_format):
    stereo = torch.stack([tone(440, 44_100), tone(550, 44_100)], dim=1).numpy()
    data = to_bytes(stereo, 44_100, file_format)
    (tmp_path / f"a.{file_format}").write_bytes(data)
    clip = wav.read_bytes(data, file_format, 16_000, 0.5)
    assert clip.sample_rate == 16_000
    assert torch.equal(clip.waveform, wav.read(tmp_path / f"a.{file_format}", 16_000).waveform)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "wav data is not readable sound"),
        (b"not a sound file at all", "wav data is not readable sound"),
        (to_bytes(np.zeros(10), 16_000, "flac"), "found FLAC data, expected wav"),
        (to_bytes(np.zeros((10, 3)), 16_000, "wav"), "found 3 channels at 16000 Hz"),
        (to_bytes(np.zeros(10), 999, "wav"), "found 1 channels at 999 Hz"),
        (to_bytes(np.zeros(16_001), 16_000, "wav"), r"lasts 1\.00 s, expected at most 1 s; cut it"),
        (to_bytes(np.zeros(0), 16_000, "wav"), "the sound holds no samples"),
        (to_bytes(np.full(9, np.nan), 16_000, "wav", "FLOAT"), "the sound holds NaN"),
    ],
)
def test_bad_bytes_are_refused_in_one_line(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        wav.read_bytes(data, "wav", 16_000, 1.0)
    assert "\n" not in str(caught.value)


def test_long_silence_is_refused_before_it_is_decoded(monkeypatch):
    data = to_bytes(np.zeros(192_000 * 60, dtype=np.int16), 192_000, "flac")
    assert len(data) < 200_000  # and 46 MB as float32
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(ValueError, match=r"lasts 60\.00 s"):
        wav.read_bytes(data, "flac", 16_000, 10.0)


def test_flac_stream_holds_the_samples_and_comes_in_pieces():
    samples = (tone(440, 16_000, 1.0) * 32767).short().numpy()
    stream = wav.FlacStream(16_000, len(samples))
    pieces = [stream.push(piece) for piece in np.array_split(samples, 20)]
    assert sum(map(bool, pieces)) == 4  # the header, then frames of 4096 samples
    data = b"".join(pieces) + stream.finish()
    assert data[:4] == b"fLaC"
    assert not any(data[26:42])  # the checksum is unknown
    decoded, sample_rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert sample_rate == 16_000
    assert np.array_equal(decoded, samples)


def test_flac_bytes_are_a_whole_file():
    samples = (tone(440, 16_000) * 32767).short().numpy()
    decoded, _ = soundfile.read(io.BytesIO(wav.flac_bytes(samples, 16_000)), dtype="int16")
    assert np.array_equal(decoded, samples)
