"""A voice for a trained language model: the audio modules beside it, and their training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mllm_audio import backbone as backbones
from mllm_audio.build import build_voice_on, fit_to_data, seed_weights
from mllm_audio.claim import RUN_FILE
from mllm_audio.data.clips import PreparedClip
from mllm_audio.data.conversations import (
    CONVERSATIONS,
    has_conversations,
    load_clips,
    load_conversations,
)
from mllm_audio.data.dataset import RowSource
from mllm_audio.data.shards import ShardIndex, read_index
from mllm_audio.data.sources import ClipConversations, ConversationSource, TextSource
from mllm_audio.data.template import end_of_reply
from mllm_audio.evaluation.perplexity import (
    DRIFT_FILE,
    Perplexity,
    TextDrift,
    perplexity,
    read_texts,
)
from mllm_audio.files import file_sha256
from mllm_audio.generation.voice import Voice
from mllm_audio.model import AudioLanguageModel, default_device
from mllm_audio.presets import RunConfig
from mllm_audio.pretrained import load_backbone, load_text_tokenizer
from mllm_audio.run import Sources, data_facts, train_voice
from mllm_audio.tokenizers import load_tokenizer
from mllm_audio.training.checkpoint import list_checkpoints
from mllm_audio.training.cluster import Cluster

WINDOW_TOKENS = 1024  # of held-out text at most: the logits of a window are in memory at once
REPLAY_TOKENS = 128  # of a block of replayed text: about as long as a conversation


def add_voice(config: RunConfig, out: Path) -> Voice:
    """Write the untrained voice of `config.base` to `out`.

    Raises:
        ValueError: if `out` holds something else, or the base is no decoder.
    """
    _check_empty(out)
    assert config.base is not None
    seed_weights(config)
    audio_tokenizer = load_tokenizer(config.audio.tokenizer)
    model = AudioLanguageModel.from_backbone(config.base, config.audio, config.adapt)
    assert model.text_tokenizer is not None
    voice = Voice(model, model.text_tokenizer, audio_tokenizer, config.generation)
    voice.save(out)
    return voice


def train_added_voice(
    config: RunConfig,
    data: Path,
    out: Path,
    *,
    replay: Path | None = None,
    held_out: Path | None = None,
    cluster: Cluster | None = None,
) -> TextDrift | None:
    """Train a voice on `config.base` with a folder that `prepare` wrote, or resume `out`.

    Args:
        config: with `base` and `adapt`.
        data: prepared conversations, or captions, which become requests answered with a sound.
        out: folder of the run.
        replay: JSON lines of text mixed into training, `data.replay_share` of each batch.
        held_out: text to measure the perplexity on, before and after.
        cluster: who trains together.

    Returns:
        The text drift where `held_out` was given, in the first process; it is also in
        RUN/text_drift.json.

    Raises:
        ValueError: if data, base and configuration do not fit, or `out` holds another run.
    """
    if (out / "config.json").is_file() and not list_checkpoints(out):
        raise ValueError(f"{out} holds a voice and no training to resume; type another --out")
    texts = None if held_out is None else read_texts(held_out)
    if held_out is not None and not "".join(texts or []).strip():
        raise ValueError(f"found no text in {held_out}; expected some sentences")
    if replay is not None and config.data.replay_share == 0:
        raise ValueError("found a replay file and data.replay_share=0; set it above 0")
    index = read_index(data)
    clips = load_clips(data)
    config = fit_to_data(config, index, data)
    voice = build_voice_on(config, index)
    sources = conversation_sources(voice, data, clips, replay)
    facts = _facts(voice, index, data, replay)
    train_voice(config, voice, sources, out, facts, cluster)
    if cluster is not None and not cluster.world.is_first:
        return None  # the first process reports
    if texts is None:
        (out / DRIFT_FILE).unlink(missing_ok=True)  # of earlier weights
        return None
    assert config.base is not None
    drift = TextDrift(
        base=base_perplexity(config.base, texts), voice=voice_perplexity(Voice.load(out), texts)
    )
    drift.write(out)
    return drift


def conversation_sources(
    voice: Voice, data: Path, clips: dict[str, PreparedClip], replay: Path | None
) -> Sources:
    """Read the rows of a prepared folder and the replayed text."""
    tokenizer = voice.text_tokenizer
    limit = voice.decoder.backbone.config.max_position_embeddings

    if end_of_reply(tokenizer) is None:
        raise ValueError(
            "the chat template ends a reply with no special token, so the model could not learn to "
            "stop; give the text tokenizer an eos_token, or a template that writes one"
        )

    def split(name: str) -> RowSource:
        if has_conversations(data):
            return ConversationSource(load_conversations(data, name), clips, tokenizer, limit)
        own = [clip for clip in clips.values() if clip.split == name]
        return ClipConversations(own, tokenizer, limit)

    text = None
    if replay is not None:
        text = TextSource.read(replay, tokenizer, limit, block_tokens=REPLAY_TOKENS)
    return Sources(train=split("train"), validation=split("validation"), replay=text)


def _facts(voice: Voice, index: ShardIndex, data: Path, replay: Path | None) -> dict[str, Any]:
    """Say what is trained, and on what."""
    assert voice.decoder.origin is not None
    facts = {**data_facts(index), "base_fingerprint": voice.decoder.origin.fingerprint}
    if has_conversations(data):
        facts["conversations_sha256"] = file_sha256(data / CONVERSATIONS)
    if replay is not None:
        facts["replay_sha256"] = file_sha256(replay)
    return facts


def base_perplexity(base: str, texts: list[str]) -> Perplexity:
    """Measure a text-only model as transformers runs it."""
    model = load_backbone(base).to(default_device())
    return perplexity(
        lambda ids: model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits,
        load_text_tokenizer(base),
        texts,
        max_length=min(WINDOW_TOKENS, model.config.max_position_embeddings),
        device=model.device,
    )


def voice_perplexity(voice: Voice, texts: list[str]) -> Perplexity:
    """Measure the text side of a voice, over its vocabulary with the special tokens."""
    model = voice.decoder

    def logits_of(input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = backbones.run(model.backbone, model.embed_text(input_ids), positions)
        return model.text_logits(hidden)

    return perplexity(
        logits_of,
        voice.text_tokenizer,
        texts,
        max_length=min(WINDOW_TOKENS, model.backbone.config.max_position_embeddings),
        device=model.device,
    )


def merge(run: Path, out: Path, base: str | None = None) -> Voice:
    """Write the standalone checkpoint of an adapter folder.

    Raises:
        ValueError: if `out` is not empty, or `run` holds no voice.
    """
    _check_empty(out)
    voice = Voice.load(run, base)
    voice.save(out)
    for name in (RUN_FILE, DRIFT_FILE):  # what its model card tells
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    return voice


def _check_empty(out: Path) -> None:
    """Refuse to write over anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists, expected a new or empty folder; type another")


def voice_config(
    preset: RunConfig, base: str, *, lora: bool = False, full: bool = False
) -> RunConfig:
    """Put a base model and a training mode into a preset.

    Raises:
        ValueError: for two modes, or a preset that builds its own backbone.
    """
    if lora and full:
        raise ValueError("found both --lora and --full, expected at most one of them")
    if preset.backbone is not None:
        raise ValueError(
            f"preset {preset.preset!r} builds its own language model; expected voice or "
            "voice_digits, or type  mllm-audio train"
        )
    mode = "lora" if lora else "full" if full else preset.adapt.mode
    return replace(preset, base=base, adapt=replace(preset.adapt, mode=mode))
