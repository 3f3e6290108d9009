"""Rows in the middle of being decoded: their cache, and the state after what they were fed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from mllm_audio.data.layout import IGNORED
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch


@dataclass
class Rows:
    """Rows being decoded side by side, their unconditional twins below them under guidance.

    R' is the number of both: R, or 2R with guidance.
    """

    model: AudioLanguageModel
    special: SpecialIds
    guided: bool
    cache: Cache
    mask: Tensor  # (R', T) bool, false where a row is padded
    positions: Tensor  # (R', 1) of the elements fed last
    hidden: Tensor  # (R', H), the state after them

    @classmethod
    def begin(
        cls,
        model: AudioLanguageModel,
        special: SpecialIds,
        guided: bool,
        embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
    ) -> Rows:
        """Feed the prompts: (R', T, H) embeddings at (R', T) positions, (R', T) mask."""
        cache = DynamicCache(config=model.backbone.config)
        hidden = model.step(embeds, position_ids, mask, cache)
        return cls(model, special, guided, cache, mask, position_ids[:, -1:], hidden)

    @property
    def states(self) -> tuple[Tensor, Tensor | None]:
        """Split the state into (R, H) conditional and unconditional, None without guidance."""
        if not self.guided:
            return self.hidden, None
        cond, uncond = self.hidden.chunk(2)
        return cond, uncond

    def feed(self, embeds: Tensor) -> None:
        """Extend every row by one (R', 1, H) embedding."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions + 1
        self.hidden = self.model.step(embeds, self.positions, self.mask, self.cache)

    def feed_id(self, token: int) -> None:
        """Extend every row by a text id, the null prompt in unconditional rows, or by a marker."""
        is_text = token not in (self.special.audio_start, self.special.audio_end)
        is_null = torch.zeros_like(self.positions, dtype=torch.bool)
        if self.guided and is_text:
            is_null.chunk(2)[1].fill_(True)
        predicts = torch.full_like(is_null, token == self.special.audio_start)
        batch = text_batch(
            torch.full_like(self.positions, token),
            self.positions + 1,
            is_null,
            predicts,
            self.model.audio.config.latent_dim,
        )
        self.feed(self.model.embed(batch))

    def feed_latents(self, latents: Tensor, index: int, predicts: bool) -> None:
        """Extend every row by its (R, D) latent of content position `index`, alike in both twins.

        It `predicts` where the next latent, or the end, is to be read from its state.
        """
        audio, copies = self.model.audio, 2 if self.guided else 1
        position = torch.full((len(latents),), index, device=latents.device)
        embeds = audio.embed(latents, position)  # (R, H)
        if predicts:
            embeds = embeds + audio.embed_targets(position + 1)
        self.feed(embeds[:, None].to(self.model.backbone.dtype).repeat(copies, 1, 1))


def text_batch(
    input_ids: Tensor,
    position_ids: Tensor,
    is_null: Tensor,
    predicts: Tensor,
    latent_dim: int,
) -> Batch:
    """Wrap (R, T) ids as a batch without latents; what predicts, predicts a span's first one."""
    no, count = torch.zeros_like(is_null), int(predicts.sum())
    none = position_ids.new_zeros(0)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        is_null=is_null,
        is_audio=no,
        predicts=predicts,
        text_labels=torch.full_like(input_ids, IGNORED),
        segment_ids=None,
        latents=torch.zeros(0, latent_dim, device=input_ids.device),
        content_positions=none,
        target_positions=position_ids.new_zeros(count),
        target_latents=torch.zeros(0, latent_dim, device=input_ids.device),
        target_is_end=no.new_zeros(count),
        end_weight=torch.ones(count, device=input_ids.device),
        masking_ratio=0.0,
        names=(),
        num_elements=input_ids.numel(),
    )
