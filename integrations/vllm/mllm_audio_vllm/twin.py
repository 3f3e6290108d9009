"""A second KV cache in every attention layer of a vLLM backbone, for the unconditional branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index


class TwinAttention(nn.Module):
    """Attention of both branches: rows are the conditional elements, then the unconditional ones.

    Both caches stand under one block table, so the engine schedules, preempts and caches the
    branches as one request.
    """

    def __init__(self, cond: Attention, uncond: Attention) -> None:
        super().__init__()
        self.cond, self.uncond = cond, uncond

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within each branch; (2T, ...) in and out."""
        half = query.shape[0] // 2
        cond = self.cond(query[:half], key[:half], value[:half])
        return torch.cat([cond, self.uncond(query[half:], key[half:], value[half:])])


def add_twins(backbone: nn.Module, vllm_config: VllmConfig) -> None:
    """Put a twin beside every attention layer, in place.

    Raises:
        ValueError: if the backbone has attention that is none of vLLM's plain decoder layers.
    """
    holders = [m for m in backbone.modules() if isinstance(getattr(m, "attn", None), Attention)]
    num_layers = len(holders)
    total = sum(isinstance(m, Attention) for m in backbone.modules())
    if not holders or total != num_layers:
        raise ValueError(
            f"found {total} attention layers, {num_layers} of them in the attribute `attn`; this "
            "backbone cannot have an unconditional branch: serve it with guidance off"
        )
    for module in holders:
        cond: Any = module.attn
        index = extract_layer_index(cond.layer_name)
        prefix = cond.layer_name.replace(f".{index}.", f".{index + num_layers}.", 1)
        uncond = Attention(
            cond.num_heads,
            cond.head_size,
            cond.impl.scale,
            num_kv_heads=cond.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=cond.sliding_window,
            prefix=f"{prefix}_uncond",
        )
        module.attn = TwinAttention(cond, uncond)
