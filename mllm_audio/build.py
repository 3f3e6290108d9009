"""A configuration and prepared data to an untrained voice, or one line on why they do not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from mllm_audio.audiomar import AudioMAR, AudioMARConfig
from mllm_audio.backbone import build_backbone
from mllm_audio.data.dataset import prompt_ids, seeded
from mllm_audio.data.shards import ShardIndex
from mllm_audio.generation.voice import Voice
from mllm_audio.interop import InitReport, load_audiomar_blocks, load_image_mar
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel, default_device
from mllm_audio.models import Model
from mllm_audio.presets import RunConfig
from mllm_audio.text import train_text_tokenizer, wordless_tokenizer
from mllm_audio.tokenizers import load_tokenizer


def fit_to_data(config: RunConfig, index: ShardIndex, data: Path | str) -> RunConfig:
    """Take from the data what the data decides, and refuse what does not fit it."""
    tokenizer = index.tokenizer
    for key in ("latent_dim", "tokens_per_column"):
        found, expected = getattr(tokenizer, key), getattr(config.audio, key)
        if found != expected:
            raise ValueError(
                f"{data} holds {tokenizer.spec} latents with {key} {found}, audio.{key} is "
                f"{expected}; set audio.{key}={found}, "
                f"or prepare again with another tokenizer"
            )
    if index.longest_clip > config.audio.max_tokens:
        seconds = config.audio.max_seconds
        raise ValueError(
            f"{index.longest_clip_name} has {index.longest_clip} latents, the model takes "
            f"audio.max_tokens={config.audio.max_tokens}; set audio.max_tokens="
            f"{index.longest_clip}, or prepare with --max-seconds {seconds:g}"
        )
    audio = replace(
        config.audio, tokenizer=tokenizer.spec, tokenizer_fingerprint=tokenizer.fingerprint
    )
    return replace(config, audio=_fit_prompts(audio, index, data))


def _fit_prompts(audio: AudioConfig, index: ShardIndex, data: Path | str) -> AudioConfig:
    """Take the conditioner from the data, with the widths of its streams; leave out others."""
    if not audio.prompt_streams:
        return audio
    wanted = [stream.name for stream in audio.prompt_streams]
    info = index.conditioner
    found = {} if info is None else {stream.name: stream for stream in info.streams}
    if info is None or not set(wanted) <= found.keys():
        sources = ",".join(f"{name}=FOLDER" for name in wanted)
        raise ValueError(
            f"{data} holds prompts of {', '.join(found) or 'no conditioner'}, the model takes "
            f"{' and '.join(wanted)}; type the `mllm-audio prepare` command of {data} again with "
            f"--conditioner clap_t5:{sources}"
        )
    return replace(
        audio,
        conditioner=info.spec,
        conditioner_fingerprint=info.fingerprint,
        prompt_streams=tuple(found[name] for name in wanted),
    )


def build_voice(config: RunConfig, index: ShardIndex, captions: Iterable[str]) -> Voice:
    """Build an untrained voice: text tokenizer from the captions, statistics from the index.

    A model that is prompted by embeddings has no text but the special tokens.
    """
    if config.audio.prompt_streams:
        text_tokenizer = wordless_tokenizer()
    else:
        text_tokenizer = train_text_tokenizer(set(captions), config.text_vocab_size)
    return join(config, index, build_model(config, len(text_tokenizer)), text_tokenizer)


def build_voice_on(config: RunConfig, index: ShardIndex) -> Voice:
    """Build an untrained voice on the trained language model `config.base`."""
    assert config.base is not None
    seed_weights(config)
    model = AudioLanguageModel.from_backbone(config.base, config.audio, config.adapt)
    assert model.text_tokenizer is not None
    return join(config, index, model.to(default_device()), model.text_tokenizer)


def join(
    config: RunConfig,
    index: ShardIndex,
    model: Model,
    text_tokenizer: PreTrainedTokenizerBase,
) -> Voice:
    """Join a model to its two tokenizers, with the statistics of the data.

    Raises:
        ValueError: if the audio tokenizer is not the one that made the data.
    """
    model.audio.set_statistics(torch.tensor(index.latent_mean), torch.tensor(index.latent_std))
    audio_tokenizer = load_tokenizer(config.audio.tokenizer)
    seconds = audio_tokenizer.samples_per_column / audio_tokenizer.sample_rate
    if audio_tokenizer.fingerprint != index.tokenizer.fingerprint:
        raise ValueError(
            f"the data was prepared with {config.audio.tokenizer} of fingerprint "
            f"{index.tokenizer.fingerprint}, found {audio_tokenizer.fingerprint}; restore that "
            "tokenizer, or prepare again"
        )
    if abs(seconds - config.audio.column_seconds) > 1e-6:
        raise ValueError(
            f"a column of {config.audio.tokenizer} lasts {seconds:g} s, audio.column_seconds is "
            f"{config.audio.column_seconds:g}; set audio.column_seconds={seconds:g}"
        )
    return Voice(model, text_tokenizer, audio_tokenizer, config.generation)


def build_model(config: RunConfig, vocab_size: int) -> Model:
    """Build the model of a configuration with weights drawn from `train.seed`."""
    assert config.backbone is not None
    seed_weights(config)
    if config.architecture == "audiomar":
        sizes = AudioMARConfig.like(config.backbone)
        return AudioMAR(sizes, config.audio).to(default_device())
    model = AudioLanguageModel(build_backbone(config.backbone, vocab_size), config.audio)
    return model.to(default_device())


STARTS = {"image_mar": load_image_mar, "audiomar": load_audiomar_blocks}  # by RunConfig.init
SOURCES = {
    "image_mar": "MAR's image weights; type init_from=CHECKPOINT.pth (mar_base or mar_large of "
    "github.com/LTH14/mar)",
    "audiomar": "a trained AudioMAR; type init_from=RUN, of --preset audiomar_base",
}


def start_blocks(config: RunConfig, model: Model) -> InitReport | None:
    """Give a model the blocks that its configuration starts from; None leaves random ones.

    Raises:
        ValueError: if the file or folder is not named, or does not fit.
    """
    if config.init == "random":
        return None
    if config.init_from is None:
        raise ValueError(
            f"preset {config.preset} starts from {SOURCES[config.init]}, or init=random"
        )
    return STARTS[config.init](model, config.init_from)


def seed_weights(config: RunConfig) -> None:
    """Seed torch's global random state for the initial weights."""
    torch.manual_seed(seeded("weights", config.train.seed).initial_seed())


def check_prompt_lengths(voice: Voice, captions: Iterable[str]) -> None:
    """Refuse captions that leave no room for the longest clip among the backbone's positions."""
    audio: AudioConfig = voice.model.audio.config
    if audio.prompt_streams:  # of one length
        return
    room = voice.decoder.backbone.config.max_position_embeddings - audio.max_tokens - 2
    # A token is a byte of the normalised text at least: only longer captions can have too many.
    normalised = voice.text_tokenizer.backend_tokenizer.normalizer.normalize_str
    longer = (caption for caption in captions if len(f" {normalised(caption)}".encode()) > room)
    length, longest = max(
        ((len(prompt_ids(voice.text_tokenizer, caption)), caption) for caption in longer),
        default=(0, ""),
    )
    if length > room:
        needed = length + audio.max_tokens + 2
        raise ValueError(
            f"the caption {longest[:60]!r} has {length} text tokens, room is for {room}; "
            f"set backbone.max_positions={needed}"
        )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters per component, and their sum under "total"; shared ones count once."""
    counts: dict[str, int] = {}
    silent = {f"backbone.{name}" for name in getattr(model, "silent", ())}
    for name, parameter in model.named_parameters():
        if name in silent:
            continue
        head, _, rest = name.partition(".")
        component = f"{head}.{rest.split('.')[0]}" if head == "audio" else head
        counts[component] = counts.get(component, 0) + parameter.numel()
    counts["total"] = sum(counts.values())
    return counts


def special_tokenizer() -> PreTrainedTokenizerBase:
    """Make the text tokenizer of a corpus without captions: bytes and the special tokens."""
    return train_text_tokenizer([""])
