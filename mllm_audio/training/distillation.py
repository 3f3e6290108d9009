"""Guidance distillation: a head learns what guidance makes of its two branches, to need one.

Stage one of Meng et al. 2023 (arXiv:2210.03142), at the fixed scales of one guidance schedule
instead of an input for the scale: which position is predicted tells the head which scale is meant.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_audio.diffusion.samplers import guided
from mllm_audio.modality import pad_rows
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch, Losses, StepCounts


class GuidanceDistillation(AudioLanguageModel):
    """A trained model whose head is trained to predict, from one branch, what guidance gave.

    Load one with `from_pretrained`, then `begin`. All but the head stands still, as in generation:
    no dropout, no context noise.
    """

    def begin(self, scales: Tensor) -> None:
        """Freeze the model, and keep its head as the teacher beside the one that is trained.

        Args:
            scales: (N,) MAR's s in uncond + s (cond - uncond), by target position; behind the
                last one it stays.
        """
        assert self.text_tokenizer is not None
        special = SpecialIds.of(self.text_tokenizer)
        self._markers = torch.tensor([special.audio_start, special.audio_end], device=self.device)
        self.requires_grad_(False)
        head: Any = self.audio.head
        # In a tuple, so that it is neither trained nor saved.
        self._teacher = (deepcopy(head), scales.to(self.device))
        head.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> GuidanceDistillation:
        """Stay in evaluation mode: the states are those of generation."""
        super().train(False)
        return self

    def save_pretrained(
        self, folder: Path | str, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write a standalone checkpoint, `state_dict` in place of what was trained."""
        super().save_pretrained(folder, {**self.state_dict(), **(state_dict or {})})

    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        counts: StepCounts | None = None,
    ) -> Losses:
        """Compute the squared distance of the head from the guided teacher on a batch.

        Args:
            batch: rows of text and audio.
            generator: of timesteps and noise.
            counts: what the loss is a mean over; by default what the batch holds.
        """
        counts = counts or batch.counts
        has_latent = ~batch.target_is_end  # (P,)
        condition = self.states(batch)[has_latent]  # (L, H)
        unconditional = self.states(self.without_text(batch))[has_latent]
        per_latent = self.distance(
            condition,
            unconditional,
            batch.target_latents[has_latent],
            batch.target_positions[has_latent],
            generator,
        )
        total = per_latent.sum() / max(1, counts.latents)
        nothing = torch.zeros_like(total)
        return Losses(
            total=total,
            text=nothing.detach(),
            audio=total.detach(),
            end=nothing.detach(),
            per_latent=per_latent.detach(),
        )

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Run the backbone; return the (P, H) states of the elements that predict."""
        return self.hidden_states(batch)[batch.predicts]

    def without_text(self, batch: Batch) -> Batch:
        """Put the null prompt in place of all text and prompts, as guidance's second branch."""
        is_marker = torch.isin(batch.input_ids, self._markers)  # (B, T)
        return replace(batch, is_null=~(batch.is_audio | is_marker))

    def distance(
        self,
        condition: Tensor,
        unconditional: Tensor,
        latents: Tensor,
        positions: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Measure how far the head is from the guided teacher; return (L,) float32.

        The first D channels are guided; a variance behind them is the conditional branch's.

        Args:
            condition: (L, H) states.
            unconditional: (L, H) states without text.
            latents: (L, D) that follow them, as the tokenizer makes them.
            positions: (L,) target positions.
            generator: of timesteps and noise.
        """
        head: Any = self.audio.head
        teacher, scales = self._teacher
        count, repeats = len(latents), self.audio.config.head.batch_multiplier
        clean, condition, unconditional = (
            pad_rows(rows).repeat(repeats, 1)
            for rows in (self.audio.normalise(latents), condition, unconditional)
        )  # (repeats * L', ...), L' a multiple of 128
        scale = scales[positions.clamp(max=len(scales) - 1)][:, None]  # (L, 1)
        scale = pad_rows(scale).repeat(repeats, 1)
        noisy, timesteps = head.noised(clean, generator)
        with torch.no_grad():
            cond, uncond = (
                teacher.network(noisy, timesteps, teacher.network.embed_condition(rows))
                for rows in (condition, unconditional)
            )  # (repeats * L', out)
            dim = clean.shape[1]
            target = cond.clone()
            target[:, :dim] = guided(cond[:, :dim], uncond[:, :dim], scale)
        prediction = head.network(noisy, timesteps, head.network.embed_condition(condition))
        squared = (prediction - target) ** 2  # (repeats * L', out)
        weight = self.audio.channel_weight()
        near, rest = squared[:, :dim], squared[:, dim:]
        per_row = (near if weight is None else near * weight).mean(-1)
        if rest.shape[1]:
            per_row = per_row + rest.mean(-1)
        return per_row.view(repeats, -1).mean(0)[:count]
