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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_audio.build import build_voice, check_prompt_lengths, fit_to_data
from mllm_audio.config import read_json, to_dict
from mllm_audio.data.conversations import has_conversations
from mllm_audio.data.dataset import CaptionedClips, RowSource, TrainingData
from mllm_audio.data.shards import ShardIndex, load_split, read_index
from mllm_audio.files import write_atomic
from mllm_audio.generation.voice import Voice
from mllm_audio.masking import MaskingConfig
from mllm_audio.presets import RunConfig
from mllm_audio.text import SpecialIds
from mllm_audio.training.engine import SingleProcessEngine
from mllm_audio.training.trainer import train

RUN_FILE = "run.json"
# A resumed run may be lengthened, watched or (`generation.`) sampled differently, or continued past
# numbers that stopped it; anything else would make it another run.
MAY_CHANGE = (
    "base",  # may have moved; its fingerprint may not differ
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
    if config.backbone is None:
        raise ValueError(
            f"preset {config.preset!r} is for a trained language model; type  mllm-audio add-voice "
            "BASE --data DATA --out RUN"
        )
    if has_conversations(data):
        raise ValueError(
            f"{data} holds conversations, which need a trained language model; type  mllm-audio "
            f"add-voice BASE --data {data} --out {out}"
        )
    index = read_index(data)
    clips, validation = load_split(data, "train"), load_split(data, "validation", verify=False)
    config = fit_to_data(config, index, clips + validation, data)
    voice = build_voice(config, index, clips)
    check_prompt_lengths(voice, clips + validation)
    sources = Sources(
        train=CaptionedClips(clips, voice.text_tokenizer),
        validation=CaptionedClips(validation, voice.text_tokenizer),
    )
    return train_voice(config, voice, sources, out, data_facts(index))


@dataclass(frozen=True)
class Sources:
    """The rows of a run."""

    train: RowSource
    validation: RowSource  # perhaps none
    replay: RowSource | None = None  # text mixed into training


def train_voice(
    config: RunConfig, voice: Voice, sources: Sources, out: Path, facts: dict[str, Any]
) -> Voice:
    """Train `voice` in place in the folder `out`, resuming what is there.

    Args:
        config: settings that fit the rows.
        voice: untrained, or a trained language model with untrained audio modules.
        sources: rows to train on.
        out: folder of the run.
        facts: what is trained on, kept in run.json beside the configuration.

    Returns:
        The voice with averaged weights, as exported to `out`.
    """
    engine = SingleProcessEngine(
        voice.model, config.train.optim, config.train.ema_decay, config.train.precision
    )
    training = TrainingData(
        source=sources.train,
        special=SpecialIds.of(voice.text_tokenizer),
        masking=config.masking,
        config=config.data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        end_of_audio=config.audio.end_of_audio,
        replay=sources.replay,
    )
    unmasked = replace(
        training,
        source=sources.validation,
        replay=None,
        masking=MaskingConfig(schedule="ntp"),
        config=replace(config.data, unconditional_share=0.0),
    )

    def export() -> None:
        voice.save(out, engine.ema.state_dict(voice.model))

    out.mkdir(parents=True, exist_ok=True)
    with claimed(out, config, facts):
        train(
            engine, training, unmasked if len(unmasked.source) else None, config.train, out, export
        )
    return Voice.load(out)


def data_facts(index: ShardIndex) -> dict[str, Any]:
    """Say what a run is trained on: name, counts and a hash of the shards."""
    shards = "".join(shard.sha256 for shard in index.shards)
    return {
        "data_manifest": Path(index.manifest).name,
        "data_counts": index.counts,
        "data_sha256": hashlib.sha256(shards.encode()).hexdigest(),
    }


@contextmanager
def claimed(out: Path, config: RunConfig, facts: dict[str, Any]) -> Iterator[None]:
    """Hold RUN for this process, with RUN/run.json written or checked to be this run.

    Raises:
        ValueError: if another process is training there, or naming the settings that differ.
    """
    path = out / RUN_FILE
    values = json.loads(json.dumps({**to_dict(config), **facts}))
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
                if before.get(key) != now.get(key)
                and key not in MAY_CHANGE
                and not key.startswith("generation.")
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
