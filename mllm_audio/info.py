"""What `mllm-audio info` prints."""

from __future__ import annotations

from pathlib import Path

from mllm_audio.build import build_model, count_parameters, special_tokenizer
from mllm_audio.generation.voice import Voice
from mllm_audio.model import AudioLanguageModel
from mllm_audio.presets import PRESETS, get_preset


def describe(name: str, base: str | None = None) -> str:
    """Describe a run folder or a preset: components, parameter counts, what it makes.

    Raises:
        ValueError: if `name` is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        voice = Voice.load(folder, base)
        origin = f"run {folder}, {len(voice.text_tokenizer)} text tokens"
        return table(voice.model, origin)
    if name not in PRESETS:
        raise ValueError(
            f"found neither a folder nor a preset {name!r}; presets: {', '.join(PRESETS)}"
        )
    config = get_preset(name)
    if config.backbone is None:
        raise ValueError(
            f"preset {name!r} is for a trained language model, whose size it takes; type  "
            "mllm-audio add-voice BASE --out DIR, then  mllm-audio info DIR"
        )
    vocabulary = len(special_tokenizer())
    origin = f"preset {name}, {vocabulary} text tokens (bytes; a run adds its captions' words)"
    return table(build_model(config, vocabulary), origin)


def table(model: AudioLanguageModel, origin: str) -> str:
    """Lay the parameter counts out, with the clip length and head in words."""
    audio = model.audio.config
    counts = count_parameters(model)
    width = max(map(len, counts))
    lines = [
        origin,
        f"{model.backbone.config.model_type} backbone, width {model.backbone.config.hidden_size}; "
        f"{audio.head.name} head {audio.head.num_blocks} x {audio.head.width}; "
        f"{audio.tokenizer} tokens, clips to {audio.max_seconds:g} s = {audio.max_tokens} latents",
        *(f"{component:<{width}}  {count:>13,}" for component, count in counts.items()),
    ]
    return "\n".join(lines)
