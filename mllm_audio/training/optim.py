"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm_audio.config import check_range

LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up; the defaults are MAR's and the paper's."""

    lr: float = 1e-4  # after warm-up
    schedule: str = "constant"  # constant, or cosine down to `final_lr_share`
    final_lr_share: float = 0.05  # of `lr`, reached by cosine at the end
    warmup_steps: int = 100  # linear from 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02  # not on 1-D tensors, audio positions, special rows, nor the head
    max_grad_norm: float = 3.0  # gradients are scaled down to this global norm
    backbone_lr_share: float = 1.0  # of `lr`, for the backbone and its LoRA layers

    def __post_init__(self) -> None:
        """Check the schedule's name and the learning rate."""
        if self.schedule not in LR_SCHEDULES:
            raise ValueError(
                f"unknown lr schedule {self.schedule!r}, expected one of {', '.join(LR_SCHEDULES)}"
            )
        check_range("train.optim", self, 0, 100, "lr", "max_grad_norm", open_low=True)
        check_range(
            "train.optim", self, 0, 1, "final_lr_share", "weight_decay", "backbone_lr_share"
        )


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW on the groups of a model."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, fused=True
    )


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Group the trained parameters, with weight decay on matrices of backbone and embeddings only.

    MAR decays neither 1-D tensors nor anything in the diffusion head.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = name.startswith(("audio.head.", "special_rows.")) or "position" in name
        decayed = parameter.dim() >= 2 and not exempt
        groups.setdefault((decayed, name.startswith("backbone.")), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr_share": config.backbone_lr_share if in_backbone else 1.0,
        }
        for (decayed, in_backbone), parameters in groups.items()
    ]


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Return the learning rate of optimizer step `step` (from 0) at `progress` in [0, 1]."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.lr * warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * warmup * (config.final_lr_share + (1 - config.final_lr_share) * cosine)
