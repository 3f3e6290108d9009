"""What `mllm-audio info` prints."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mllm_audio.audiomar import AudioMAR, AudioMARConfig
from mllm_audio.backbone import build_backbone
from mllm_audio.build import count_parameters, special_tokenizer
from mllm_audio.generation.voice import Voice
from mllm_audio.model import AudioLanguageModel
from mllm_audio.models import Model
from mllm_audio.presets import PRESETS, RunConfig, get_preset
from mllm_audio.text import wordless_tokenizer


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
    origin = f"preset {name}, {text_side(config)}"
    return "\n".join([table(sketch(config), origin), *filter(None, [DISAGREEMENTS.get(name)])])


def text_side(config: RunConfig) -> str:
    """Say in words what a model has for text."""
    if config.audio.prompt_streams:
        return "prompted by embeddings; no text tokens or head"
    return "text tokens are bytes; a run adds its captions' words"


def sketch(config: RunConfig) -> Model:
    """Build a configuration's model without memory for its weights, on the meta device.

    Raises:
        ValueError: if the backbone is a trained language model's.
    """
    if config.backbone is None:
        raise ValueError(
            f"preset {config.preset!r} is for a trained language model, whose size it takes; type  "
            "mllm-audio add-voice BASE --out DIR, then  mllm-audio info DIR"
        )
    tokenizer = wordless_tokenizer() if config.audio.prompt_streams else special_tokenizer()
    with torch.device("meta"):
        if config.architecture == "audiomar":
            return AudioMAR(AudioMARConfig.like(config.backbone), config.audio)
        backbone = build_backbone(config.backbone, len(tokenizer))
        return AudioLanguageModel(backbone, config.audio)


# Where the paper's own numbers disagree, printed below the counts of these presets.
DISAGREEMENTS = {
    "audiomntp_base": "The paper's 193 M: with what MAR's code keeps and this model has no use for "
    "(decoder embedding, a second norm, a second table of positions) it would be 192.98 M.",
    "audiomntp_large": "The paper states 462 M and a head of 6 x 1024, which give 441.75 M "
    "(audiomntp_large_1024); a head of 6 x 1280, MAR-Large's, gives its 462 M, and is used here.",
    "audiomntp_large_1024": "The head of 6 x 1024 that the paper states gives 441.75 M, not the "
    "462 M that it states too; see audiomntp_large.",
}


def table(model: Model, origin: str) -> str:
    """Lay the parameter counts out, with the clip length and head in words."""
    audio = model.audio.config
    counts = count_components(model)
    width = max(map(len, counts))
    lines = [
        origin,
        f"{_kind(model)}; "
        f"{audio.head.name} head {audio.head.num_blocks} x {audio.head.width}; "
        f"{audio.tokenizer} tokens, clips to {audio.max_seconds:g} s = {audio.max_tokens} latents",
        *(f"{component:<{width}}  {count:>13,}" for component, count in counts.items()),
    ]
    return "\n".join(lines)


def count_components(model: Model) -> dict[str, int]:
    """Count parameters per part of the backbone and of the audio modules, then their "total"."""
    counts = count_parameters(model)
    if isinstance(model, AudioMAR):
        return counts
    del counts["backbone"]
    return {**_backbone_parts(model.backbone, model.silent), **counts}


def _kind(model: Model) -> str:
    """Name the architecture and its width."""
    if isinstance(model, AudioMAR):
        sizes = model.config
        return (
            f"AudioMAR of {sizes.encoder_layers} + {sizes.decoder_layers} blocks, width "
            f"{sizes.hidden_size}"
        )
    config = model.backbone.config
    return f"{config.model_type} backbone, width {config.hidden_size}"


def _backbone_parts(backbone: PreTrainedModel, silent: Collection[str]) -> dict[str, int]:
    """Tell blocks from what stands before and behind them; silent tables are no parameters."""
    text = backbone.get_input_embeddings().weight
    logits = {id(p) for p in backbone.get_output_embeddings().parameters()}
    counts: dict[str, int] = {}
    for name, parameter in backbone.named_parameters():
        if name in silent:
            continue
        if any(part.isdigit() for part in name.split(".")):
            part = "blocks"
        elif parameter is text:
            part = "text"
        elif id(parameter) in logits:
            part = "text_logits"
        else:
            part = "positions" if parameter.dim() == 2 else "final_norm"
        counts[f"backbone.{part}"] = counts.get(f"backbone.{part}", 0) + parameter.numel()
    return counts
