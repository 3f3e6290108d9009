"""Tango 2's sampler (Majumder et al. 2024, arXiv:2404.09956; Ghosal et al. 2023, 2304.13731).

FLAN-T5 states condition a UNet over the latents of AudioLDM's VAE; DDPM steps with classifier-free
guidance against the empty caption, then VAE and HiFi-GAN. No published pipeline class fits it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NUM_FRAMES = 256  # latent frames that it was trained on, and always makes


class Tango2:
    """Tango 2 as a peer; every network is where, and of the type, that it was loaded."""

    def __init__(
        self, tokenizer: Any, text_encoder: Any, unet: Any, vae: Any, vocoder: Any, scheduler: Any
    ) -> None:
        """Wrap T5's tokenizer and encoder, and diffusers' and transformers' AudioLDM parts."""
        self._tokenizer, self._text_encoder, self._unet = tokenizer, text_encoder, unet
        self._vae, self._vocoder, self._scheduler = vae, vocoder, scheduler
        factor = 2 ** (len(vae.config.block_out_channels) - 1)  # spectrogram values of one latent
        samples = NUM_FRAMES * factor * math.prod(vocoder.config.upsample_rates)
        self._shape = (unet.config.in_channels, NUM_FRAMES, vocoder.config.model_in_dim // factor)
        self.sample_rate: int = vocoder.config.sampling_rate
        self.max_seconds = samples / self.sample_rate

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        *,
        seconds: float,
        num_inference_steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
    ) -> Tensor:
        """Generate (B, S) waveforms: 256 latent frames, cut to `seconds`.

        A clip depends on its caption and seed alone, not on the others.

        Args:
            captions: B texts.
            seconds: at most `max_seconds`.
            num_inference_steps: DDPM steps.
            guidance_scale: 1 is no guidance: eps = eps_u + s (eps_c - eps_u).
            seeds: B, of the noise.
        """
        states, mask = self._encode(list(captions), length=None)  # (B, L, E), (B, L)
        is_guided = guidance_scale != 1
        if is_guided:
            null_states, null_mask = self._encode([""] * len(captions), length=states.shape[1])
            states, mask = torch.cat([null_states, states]), torch.cat([null_mask, mask])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        device = self._unet.device
        self._scheduler.set_timesteps(num_inference_steps, device=device)
        noise = torch.stack([torch.randn(self._shape, generator=g) for g in generators])
        latents = noise.to(device) * self._scheduler.init_noise_sigma  # (B, c, 256, bands) float32
        for timestep in self._scheduler.timesteps:
            rows = torch.cat([latents, latents]) if is_guided else latents
            rows = self._scheduler.scale_model_input(rows, timestep).to(self._unet.dtype)
            predicted = self._unet(
                rows, timestep, encoder_hidden_states=states, encoder_attention_mask=mask
            ).sample.float()
            if is_guided:
                null, conditional = predicted.chunk(2)
                predicted = null + guidance_scale * (conditional - null)
            latents = self._scheduler.step(
                predicted, timestep, latents, generator=generators
            ).prev_sample
        latents = (latents / self._vae.config.scaling_factor).to(self._vae.dtype)
        log_mel = self._vae.decode(latents).sample[:, 0]  # (B, F, bands)
        waveforms = self._vocoder(log_mel)  # (B, S)
        return waveforms[:, : round(seconds * self.sample_rate)].float().cpu()

    def _encode(self, texts: list[str], length: int | None) -> tuple[Tensor, Tensor]:
        """Encode texts to (B, L, E) states and their (B, L) bool mask, padded to `length`."""
        tokens = self._tokenizer(
            texts,
            padding="max_length" if length else True,
            max_length=length or self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._text_encoder.device)
        states = self._text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states.to(self._unet.dtype), tokens.attention_mask.bool()
