"""Recordings in a conversation to the latents that a model hears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_audio import wav
from mllm_audio.modality import AudioConfig
from mllm_audio.tokenizers.base import AudioTokenizer
from mllm_audio.types import Clip


def hear(audio: Any, tokenizer: AudioTokenizer, config: AudioConfig) -> Tensor:
    """Encode a recording as `prepare` does, its level normalised.

    Args:
        audio: path of a sound file, a `Clip`, or (N, D) latents, which are taken as they are.
        tokenizer: that the model was trained with.
        config: of the model.

    Returns:
        (N, D) float32 latents on the CPU, whole columns.

    Raises:
        ValueError: if it is none of these, holds no sound, or is longer than the model hears.
    """
    if isinstance(audio, Tensor):
        return _checked(audio.detach().float().cpu(), config)
    if isinstance(audio, (str, Path)):
        _check_seconds(str(audio), wav.info(audio).seconds, config)
        name, clip = str(audio), wav.read(audio, tokenizer.sample_rate)
    elif isinstance(audio, Clip):
        name, clip = "the clip", audio
        if clip.waveform.dim() != 1 or not bool(clip.waveform.isfinite().all()):
            raise ValueError("the clip's waveform is not (S,) finite samples; pass one channel")
        _check_seconds(name, len(clip.waveform) / clip.sample_rate, config)
    else:
        raise ValueError(
            f"found {type(audio).__name__} as audio, expected a path, a Clip or (N, D) latents"
        )
    waveform = clip.waveform.float().cpu()
    waveform = wav.resample(waveform, clip.sample_rate, tokenizer.sample_rate)  # (S,)
    if not len(waveform):
        raise ValueError(f"{name} holds no samples; record it again")
    with torch.inference_mode():
        latents = tokenizer.encode(wav.normalize_level(waveform)[None])[0].cpu()  # (N, D)
    return _checked(latents, config)


def _check_seconds(name: str, seconds: float, config: AudioConfig) -> None:
    """Refuse a recording that the model has no positions for, before all of it is read."""
    if seconds > config.max_seconds + 1e-6:
        raise ValueError(
            f"{name} lasts {seconds:.2f} s, this model hears at most {config.max_seconds:g} s "
            f"(audio.max_tokens={config.max_tokens}); cut it, or train with more"
        )


def _checked(latents: Tensor, config: AudioConfig) -> Tensor:
    """Refuse latents that the model has no positions for, or that are no latents."""
    columns, rest = divmod(len(latents), config.tokens_per_column) if latents.dim() else (0, 1)
    if latents.dim() != 2 or latents.shape[1] != config.latent_dim or rest or not columns:
        raise ValueError(
            f"found latents of shape {tuple(latents.shape)}, expected (N, {config.latent_dim}) "
            f"with N a multiple of {config.tokens_per_column}"
        )
    if not bool(latents.isfinite().all()):
        raise ValueError("found latents that are not finite; encode the recording again")
    _check_seconds("audio given as latents", columns * config.column_seconds, config)
    return latents
