"""AudioLDM's VAE and HiFi-GAN as a tokenizer: 4x4 patches of VAE latents.

Liu et al. 2023 (arXiv:2301.12503), the tokenizer of Yang et al. 2025 (arXiv:2507.09834). Weights
are read from the layout of the `cvssp/audioldm*` repositories: folders `vae` and `vocoder`, each
with a `config.json` and safetensors. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mllm_audio.tokenizers import mel
from mllm_audio.tokenizers.base import AS_RECOMMENDED, StreamConfig
from mllm_audio.tokenizers.windows import WindowedDecoder

PATCH_SIZE = 4  # VAE latent frames, and bands, of one token
FILES = {  # what a checkpoint must hold, by subfolder
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "vocoder": ("config.json", "model.safetensors"),
}


class AudioLDMTokenizer:
    """Log-mel -> VAE -> patches, and patches -> VAE -> HiFi-GAN.

    The networks follow the device of their input.
    """

    name = "audioldm"
    weights_license = "CC-BY-NC-SA-4.0"
    sample_rate = mel.SAMPLE_RATE
    hop_length = mel.HOP_LENGTH
    decode_context = 4  # columns; the VAE's attention sees the whole clip, so no number is exact

    def __init__(self, vae: Any, vocoder: Any, weights_hash: str) -> None:
        """Wrap a `diffusers.AutoencoderKL` and a `transformers.SpeechT5HifiGan`.

        Raises:
            ValueError: if either was not built for AudioLDM's log-mel.
        """
        hop_length = math.prod(vocoder.config.upsample_rates)
        found = (vocoder.config.sampling_rate, vocoder.config.model_in_dim, hop_length)
        expected = (mel.SAMPLE_RATE, mel.NUM_BANDS, mel.HOP_LENGTH)
        if found != expected:
            raise ValueError(
                f"the vocoder has (sample rate, bands, hop) {found} but AudioLDM's log-mel has "
                f"{expected}; use a 16 kHz AudioLDM vocoder"
            )
        self._vae = vae.eval().requires_grad_(False)
        self._vocoder = vocoder.eval().requires_grad_(False)
        self._decode_dtype = torch.float32
        self._weights_hash = weights_hash
        self._scaling_factor = float(vae.config.scaling_factor)  # differs between checkpoints
        frames = 2 ** (len(vae.config.block_out_channels) - 1) * PATCH_SIZE  # of one column
        self.latent_dim = vae.config.latent_channels * PATCH_SIZE**2
        self.tokens_per_column = mel.NUM_BANDS // frames
        self.samples_per_column = frames * mel.HOP_LENGTH

    @classmethod
    def from_pretrained(cls, source: str) -> AudioLDMTokenizer:
        """Load `source`, a folder, or a hub id to download `vae` and `vocoder` from.

        Raises:
            ImportError: if diffusers is not installed.
            ValueError: if `source` is neither, or lacks a configuration or safetensors.
        """
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError(
                f"tokenizer 'audioldm' needs diffusers ({error}); "
                "run: pip install 'mllm-audio[audioldm]'"
            ) from error
        from transformers import SpeechT5HifiGan

        folder = _find_checkpoint(source)
        options: dict[str, Any] = {
            "use_safetensors": True,
            "local_files_only": True,
            "torch_dtype": torch.float32,
        }
        vae = AutoencoderKL.from_pretrained(folder / "vae", **options)
        options["dtype"] = options.pop("torch_dtype")  # transformers' newer name for it
        vocoder = SpeechT5HifiGan.from_pretrained(folder / "vocoder", **options)
        return cls(vae, vocoder, _hash_checkpoint(folder))

    @property
    def fingerprint(self) -> str:
        """Short hash of the log-mel, the patches, both configurations and both sets of weights."""
        settings = {"name": self.name, "patch_size": PATCH_SIZE, "mel": mel.settings()}
        text = json.dumps(settings, sort_keys=True) + self._weights_hash
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def encode(self, waveforms: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode (B, S) float32 waveforms to (B, N, D) latents, S zero-padded to whole columns.

        Latents are the mean of the VAE's posterior, or with a `generator` a draw from it.
        """
        padded = functional.pad(waveforms, (0, -waveforms.shape[-1] % self.samples_per_column))
        log_mel = mel.log_mel(padded)[:, None]  # (B, 1, F, 64)
        posterior = self._vae.to(padded.device).encode(log_mel).latent_dist
        maps = posterior.mean if generator is None else posterior.sample(generator)
        return patchify(maps * self._scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode (B, N, D) latents to (B, C * samples_per_column) samples.

        Raises:
            ValueError: if N is not a whole number of columns, or D is not `latent_dim`.
        """
        _, num_tokens, dim = latents.shape
        if num_tokens == 0 or num_tokens % self.tokens_per_column or dim != self.latent_dim:
            raise ValueError(
                f"this tokenizer decodes (B, N, {self.latent_dim}) latents with N a positive "
                f"multiple of {self.tokens_per_column}, not {tuple(latents.shape)}; "
                "pass whole columns"
            )
        maps = unpatchify(latents.float(), self.tokens_per_column) / self._scaling_factor
        maps = maps.to(self._decode_dtype)
        log_mel = self._vae.to(maps.device).decode(maps).sample[:, 0]  # (B, F, 64)
        waveforms = self._vocoder.to(maps.device)(log_mel).float()  # (B, F * 160 + 32)
        return waveforms[:, : num_tokens // self.tokens_per_column * self.samples_per_column]

    def decode_in(self, dtype: torch.dtype) -> None:
        """Hold what decodes, the VAE's decoder and the vocoder, in `dtype`; `encode` stays float32.

        A narrow type is laid out with channels last, 1.3 times as fast on a CPU; float32 would lose
        a digit by it.
        """
        layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        self._decode_dtype = dtype
        for network in (self._vae.post_quant_conv, self._vae.decoder, self._vocoder):
            if network is not None:
                network.to(dtype=dtype, memory_format=layout)

    def stream(self, config: StreamConfig = AS_RECOMMENDED) -> WindowedDecoder:
        """Begin to decode latents that arrive in time; the samples are near those of `decode`.

        Windows are `decode_context` columns, the chunk's and those ahead: by default 4, 2 and 2.
        """
        chunk_columns, look_ahead = config.chunk_columns, config.look_ahead
        return WindowedDecoder(
            self.decode,
            tokens_per_column=self.tokens_per_column,
            samples_per_column=self.samples_per_column,
            sample_rate=self.sample_rate,
            chunk_columns=2 if chunk_columns is None else chunk_columns,
            context=self.decode_context,
            look_ahead=2 if look_ahead is None else look_ahead,
        )


def patchify(maps: Tensor) -> Tensor:
    """Cut (B, c, time, bands) maps into (B, N, c * 16) tokens, a column's bands together.

    The channel of a token is c * 16 + dt * 4 + df, as in MAR (Li et al. 2024, arXiv:2406.11838).
    """
    patches = maps.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, tokens_per_column: int) -> Tensor:
    """Undo `patchify`: (B, N, c * 16) tokens to (B, c, time, bands) maps."""
    grid = tokens.unflatten(1, (-1, tokens_per_column)).unflatten(3, (-1, PATCH_SIZE, PATCH_SIZE))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _find_checkpoint(source: str) -> Path:
    """Return the folder of `source`, downloaded if it is a hub id, with all of `FILES` in it."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source)
    for part, names in FILES.items():
        for name in names:
            if not (folder / part / name).is_file():
                raise ValueError(
                    f"{source} has no {part}/{name}; expected a folder or hub id in the layout "
                    "of cvssp/audioldm with safetensors (pickled weights are refused)"
                )
    return folder


def _download(source: str) -> Path:
    """Fetch `FILES` of a hub repository into the cache."""
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/{name}" for part, names in FILES.items() for name in names]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    # Bad ids are ValueErrors, missing repositories and networks are OSErrors (httpx's are not).
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"tokenizer weights {source!r} are neither a folder nor a hub id that can be "
            f"downloaded ({type(error).__name__}: {reason}); check the path or the network"
        ) from error


def _hash_checkpoint(folder: Path) -> str:
    """Hash configurations, less the versions of the libraries that wrote them, and weights."""
    digest = hashlib.sha256()
    for part, (config_name, weights_name) in FILES.items():
        config = json.loads((folder / part / config_name).read_text())
        written_by = {key for key in config if key.startswith("_") or key.endswith("_version")}
        config = {key: value for key, value in config.items() if key not in written_by}
        digest.update(json.dumps(config, sort_keys=True).encode())
        with (folder / part / weights_name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
