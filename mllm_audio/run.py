"""A training run on disk: prepared data and a configuration in, a voice folder out.

RUN holds the exported checkpoint itself (`config.json`, `model.safetensors`, the text tokenizer,
`audio_generation.json`), the resolved configuration (`run.json`), `log.jsonl`, `tensorboard/`
and `checkpoints/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_audio.build import build_voice, check_prompt_lengths, fit_to_data, start_blocks
from mllm_audio.claim import claimed
from mllm_audio.data.dataset import RowSource, TrainingData
from mllm_audio.data.remote import PreparedFolder, is_url, open_folder
from mllm_audio.data.shards import ShardIndex
from mllm_audio.data.stream import ClipStream, ShardedClips, captions
from mllm_audio.generation.voice import Voice
from mllm_audio.masking import MaskingConfig
from mllm_audio.presets import RunConfig
from mllm_audio.text import SpecialIds
from mllm_audio.training.checkpoint import list_checkpoints, read_weights
from mllm_audio.training.cluster import Cluster
from mllm_audio.training.trainer import train


def train_run(
    config: RunConfig,
    data: Path | str,
    out: Path,
    cluster: Cluster | None = None,
    say: Callable[[str], object] | None = None,
) -> None:
    """Train on a folder or URL of what `prepare` wrote, resuming `out` if it holds the same run.

    Args:
        config: settings of the run.
        data: folder or URL.
        out: folder of the run, where the voice with averaged weights is exported.
        cluster: who trains together.
        say: told what a new model starts from, in the first process.

    Raises:
        ValueError: if data and configuration do not fit, or `out` holds another run.
    """
    if config.backbone is None:
        raise ValueError(
            f"preset {config.preset!r} is for a trained language model; type  mllm-audio add-voice "
            "BASE --data DATA --out RUN"
        )
    folder = open_folder(data, config.data)
    if folder.has_conversations():
        raise ValueError(
            f"{data} holds conversations, which need a trained language model; type  mllm-audio "
            f"add-voice BASE --data {'FOLDER' if is_url(data) else data} --out {out}"
        )
    config = fit_to_data(config, folder.index, data)
    voice = build_voice(config, folder.index, captions(folder, ["train"]))
    if not list_checkpoints(out):
        report = start_blocks(config, voice.model)
        if report is not None and say is not None and (cluster is None or cluster.world.is_first):
            say(str(report))
    check_prompt_lengths(voice, captions(folder, ["train", "validation"]))
    sources = captioned_sources(config, folder, voice)
    train_voice(config, voice, sources, out, data_facts(folder.index), cluster)


@dataclass(frozen=True)
class Sources:
    """The rows of a run."""

    train: RowSource
    validation: RowSource  # perhaps none
    replay: RowSource | None = None  # text mixed into training


def captioned_sources(config: RunConfig, folder: PreparedFolder, voice: Voice) -> Sources:
    """Stream the clips of a prepared folder, each behind one of its captions."""
    clips, held_out = (
        ShardedClips(
            ClipStream(folder, split, config.data.shuffle_shards, config.audio.prompt_streams),
            voice.text_tokenizer,
        )
        for split in ("train", "validation")
    )
    return Sources(train=clips, validation=held_out)


def train_voice(
    config: RunConfig,
    voice: Voice,
    sources: Sources,
    out: Path,
    facts: dict[str, Any],
    cluster: Cluster | None = None,
) -> None:
    """Train `voice` in place in the folder `out`, resuming what is there.

    Args:
        config: settings that fit the rows.
        voice: untrained, or a trained language model with untrained audio modules.
        sources: rows to train on.
        out: folder of the run.
        facts: what is trained on, kept in run.json beside the configuration.
        cluster: who trains together.
    """
    cluster = cluster or Cluster()
    engine = cluster.engine(voice.model, config.train)
    training = TrainingData(
        source=sources.train,
        special=SpecialIds.of(voice.text_tokenizer),
        masking=config.masking,
        config=config.data,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.rows_at_once(cluster.world.size),
        seed=config.train.seed,
        end_of_audio=config.audio.end_of_audio,
        replay=sources.replay,
        statistics=(voice.model.audio.latent_mean.cpu(), voice.model.audio.latent_std.cpu()),
    )
    unmasked = replace(
        training,
        source=sources.validation,
        replay=None,
        # AudioMAR predicts nothing else than what is masked.
        masking=config.masking if config.masking.hidden == "own" else MaskingConfig(schedule="ntp"),
        config=replace(config.data, unconditional_share=0.0),
    )

    def export(checkpoint: Path) -> None:
        voice.save(out, read_weights(checkpoint))

    with claimed(out, config, facts, cluster.world):
        train(
            engine, training, unmasked if len(unmasked.source) else None, config.train, out, export
        )


def data_facts(index: ShardIndex) -> dict[str, Any]:
    """Say what a run is trained on: name, counts and a hash of the shards."""
    shards = "".join(shard.sha256 for shard in index.shards)
    return {
        "data_manifest": Path(index.manifest).name,
        "data_counts": index.counts,
        "data_sha256": hashlib.sha256(shards.encode()).hexdigest(),
    }
