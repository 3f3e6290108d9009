"""Who looks at whom: masks of packed rows, of copies, and of sliding windows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def window_binds(backbone: PreTrainedModel, position_ids: Tensor) -> bool:
    """Tell whether sliding-window attention hides a position of these rows from another."""
    window = getattr(backbone.config, "sliding_window", None)
    return window is not None and int(position_ids.max()) >= window


def square_mask(
    backbone: PreTrainedModel,
    position_ids: Tensor,
    segment_ids: Tensor | None,
    has_copies: bool,
) -> Tensor | dict[str, Tensor]:
    """Build (B, 1, T, T) masks, true where the row's element may look at the column's.

    A sliding window is measured in positions, gaps counted: a dropped token takes its place in it,
    as it does when the whole sequence is generated. A copy sees what its original sees, itself in
    the original's place, and nothing else sees it.
    """
    length = position_ids.shape[1]
    square = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    full = square.expand(len(position_ids), 1, length, length)
    if segment_ids is not None:
        full = full & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if has_copies:
        is_copy = torch.zeros_like(position_ids, dtype=torch.bool)
        is_copy[:, 1:] = position_ids[:, 1:] == position_ids[:, :-1]
        if segment_ids is not None:
            is_copy[:, 1:] &= segment_ids[:, 1:] == segment_ids[:, :-1]
        itself = torch.eye(length, dtype=torch.bool, device=position_ids.device)
        original = is_copy[:, None, :, None] & torch.roll(itself, -1, dims=1)
        full = full & ~is_copy[:, None, None, :] & ~original | itself
    return windowed(backbone, full, position_ids, position_ids)


def windowed(
    backbone: PreTrainedModel, full: Tensor, queries: Tensor, keys: Tensor
) -> Tensor | dict[str, Tensor]:
    """Hide what lies outside the backbone's sliding window, if it has one.

    Args:
        backbone: whose layers may differ in it.
        full: (B, 1, T, T') bool, true where the row's element may look at the column's.
        queries: (B, T) positions of the rows.
        keys: (B, T') positions of the columns.

    Returns:
        The mask, or one for each kind of layer.
    """
    window = getattr(backbone.config, "sliding_window", None)
    if window is None:
        return full
    distance = queries[:, None, :, None] - keys[:, None, None, :]
    sliding = full & (distance < window)
    kinds = set(getattr(backbone.config, "layer_types", None) or ["sliding_attention"])
    if len(kinds) > 1:
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding if kinds == {"sliding_attention"} else full
