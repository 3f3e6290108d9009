"""Column-parallel decoding: one element asked for several latents at once.

A target's embedding is added to the element that predicts it, so an element's keys and values
depend on what it is asked for. An element asked for k targets is therefore fed k times, each copy
at the same position with a target of its own, and no copy sees another. The first copy, asked for
what comes next, is what would stand there one latent at a time, and all that the cache keeps.
Latents of a step are drawn independently of each other, which costs quality unless the model has
learned to predict so far ahead (`masking.max_distance`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def asked_targets(first: int, tokens_per_step: int, longest: int) -> range:
    """List the target positions of a step from `first` on; behind the last latent is the end."""
    return range(first, max(first + 1, min(first + tokens_per_step, longest)))


def positions_of(asked: range | Tensor, device: torch.device) -> Tensor:
    """Give target positions as a tensor, (k,)."""
    if isinstance(asked, Tensor):
        return asked
    return torch.arange(asked.start, asked.stop, device=device)


def copies_of(embeds: Tensor, targets: Tensor) -> Tensor:
    """Copy elements that predict the first of k targets, to predict the others.

    Args:
        embeds: (R', H), the element with its target's embedding added.
        targets: (k, H) embeddings of the targets.

    Returns:
        (R', k - 1, H).
    """
    return embeds[:, None] + (targets[1:] - targets[:1]).to(embeds.dtype)


def copies_mask(padding: Tensor, start: int | Tensor, length: int, copies: int) -> Tensor:
    """Say who looks at whom where the last of `length` new elements has copies behind it.

    Args:
        padding: (R', S) bool of all slots there are, false where a row is padded.
        start: slot of the first new element; what is behind the copies is hidden.
        length: new elements, the original of the copies last.
        copies: behind them.

    Returns:
        (R', 1, length + copies, S) bool. Every element sees itself, those of the padding too:
        without anything to see, attention is not a number.
    """
    number = torch.arange(length + copies, device=padding.device)[:, None]
    slots = torch.arange(padding.shape[1], device=padding.device)
    before = torch.where(number < length, number, length - 1)  # (length + copies, 1)
    visible = slots < start + before
    return padding[:, None, None, :] & visible | (slots == start + number)
