"""Tokenizers: the contract of every one in TOKENIZERS, then what is particular to each."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_audio.tokenizers import (
    TOKENIZERS,
    AudioLDMTokenizer,
    DCTConfig,
    DCTTokenizer,
    load_tokenizer,
    num_columns,
)
from mllm_audio.tokenizers.audioldm import patchify, unpatchify
from mllm_audio.tokenizers.dct import dct_matrix, zigzag
from mllm_audio.tokenizers.mel import log_mel

FIXTURES = Path(__file__).parent / "fixtures"
SCALING_FACTOR = 0.41


def write_random_audioldm(folder: Path, seed: int, scaling_factor: float = SCALING_FACTOR) -> None:
    """Write AudioLDM's VAE and vocoder with few channels and random weights."""
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )
    vae.save_pretrained(folder / "vae")
    config = SpeechT5HifiGanConfig(
        model_in_dim=64,
        sampling_rate=16_000,
        upsample_initial_channel=64,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        initializer_range=0.1,
        normalize_before=False,
    )
    SpeechT5HifiGan(config).save_pretrained(folder / "vocoder")


@pytest.fixture(scope="module")
def audioldm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audioldm")
    write_random_audioldm(folder, seed=0)
    return folder


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request):
    if request.param == "dct":
        return load_tokenizer("dct")
    return load_tokenizer(f"audioldm:{request.getfixturevalue('audioldm_folder')}")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Compare up to a share of the largest value, which must not be zero."""
    largest = expected.abs().max().item()
    assert largest > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * largest)


# The contract


def test_10_seconds_are_256_latents_of_128(tokenizer):
    latents = tokenizer.encode(noise(1, 163_840))
    assert latents.shape == (1, 256, 128)
    assert latents.dtype == torch.float32
    assert (tokenizer.sample_rate, tokenizer.hop_length) == (16_000, 160)


@pytest.mark.parametrize("num_samples", [1, 2559, 2560, 2561])
def test_any_length_is_zero_padded_to_whole_columns(tokenizer, num_samples):
    waveform = noise(1, num_samples)
    columns = num_columns(tokenizer, num_samples)
    latents = tokenizer.encode(waveform)
    assert latents.shape == (1, columns * tokenizer.tokens_per_column, tokenizer.latent_dim)
    missing = columns * tokenizer.samples_per_column - num_samples
    padded = torch.nn.functional.pad(waveform, (0, missing))
    assert torch.equal(latents, tokenizer.encode(padded))
    assert tokenizer.decode(latents).shape == padded.shape


def test_row_of_a_batch_equals_the_row_alone(tokenizer):
    waveforms = noise(3, 7680)
    latents = tokenizer.encode(waveforms)
    decoded = tokenizer.decode(latents)
    for row in range(3):
        assert_same(latents[row], tokenizer.encode(waveforms[row : row + 1])[0])
        # Griffin-Lim is not convex: rounding grows with its iterations.
        assert_same(decoded[row], tokenizer.decode(latents[row : row + 1])[0], 1e-3)


def test_encode_and_decode_repeat_exactly_whatever_the_global_seed(tokenizer):
    waveforms = noise(1, 5120)
    torch.manual_seed(1)
    latents = tokenizer.encode(waveforms)
    decoded = tokenizer.decode(latents)
    torch.manual_seed(2)
    assert torch.equal(latents, tokenizer.encode(waveforms))
    assert torch.equal(decoded, tokenizer.decode(latents))


@pytest.mark.parametrize("shape", [(1, 0, 128), (1, 5, 128), (1, 4, 127)])
def test_latents_that_are_not_whole_columns_are_refused(tokenizer, shape):
    with pytest.raises(ValueError, match=rf"multiple of 4, not \({shape[0]}, {shape[1]}, "):
        tokenizer.decode(torch.zeros(shape))


def test_name_is_its_key_and_loads_it(tokenizer):
    assert tokenizer.name in TOKENIZERS


def test_names_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"'vqvae' is unknown; use one of dct, audioldm"):
        load_tokenizer("vqvae")
    with pytest.raises(ValueError, match="no weights but got 'weights'"):
        load_tokenizer("dct:weights")
    with pytest.raises(ValueError, match="needs weights"):
        load_tokenizer("audioldm")


def test_importing_the_table_imports_neither_diffusers_nor_transformers():
    code = (
        "import sys, mllm_audio.tokenizers; print({'diffusers', 'transformers'} & {*sys.modules})"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "set()"


# Log-mel


def test_parity_of_log_mel_with_audioldm():
    fixture = np.load(FIXTURES / "audioldm_mel.npz")
    found = log_mel(torch.from_numpy(fixture["normalized"])[None])[0]
    expected = torch.from_numpy(fixture["mel_A"])
    print(f"log-mel, largest difference {float((found - expected).abs().max()):.1e} (limit 1e-05)")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_log_mel_of_too_short_a_waveform_is_refused():
    with pytest.raises(ValueError, match="got 432; pad the waveform to at least 433"):
        log_mel(torch.zeros(1, 432))


# DCT


def test_dct_is_orthonormal_and_equals_scipy():
    from scipy.fft import dct

    basis = dct_matrix(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16).double(), rtol=0, atol=1e-12)
    columns = dct(np.eye(16), norm="ortho", axis=0)
    torch.testing.assert_close(basis, torch.from_numpy(columns), rtol=0, atol=1e-12)


def test_zigzag_walks_the_diagonals():
    assert zigzag(3) == [0, 1, 3, 6, 4, 2, 5, 7, 8]
    assert sorted(zigzag(16)) == list(range(256))


def test_dct_with_every_coefficient_returns_the_log_mel():
    tokenizer = DCTTokenizer(DCTConfig(num_coefficients=256))
    waveforms = noise(2, 7680)
    decoded = tokenizer.decode_log_mel(tokenizer.encode(waveforms))
    torch.testing.assert_close(decoded, log_mel(waveforms), rtol=0, atol=2e-5)


def test_dct_tokens_run_through_the_bands_of_a_column_first():
    tokenizer = DCTTokenizer()
    means = log_mel(noise(1, 7680)).reshape(3, 16, 4, 16).mean(dim=(1, 3))  # (C, 4)
    latents = tokenizer.encode(noise(1, 7680))
    assert_same(latents[0, :, 0], 16 * means.flatten())


@pytest.mark.parametrize("frequency", [110.0, 220.0, 330.0, 440.0, 1000.0, 3000.0])
def test_dct_roundtrip_keeps_the_frequency_of_a_tone(frequency):
    tokenizer = DCTTokenizer()
    time = torch.arange(12_800) / 16_000
    tone = 0.5 * torch.sin(2 * math.pi * frequency * time)[None]
    decoded = tokenizer.decode(tokenizer.encode(tone))[0, 2560:-2560]
    spectrum = torch.fft.rfft(decoded * torch.hann_window(len(decoded)), n=1 << 16).abs()
    assert spectrum.argmax().item() * 16_000 / (1 << 16) == pytest.approx(frequency, rel=0.02)


def test_dct_decoding_reaches_the_log_mel_it_was_given():
    tokenizer = DCTTokenizer()
    time = torch.arange(25_600) / 16_000
    pulses = (torch.sin(2 * math.pi * (150 * time + 40 * time**2)) > 0.95).float()
    waveforms = 0.3 * (pulses - pulses.mean())[None] + 0.01 * noise(1, 25_600)
    latents = tokenizer.encode(waveforms)
    found = log_mel(tokenizer.decode(latents))
    assert (found - tokenizer.decode_log_mel(latents)).abs().mean() < 0.1
    assert (found - log_mel(waveforms)).abs().mean() < 0.2


def test_dct_decodes_silence_and_absurd_latents_to_finite_sound():
    tokenizer = DCTTokenizer(DCTConfig(num_iterations=4))
    silence = tokenizer.decode(tokenizer.encode(torch.zeros(1, 5120)))
    assert silence.abs().max() < 1e-3
    assert tokenizer.decode(1e4 * noise(1, 8, 128)).isfinite().all()


def test_dct_fingerprint_follows_what_changes_latents():
    assert DCTTokenizer().fingerprint == DCTTokenizer().fingerprint
    assert DCTTokenizer(DCTConfig(num_coefficients=64)).fingerprint != DCTTokenizer().fingerprint
    assert DCTTokenizer(DCTConfig(num_iterations=8)).fingerprint == DCTTokenizer().fingerprint


@pytest.mark.parametrize(
    "settings",
    [{"patch_size": 12}, {"num_coefficients": 257}, {"num_iterations": 0}, {"look_ahead": -1}],
)
def test_dct_settings_out_of_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DCTConfig(**settings)


# AudioLDM


def test_patchify_matches_mar_and_is_undone():
    maps = torch.arange(8 * 256 * 16).reshape(1, 8, 256, 16)
    expected = np.load(FIXTURES / "patchify_audio.npz")["tokens_of_arange_8_256_16"]
    tokens = patchify(maps)
    assert torch.equal(tokens, torch.from_numpy(expected).long())
    assert torch.equal(unpatchify(tokens, 4), maps)


def test_audioldm_is_the_published_networks_around_patches(audioldm_folder):
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan

    vae = AutoencoderKL.from_pretrained(audioldm_folder / "vae").eval()
    vocoder = SpeechT5HifiGan.from_pretrained(audioldm_folder / "vocoder").eval()
    tokenizer = AudioLDMTokenizer.from_pretrained(str(audioldm_folder))
    waveforms = noise(2, 7680)
    with torch.no_grad():
        maps = vae.encode(log_mel(waveforms)[:, None]).latent_dist.mean
        sound = vocoder(vae.decode(maps).sample[:, 0])
    latents = tokenizer.encode(waveforms)
    assert_same(latents, patchify(SCALING_FACTOR * maps))
    assert sound.shape == (2, 7680 + 32)
    assert_same(tokenizer.decode(latents), sound[:, :7680])


def test_audioldm_decodes_in_bfloat16_and_encodes_as_before(audioldm_folder):
    tokenizer = load_tokenizer(f"audioldm:{audioldm_folder}")
    waveforms = noise(1, 7680)
    latents = tokenizer.encode(waveforms)
    full = tokenizer.decode(latents)
    fingerprint = tokenizer.fingerprint
    tokenizer.decode_in(torch.bfloat16)
    sound = tokenizer.decode(latents)
    assert sound.dtype == torch.float32 and sound.shape == full.shape
    assert 0 < float((sound - full).norm() / full.norm()) < 0.1
    assert torch.equal(tokenizer.encode(waveforms), latents)
    assert tokenizer.fingerprint == fingerprint


def test_audioldm_draws_from_the_posterior_only_with_a_generator(audioldm_folder):
    tokenizer = load_tokenizer(f"audioldm:{audioldm_folder}")
    waveforms = noise(1, 2560)
    draws = [tokenizer.encode(waveforms, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], tokenizer.encode(waveforms))


def test_audioldm_fingerprint_follows_weights_and_configuration(audioldm_folder, tmp_path):
    original = load_tokenizer(f"audioldm:{audioldm_folder}").fingerprint
    shutil.copytree(audioldm_folder, tmp_path / "copy")
    config_path = tmp_path / "copy" / "vae" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "_diffusers_version": "0.0.1"}))
    assert load_tokenizer(f"audioldm:{tmp_path / 'copy'}").fingerprint == original
    config_path.write_text(json.dumps({**config, "scaling_factor": 0.9}))
    assert load_tokenizer(f"audioldm:{tmp_path / 'copy'}").fingerprint != original
    write_random_audioldm(tmp_path / "other", seed=1)
    assert load_tokenizer(f"audioldm:{tmp_path / 'other'}").fingerprint != original


def test_audioldm_refuses_pickled_weights_and_foreign_vocoders(audioldm_folder, tmp_path):
    shutil.copytree(audioldm_folder, tmp_path / "copy")
    config_path = tmp_path / "copy" / "vocoder" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "sampling_rate": 48_000}))
    with pytest.raises(ValueError, match=r"\(48000, 64, 160\)"):
        load_tokenizer(f"audioldm:{tmp_path / 'copy'}")
    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"has no vae/diffusion_pytorch_model\.safetensors"):
        load_tokenizer(f"audioldm:{tmp_path / 'copy'}")


def test_audioldm_that_is_no_folder_is_refused_on_one_line(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a hub id") as caught:
        load_tokenizer(f"audioldm:{tmp_path / 'missing'}")
    assert "\n" not in str(caught.value)


def test_missing_diffusers_says_what_to_install(monkeypatch, audioldm_folder):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'mllm-audio\[audioldm\]'"):
        load_tokenizer(f"audioldm:{audioldm_folder}")
