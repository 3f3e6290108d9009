"""Prompts side by side, as decoding begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mllm_audio.data.layout import Prompt, stacked
from mllm_audio.generation.rows import text_batch
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch


def prompt_length(prompt: Tensor | Prompt) -> int:
    """Count the elements of a prompt."""
    return sum(map(len, prompt.embeddings)) if isinstance(prompt, Prompt) else len(prompt)


def prompt_batch(
    prompts: Sequence[Tensor | Prompt], special: SpecialIds, guided: bool, latent_dim: int
) -> tuple[Batch, Tensor]:
    """Lay prompts and `<|audio_start|>` out, padded on the left, unconditional twins below.

    Left padding puts every row's next element in the same cache slot; position ids and the
    attention mask hide it from the model.
    """
    rows, longest = len(prompts), max(map(prompt_length, prompts)) + 1
    input_ids = torch.full((rows, longest), special.audio_start)
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        begin = longest - 1 - prompt_length(prompt)
        input_ids[row, begin:-1] = special.cond if isinstance(prompt, Prompt) else prompt
        mask[row, begin:] = True
    is_null = mask.repeat(2, 1)  # (2R, T)
    is_null[:, -1] = False
    is_null[:rows] = False
    predicts = torch.zeros_like(mask)
    predicts[:, -1] = True
    copies = 2 if guided else 1

    def both(value: Tensor) -> Tensor:
        return value.repeat(copies, *[1] * (value.dim() - 1))

    batch = text_batch(
        both(input_ids),
        both((mask.long().cumsum(dim=1) - 1).clamp_min(0)),
        is_null[: copies * rows],
        both(predicts),
        latent_dim,
    )
    embedded = stacked([prompt for prompt in prompts if isinstance(prompt, Prompt)])
    if embedded:
        is_prompt = both(input_ids == special.cond)
        batch = replace(batch, is_prompt=is_prompt, prompts=tuple(map(both, embedded)))
    return batch, both(mask)
