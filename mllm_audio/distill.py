"""A guided voice to one that needs no guidance: half the rows to compute for every latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from mllm_audio.add_voice import conversation_sources
from mllm_audio.build import check_prompt_lengths, fit_to_data
from mllm_audio.claim import RUN_FILE
from mllm_audio.config import from_dict, override, read_json
from mllm_audio.data.conversations import load_clips
from mllm_audio.data.remote import is_url, open_folder
from mllm_audio.data.shards import ShardIndex
from mllm_audio.data.stream import captions
from mllm_audio.folder import is_adapter, read_audio_config
from mllm_audio.generation.decode import GenerationConfig, token_limits
from mllm_audio.generation.parts import load_audio_tokenizer, read_defaults
from mllm_audio.generation.voice import Voice
from mllm_audio.modality import AudioConfig
from mllm_audio.model import default_device
from mllm_audio.models import is_audiomar
from mllm_audio.presets import RunConfig
from mllm_audio.run import Sources, captioned_sources, data_facts, train_voice
from mllm_audio.training.cluster import Cluster
from mllm_audio.training.distillation import GuidanceDistillation
from mllm_audio.training.optim import OptimConfig
from mllm_audio.weights import fingerprint

NUM_STEPS = 3000
OPTIM = OptimConfig(lr=3e-4, schedule="cosine", max_grad_norm=1.0)
FACT = "distilled_guidance"  # in run.json: what the teacher was guided with


def distill(
    run: Path,
    data: Path | str,
    out: Path,
    *,
    guidance_scale: float | None = None,
    overrides: Sequence[str] = (),
    cluster: Cluster | None = None,
) -> None:
    """Train the head of a guided voice to need one branch, resuming `out` if it was begun there.

    Args:
        run: folder of a run, or of a merged one; its averaged weights are the teacher.
        data: folder or URL of what `prepare` wrote with the run's tokenizer.
        out: folder of the distilled voice, a run of its own.
        guidance_scale: MAR's s on the run's schedule; None takes the guidance of its defaults.
        overrides: settings of the training, as `section.key=value`.
        cluster: who trains together.

    Raises:
        ValueError: if `run` is no such voice or not guided, or the data or settings do not fit it.
    """
    teacher = read_run(run)
    guidance = teacher_guidance(run, guidance_scale)
    config = settings(teacher, guidance, overrides)
    folder = open_folder(data, config.data)
    check_same_latents(config.audio, folder.index, run, data)
    config = fit_to_data(config, folder.index, data)
    voice = load_student(run, guidance, config.generation)
    if folder.has_conversations() or config.base is not None:
        sources = _conversations(run, voice, data, config)
    else:
        check_prompt_lengths(voice, captions(folder, ["train", "validation"]))
        sources = captioned_sources(config, folder, voice)
    facts = {
        **data_facts(folder.index),
        "teacher_fingerprint": fingerprint(voice.model),
        FACT: {k: v for k, v in asdict(guidance).items() if k.startswith("guidance_")},
    }
    train_voice(config, voice, sources, out, facts, cluster)


def read_run(run: Path) -> RunConfig:
    """Read what a run was made from.

    Raises:
        ValueError: if it is an adapter, an AudioMAR, distilled already, or no run.
    """
    if is_adapter(run):
        raise ValueError(
            f"{run} is an adapter, expected a standalone checkpoint; type  mllm-audio merge {run} "
            "--out MERGED, and distill that"
        )
    if is_audiomar(run):
        raise ValueError(
            f"{run} is an AudioMAR, which guidance distillation does not know; expected the "
            "checkpoint of a causal model"
        )
    audio = read_audio_config(run)
    values = read_json(run / RUN_FILE, f"expected that of the run that made {run}; restore it")
    if audio.guidance_distilled or FACT in values:
        raise ValueError(
            f"{run} is distilled already and has no unconditional branch; type the run that it "
            "was distilled from"
        )
    known = {field.name for field in fields(RunConfig)}
    own = {key: value for key, value in values.items() if key in known}
    config: RunConfig = from_dict(RunConfig, own, str(run / RUN_FILE))
    return replace(config, audio=audio)


def teacher_guidance(run: Path, guidance_scale: float | None) -> GenerationConfig:
    """Take the guidance of the defaults of a run, perhaps at another scale.

    Raises:
        ValueError: if that is none.
    """
    guidance = read_defaults(run)
    if guidance_scale is not None:
        guidance = replace(guidance, guidance_scale=guidance_scale, guidance_weight=None)
    if not guidance.is_guided(2):
        found = "--guidance-scale 1" if guidance_scale is not None else f"no guidance in {run}"
        raise ValueError(
            f"found {found}: there is nothing to distill; type a --guidance-scale other than 1"
        )
    return guidance


def settings(teacher: RunConfig, guidance: GenerationConfig, overrides: Sequence[str]) -> RunConfig:
    """Derive the settings of the training from those of the teacher.

    Raises:
        ValueError: for an override of what the teacher decides.
    """
    made = replace(
        teacher,
        audio=replace(teacher.audio, guidance_distilled=True),
        # Nothing is masked, and every row goes through both branches.
        masking=replace(teacher.masking, schedule="ntp"),
        data=replace(teacher.data, unconditional_share=0.0, replay_share=0.0),
        train=replace(
            teacher.train,
            num_steps=NUM_STEPS,
            max_minutes=None,
            gradient_checkpointing=False,
            optim=OPTIM,
        ),
        generation=replace(guidance, guidance_scale=1.0, guidance_weight=None),
    )
    config: RunConfig = override(made, overrides)
    kept = replace(config, data=made.data, train=made.train, generation=made.generation)
    if kept != made:
        differ = [f.name for f in fields(made) if getattr(kept, f.name) != getattr(made, f.name)]
        raise ValueError(
            f"found settings of {', '.join(differ)}, which are the teacher's; expected those of "
            "train, data and generation alone"
        )
    if config.generation.is_guided(2):
        raise ValueError(
            "found guidance among the settings of generation, but a distilled voice has one "
            "branch; type --guidance-scale, which the teacher is guided with"
        )
    if config.data.unconditional_share or config.data.replay_share:
        raise ValueError(
            "found data.unconditional_share or data.replay_share, but distillation learns from "
            "captioned rows alone; leave it out"
        )
    if config.train.gradient_checkpointing:
        raise ValueError(
            "train.gradient_checkpointing=true has no effect on a frozen backbone; leave it out"
        )
    return config


def check_same_latents(audio: AudioConfig, index: ShardIndex, run: Path, data: Path | str) -> None:
    """Refuse data of another tokenizer, or another conditioner, than the run was trained on.

    Raises:
        ValueError: naming both.
    """
    conditioner = index.conditioner
    pairs = [("tokenizer", index.tokenizer.spec, index.tokenizer.fingerprint, audio.tokenizer)]
    expected = [audio.tokenizer_fingerprint]
    if audio.conditioner is not None and conditioner is not None:
        pairs.append(("conditioner", conditioner.spec, conditioner.fingerprint, audio.conditioner))
        expected.append(audio.conditioner_fingerprint)
    for (kind, spec, found, own), wanted in zip(pairs, expected, strict=True):
        if found != wanted:
            raise ValueError(
                f"{data} was prepared with {kind} {spec} of fingerprint {found}, {run} was trained "
                f"with {own} of {wanted}; prepare with --{kind} {own}"
            )


def load_student(run: Path, guidance: GenerationConfig, defaults: GenerationConfig) -> Voice:
    """Load a run as a voice whose head is to be distilled.

    Args:
        run: folder of the teacher.
        guidance: of the teacher.
        defaults: of the distilled voice.
    """
    model = GuidanceDistillation.from_pretrained(run).to(default_device())
    _, longest = token_limits(model.audio.config, guidance)  # as decoding counts a span
    scales = [guidance.scale_at(position, longest) for position in range(longest)]
    model.begin(torch.tensor(scales))
    model.audio.config = replace(model.audio.config, guidance_distilled=True)
    assert model.text_tokenizer is not None
    audio_tokenizer = load_audio_tokenizer(model.audio.config, run)
    return Voice(model, model.text_tokenizer, audio_tokenizer, defaults)


def _conversations(run: Path, voice: Voice, data: Path | str, config: RunConfig) -> Sources:
    """Read the rows of a language model with a voice.

    Raises:
        ValueError: if the run is none, or the data is at a URL.
    """
    if config.base is None:
        raise ValueError(
            f"{data} holds conversations, which {run} was not trained on; expected captioned clips"
        )
    if is_url(data):
        raise ValueError(f"found --data {data}, expected a folder: voices of add-voice read no URL")
    return conversation_sources(voice, Path(data), load_clips(Path(data)), None)
