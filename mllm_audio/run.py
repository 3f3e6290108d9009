"""A training run on disk: prepared data and a configuration in, a voice folder out.

RUN holds the exported checkpoint itself (`config.json`, `model.safetensors`, the text tokenizer,
`audio_generation.json`), the resolved configuration (`run.json`), `log.jsonl`, `tensorboard/`
and `checkpoints/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from mllm_audio.backbone import build_backbone
from mllm_audio.config import read_json, to_dict
from mllm_audio.data.dataset import TrainingData, prompt_ids, seeded
from mllm_audio.data.shards import PreparedClip, ShardIndex, load_split, read_index
from mllm_audio.files import write_atomic
from mllm_audio.generation.voice import Voice
from mllm_audio.masking import MaskingConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.model import AudioLanguageModel, default_device
from mllm_audio.presets import RunConfig
from mllm_audio.text import train_text_tokenizer
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.training.engine import SingleProcessEngine
from mllm_audio.training.trainer import train

RUN_FILE = "run.json"
# A resumed run may be lengthened, watched or sampled differently, or continued past numbers that
# stopped it; anything else would make it another run.
MAY_CHANGE = (
    "generation.",
    "train.num_steps",
    "train.max_minutes",
    "train.log_every",
    "train.validate_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.max_abs_latent",
    "train.optim.lr",
)


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
    voice = build_voice(config, index, clips)
    check_prompt_lengths(voice, clips + validation)
    engine = SingleProcessEngine(
        voice.model, config.train.optim, config.train.ema_decay, config.train.precision
    )
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

    out.mkdir(parents=True, exist_ok=True)
    with claimed(out, config, index):
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


def build_model(config: RunConfig, vocab_size: int) -> AudioLanguageModel:
    """Build the model of a configuration with weights drawn from `train.seed`."""
    torch.manual_seed(seeded("weights", config.train.seed).initial_seed())
    model = AudioLanguageModel(build_backbone(config.backbone, vocab_size), config.audio)
    return model.to(default_device())


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


@contextmanager
def claimed(out: Path, config: RunConfig, index: ShardIndex) -> Iterator[None]:
    """Hold RUN for this process, with RUN/run.json written or checked to be this run.

    Raises:
        ValueError: if another process is training there, or naming the settings that differ.
    """
    path = out / RUN_FILE
    shards = "".join(shard.sha256 for shard in index.shards)
    digest = hashlib.sha256(shards.encode()).hexdigest()
    values = json.loads(json.dumps({**to_dict(config), "data_sha256": digest}))
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {out}; wait for it, or type another --out"
            ) from error
        if path.is_file():
            before, now = flat(read_json(path, "type another --out")), flat(values)
            differ = [
                key
                for key in sorted(before | now)
                if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
            ]
            if differ:
                shown = ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in differ[:3])
                raise ValueError(
                    f"{out} holds another run ({shown}); type another --out, or delete that folder"
                )
        write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())
        yield


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
