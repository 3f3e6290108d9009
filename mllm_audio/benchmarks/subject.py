"""What is measured: a preset with random weights, or a run; and prompts for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mllm_audio.benchmarks.decode import load
from mllm_audio.build import build_model, count_parameters, special_tokenizer
from mllm_audio.data.dataset import seeded
from mllm_audio.data.layout import Prompt, Text
from mllm_audio.generation.prompts import caption_ids
from mllm_audio.generation.voice import Voice
from mllm_audio.presets import PRESETS, RunConfig, get_preset
from mllm_audio.text import wordless_tokenizer

CAPTION = "rain on a tin roof"  # of models that read text
PROMPT_ROOM = 96  # text ids that fit beside the longest clip of a model that is built longer


@dataclass(frozen=True)
class Subject:
    """A voice that is measured."""

    name: str  # the preset, or the run's folder
    voice: Voice
    is_random: bool  # its weights, so its latents are no sound

    @property
    def num_parameters(self) -> int:
        """Count parameters, silent tables left out."""
        return count_parameters(self.voice.model)["total"]


@contextmanager
def num_threads(count: int | None) -> Iterator[int]:
    """Let torch use `count` threads, None as many as it would; give the number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def known_preset(name: str) -> RunConfig:
    """Look up a preset whose size is known.

    Raises:
        ValueError: if there is no such preset, or it takes the size of a language model.
    """
    config = get_preset(name)
    if config.backbone is None:
        sized = [key for key, preset in PRESETS.items() if preset().backbone is not None]
        raise ValueError(
            f"preset {name!r} takes the size of a trained language model; name a RUN that "
            f"add-voice wrote, or --preset {' or '.join(sized)}"
        )
    return config


def load_subject(
    preset: str | None,
    run: Path | None,
    base: str | None = None,
    tokenizer: str | None = None,
    seconds: float | None = None,
) -> Subject:
    """Build a preset with random weights, or load a run.

    Args:
        preset: name, or None.
        run: folder, or None.
        base: where the base model of a run's adapter is now, if it moved.
        tokenizer: spec for `decode.load`; None: the run's or the preset's own.
        seconds: the longest clip to come; a preset is built for it, if its own are shorter.

    Raises:
        ValueError: unless one of preset and run is named, or if the tokenizer does not fit.
    """
    if (preset is None) == (run is None):
        found = "neither" if run is None else f"both --preset {preset} and the run {run}"
        raise ValueError(f"found {found}, expected a --preset NAME or a RUN folder, one of them")
    if run is not None:
        voice, name = Voice.load(run, base), str(run)
    else:
        name, voice = str(preset), _random_voice(lengthened(known_preset(str(preset)), seconds))
    if tokenizer is not None:
        voice = replace(voice, audio_tokenizer=load(tokenizer))
    audio = voice.model.audio.config
    for key in ("latent_dim", "tokens_per_column"):
        found, expected = getattr(voice.audio_tokenizer, key), getattr(audio, key)
        if found != expected:
            raise ValueError(
                f"tokenizer {tokenizer} has {key} {found}, {name} has {expected}; "
                "name a --tokenizer that makes such latents, or none"
            )
    voice.model.eval()
    return Subject(name, voice, is_random=run is None)


def lengthened(config: RunConfig, seconds: float | None) -> RunConfig:
    """Give a configuration the positions for clips of so many seconds, if it has fewer."""
    audio, backbone = config.audio, config.backbone
    assert backbone is not None
    if seconds is None or seconds <= audio.max_seconds:
        return config
    columns = math.ceil(seconds / audio.column_seconds - 1e-6)
    num_tokens = columns * audio.tokens_per_column
    positions = num_tokens + 2 + max(PROMPT_ROOM, audio.prompt_length)
    return replace(
        config,
        audio=replace(audio, max_tokens=num_tokens),
        backbone=replace(backbone, max_positions=max(positions, backbone.max_positions)),
    )


def _random_voice(config: RunConfig) -> Voice:
    """Build an untrained voice."""
    wordless = bool(config.audio.prompt_streams)
    text_tokenizer = wordless_tokenizer() if wordless else special_tokenizer()
    model = build_model(config, len(text_tokenizer))
    fill_zeros(model.audio.head)
    return Voice(model, text_tokenizer, load(config.audio.tokenizer), config.generation)


@torch.no_grad()
def fill_zeros(head: object) -> None:
    """Draw the matrices that training starts at zero: GPUs multiply zeros faster than numbers."""
    assert isinstance(head, nn.Module)
    for parameter in head.parameters():
        if parameter.dim() == 2 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)


def prompt_part(voice: Voice) -> Text | Prompt:
    """Make a prompt: embeddings are random, as no conditioner is measured here."""
    streams = voice.model.audio.config.prompt_streams
    if not streams:
        as_request = voice.defaults.as_request
        return Text(caption_ids(voice.text_tokenizer, CAPTION, as_request=as_request))
    generator = seeded("benchmark prompt")
    return Prompt(tuple(torch.randn(s.length, s.dim, generator=generator) for s in streams))
