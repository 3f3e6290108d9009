"""A training run on disk: prepared data and a configuration in, a voice folder out.

RUN holds the exported checkpoint itself (`config.json`, `model.safetensors`, the text tokenizer,
`audio_generation.json`), the resolved configuration (`run.json`), `log.jsonl`, `tensorboard/`
and `checkpoints/`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from mllm_audio.backbone import build_backbone
from mllm_audio.config import to_dict
from mllm_audio.data.dataset import TrainingData, prompt_ids, seeded
from mllm_audio.data.shards import PreparedClip, ShardIndex, load_split, read_index
from mllm_audio.generation.voice import Voice
from mllm_audio.masking import MaskingConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.presets import RunConfig
from mllm_audio.text import train_text_tokenizer
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.training.engine import SingleProcessEngine
from mllm_audio.training.trainer import train

RUN_FILE = "run.json"
# A resumed run may be lengthened or watched differently; anything else would make it another run.
MAY_CHANGE = {
    f"train.{key}"
    for key in (
        "num_steps",
        "max_minutes",
        "log_every",
        "validate_every",
        "save_every",
        "keep_checkpoints",
    )
}


def train_run(config: RunConfig, data: Path, out: Path) -> Voice:
    """Train on a folder that `prepare` wrote, resuming `out` if it holds the same run.

    Returns:
        The voice with averaged weights, as exported to `out`.

    Raises:
        ValueError: if data and configuration do not fit, or `out` holds another run.
    """
    index = read_index(data)
    clips, validation = load_split(data, "train"), load_split(data, "validation", verify=False)
    config = fit_to_data(config, index, clips + validation, data)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, config, index)
    voice = build_voice(config, index, clips)
    engine = SingleProcessEngine(
        voice.model, config.train.optim, config.train.ema_decay, config.train.precision
    )
    check_prompt_lengths(voice, clips + validation)
    training = TrainingData(
        clips=clips,
        text_tokenizer=voice.text_tokenizer,
        masking=config.masking,
        config=config.data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        end_of_audio=config.audio.end_of_audio,
    )
    unmasked = replace(
        training,
        clips=validation,
        masking=MaskingConfig(schedule="ntp"),
        config=replace(config.data, unconditional_share=0.0),
    )

    def export() -> None:
        voice.save(out, engine.ema.state_dict(voice.model))

    train(engine, training, unmasked if validation else None, config.train, out, export)
    return Voice.load(out)


def fit_to_data(
    config: RunConfig, index: ShardIndex, clips: list[PreparedClip], data: Path
) -> RunConfig:
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
    longest = max(clips, key=lambda clip: clip.num_tokens)
    if longest.num_tokens > config.audio.max_tokens:
        seconds = config.audio.max_seconds
        raise ValueError(
            f"{longest.name} has {longest.num_tokens} latents, the model takes audio.max_tokens="
            f"{config.audio.max_tokens}; set audio.max_tokens={longest.num_tokens}, or prepare "
            f"with --max-seconds {seconds:g}"
        )
    audio = replace(
        config.audio, tokenizer=tokenizer.spec, tokenizer_fingerprint=tokenizer.fingerprint
    )
    return replace(config, audio=audio)


def build_voice(config: RunConfig, index: ShardIndex, clips: list[PreparedClip]) -> Voice:
    """Build an untrained voice: text tokenizer from the captions, statistics from the index."""
    text_tokenizer = train_text_tokenizer(
        {caption for clip in clips for caption in clip.captions}, config.text_vocab_size
    )
    model = build_model(config, len(text_tokenizer))
    model.audio.set_statistics(torch.tensor(index.latent_mean), torch.tensor(index.latent_std))
    audio_tokenizer = load_tokenizer(config.audio.tokenizer)
    return Voice(model, text_tokenizer, audio_tokenizer, config.generation)


def build_model(config: RunConfig, vocab_size: int) -> AudioLanguageModel:
    """Build the model of a configuration with weights drawn from `train.seed`."""
    torch.manual_seed(seeded("weights", config.train.seed).initial_seed())
    return AudioLanguageModel(build_backbone(config.backbone, vocab_size), config.audio)


def check_prompt_lengths(voice: Voice, clips: list[PreparedClip]) -> None:
    """Refuse captions that leave no room for the longest clip among the backbone's positions."""
    audio: AudioConfig = voice.model.audio.config
    room = voice.model.backbone.config.max_position_embeddings - audio.max_tokens - 2
    captions = {caption for clip in clips for caption in clip.captions}
    longest = max(captions, key=lambda caption: len(prompt_ids(voice.text_tokenizer, caption)))
    length = len(prompt_ids(voice.text_tokenizer, longest))
    if length > room:
        needed = length + audio.max_tokens + 2
        raise ValueError(
            f"the caption {longest[:60]!r} has {length} text tokens, room is for {room}; "
            f"set backbone.max_positions={needed}"
        )


def claim(out: Path, config: RunConfig, index: ShardIndex) -> None:
    """Write RUN/run.json, or check that the run already there is this one.

    Raises:
        ValueError: naming the first settings that differ.
    """
    path = out / RUN_FILE
    data = [shard.sha256 for shard in index.shards]
    values = json.loads(json.dumps({**to_dict(config), "data_sha256": data}))
    if path.is_file():
        before, now = flat(json.loads(path.read_text())), flat(values)
        differ = [
            k for k in sorted(before | now) if before.get(k) != now.get(k) and k not in MAY_CHANGE
        ]
        if differ:
            shown = ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in differ[:3])
            raise ValueError(
                f"{out} holds another run ({shown}); type another --out, or delete that folder"
            )
    path.write_text(json.dumps(values, indent=2) + "\n")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to `section.key` names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters per component, and their sum under "total"; shared ones count once."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        head, _, rest = name.partition(".")
        component = f"{head}.{rest.split('.')[0]}" if head == "audio" else head
        counts[component] = counts.get(component, 0) + parameter.numel()
    counts["total"] = sum(counts.values())
    return counts


def special_tokenizer() -> PreTrainedTokenizerBase:
    """Make the text tokenizer of a corpus without captions: bytes and the special tokens."""
    return train_text_tokenizer([""])
