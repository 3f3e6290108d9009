"""Griffin-Lim over a sliding window: its steps, and how many each frame takes."""

import pytest
import torch
from test_tokenizers import noise

from mllm_audio.tokenizers import DCTConfig, DCTTokenizer, mel
from mllm_audio.tokenizers.griffin_lim import GriffinLim, _starting_turns


@pytest.fixture(scope="module")
def latents():
    return DCTTokenizer().encode(noise(1, 6 * 2560))  # (1, N, D)


def test_parity_of_one_push_with_fast_griffin_lim_over_the_clip(latents):
    """Perraudin et al. 2013, algorithm 2, with magnitudes scaled to the mel, by torch.stft."""
    momentum, length, hop = 0.99, mel.WINDOW_LENGTH, mel.HOP_LENGTH
    log_mel = DCTTokenizer().decode_log_mel(latents[:, :12])
    wanted = log_mel.exp()  # (1, F, 64)
    filters, window = mel.mel_filters(log_mel.device), torch.hann_window(length)

    def scaled(magnitudes):
        ratio = wanted / (magnitudes @ filters).clamp_min(1e-8)
        return magnitudes * (ratio @ (filters / filters.sum(1, keepdim=True).clamp_min(1e-8)).T)

    def synthesise(spectrum):
        def add(frames):
            size = (1, (frames.shape[1] - 1) * hop + length)
            folded = torch.nn.functional.fold(frames.mT, size, (1, length), stride=(1, hop))
            return folded[:, 0, 0]

        frames = torch.fft.irfft(spectrum) * window
        return add(frames) / add((window**2).expand_as(frames)).clamp_min(1e-3)

    magnitudes = scaled(torch.ones(1, log_mel.shape[1], 513))
    turns = _starting_turns(magnitudes, None, 0)
    spectrum = torch.polar(magnitudes, (2 * torch.pi * turns).float())
    before = None
    for _ in range(4):
        found = torch.stft(
            synthesise(spectrum), length, hop, window=window, center=False, return_complex=True
        ).mT
        ahead = found if before is None else found + momentum * (found - before)
        spectrum, before = torch.polar(scaled(found.abs()), ahead.angle()), found
    expected = synthesise(spectrum)[:, mel.PADDING : -mel.PADDING]

    decoder = GriffinLim(num_iterations=4, look_ahead=0, momentum=momentum, seed=0)
    found = torch.cat([decoder.push(log_mel), decoder.finish()], dim=1)
    largest = expected.abs().max().item()
    assert largest > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("num_columns", [1, 2, 6])
@pytest.mark.parametrize(("num_iterations", "look_ahead"), [(48, 1), (10, 3), (1, 1)])
def test_every_frame_takes_all_its_steps(
    monkeypatch, latents, num_columns, num_iterations, look_ahead
):
    steps = []
    monkeypatch.setattr(
        GriffinLim,
        "_revise",
        lambda self, num_steps: steps.append(num_steps * self._frames.shape[1]),
    )
    tokenizer = DCTTokenizer(DCTConfig(num_iterations=num_iterations, look_ahead=look_ahead))
    tokenizer.decode(latents[:, : 4 * num_columns])
    assert sum(steps) == num_columns * 16 * num_iterations
