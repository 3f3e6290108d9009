"""Models that two CPU cores train in minutes, and voices for trained language models."""

from __future__ import annotations

from dataclasses import replace

from mllm_audio.backbone import BackboneConfig
from mllm_audio.data.config import DataConfig
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.heads.base import HeadConfig
from mllm_audio.masking import MaskingConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.presets.config import RunConfig
from mllm_audio.training.config import TrainConfig
from mllm_audio.training.optim import OptimConfig


def digits() -> RunConfig:
    """Spoken digits on two CPU cores in a quarter of an hour: 6.3 M parameters, clips to 1.28 s."""
    return RunConfig(
        preset="digits",
        backbone=BackboneConfig(
            hidden_size=256, num_layers=4, num_heads=4, max_positions=128, dropout=0.0
        ),
        audio=AudioConfig(
            max_tokens=32,
            channel_weight_exponent=0.7,
            head=HeadConfig(name="flow", width=384, num_blocks=3, batch_multiplier=2),
        ),
        # The paper's schedule drops too much of clips this short (13 latents on average).
        masking=MaskingConfig(schedule="uniform", scale=0.5),
        train=TrainConfig(
            num_steps=20_000,
            max_minutes=12,
            batch_size=32,
            ema_decay=0.999,
            optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=100, max_grad_norm=1.0),
        ),
        generation=GenerationConfig(
            num_inference_steps=20,
            guidance_scale=2.0,
            guidance_schedule="constant",
            temperature=0.7,
            end_threshold=0.5,
        ),
    )


def tiny() -> RunConfig:
    """The demo's model: clips to 2.56 s, minutes on two CPU cores."""
    base = digits()
    assert base.backbone is not None
    return replace(
        base,
        preset="tiny",
        backbone=replace(base.backbone, max_positions=160),
        # Which event comes is decided early on the path of a latent, and how many by its position:
        # a model this short of time needs both trained from the start.
        audio=replace(
            base.audio,
            max_tokens=64,
            position_init_std=1.0,
            head=replace(base.audio.head, time_shift=-1.0),
        ),
        masking=MaskingConfig(schedule="ntp"),
        train=replace(base.train, max_minutes=10.5, batch_size=16, num_steps=30_000),
    )


def voice() -> RunConfig:
    """A voice for a trained language model of any size: clips to 10.24 s."""
    return RunConfig(
        preset="voice",
        backbone=None,
        audio=AudioConfig(
            channel_weight_exponent=0.7,
            position_init_std=1.0,
            head=HeadConfig(name="flow", width=1024, num_blocks=3),
        ),
        masking=MaskingConfig(schedule="uniform", scale=0.5),
        data=DataConfig(replay_share=0.125, pack_tokens=1024),
        train=TrainConfig(
            num_steps=20_000,
            batch_size=32,
            ema_decay=0.999,
            optim=OptimConfig(lr=3e-4, schedule="cosine", max_grad_norm=1.0, backbone_lr_share=0.2),
        ),
        generation=replace(digits().generation, as_request=True),
    )


def voice_digits() -> RunConfig:
    """A voice for a small language model that says single words, in minutes on two CPU cores."""
    base, small = voice(), digits()
    return replace(
        base,
        preset="voice_digits",
        audio=replace(
            small.audio, position_init_std=1.0, head=replace(small.audio.head, time_shift=-1.0)
        ),
        data=replace(base.data, pack_tokens=256),
        train=replace(
            small.train, optim=replace(small.train.optim, lr=2e-3, backbone_lr_share=0.2)
        ),
    )
