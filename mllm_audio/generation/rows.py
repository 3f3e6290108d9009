"""Rows in the middle of being decoded: their cache, and the state after what they were fed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from mllm_audio.attention import windowed
from mllm_audio.data.layout import IGNORED
from mllm_audio.diffusion.noise import Noise
from mllm_audio.generation.cache import Slots, buffered_cache, fixable, forget, holds_all
from mllm_audio.generation.parallel import copies_mask, copies_of, positions_of
from mllm_audio.heads.base import SamplingConfig
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.types import Batch

NEXT = range(1)  # asked of an element that is asked for one target, or for none


@dataclass
class Rows:
    """Rows being decoded side by side, their unconditional twins below them under guidance.

    R' is the number of both: R, or 2R with guidance.
    """

    model: AudioLanguageModel
    special: SpecialIds
    guided: bool
    cache: DynamicCache
    mask: Tensor  # (R', T) bool, false where a row is padded
    positions: Tensor  # (R', T) of all elements
    hidden: Tensor  # (R', k, H), the state after the last one, for each target asked of it
    slots: Slots | None = None  # see `fix`

    @classmethod
    def begin(
        cls,
        model: AudioLanguageModel,
        special: SpecialIds,
        guided: bool,
        embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        asked: range | Tensor = NEXT,
    ) -> Rows:
        """Feed the prompts: (R', T, H) embeddings at (R', T) positions, (R', T) mask.

        The last element is `asked` for these targets, with the first one's embedding added.
        """
        cache = buffered_cache(model.backbone.config)
        rows = cls(model, special, guided, cache, mask[:, :0], position_ids[:, :0], embeds[:, :0])
        rows._extend(embeds, position_ids, mask, asked)
        return rows

    @property
    def last_position(self) -> int:
        """Tell where the element fed last stands in the first row."""
        return int(self.positions[0, -1])

    @property
    def states(self) -> tuple[Tensor, Tensor | None]:
        """Split the state into (R, k, H) conditional and unconditional, None without guidance."""
        if not self.guided:
            return self.hidden, None
        cond, uncond = self.hidden.chunk(2)
        return cond, uncond

    @property
    def last(self) -> Tensor:
        """Tell the (R', 1) positions of the elements fed last."""
        if self.slots is None:
            return self.positions[:, -1:]
        return self.positions.index_select(1, self.slots.start[None] - 1)

    def fix(self, room: int) -> None:
        """Hold all that grows in buffers of a final size, with slots for `room` more elements.

        Until `unfix`, feeding runs the same kernels on the same memory each time, so that a step
        can be captured.
        """
        length = self.positions.shape[1]
        capacity = (length + room + 7) // 8 * 8  # the kernels of a GPU want it whole
        self.slots = Slots.after(length, self.hidden.device)
        self.mask = F.pad(self.mask, (0, capacity - length), value=True)
        self.positions = F.pad(self.positions, (0, capacity - length))
        self.hidden = self.hidden.clone()
        for layer in fixable(self.cache):
            layer.fix(self.slots, capacity)

    def unfix(self, length: int) -> None:
        """Grow again as before `fix`, from the `length` elements that were fed by now."""
        self.slots = None
        self.mask, self.positions = self.mask[:, :length], self.positions[:, :length]
        for layer in fixable(self.cache):
            layer.unfix(length)

    def _extend(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, asked: range | Tensor
    ) -> None:
        """Extend every row by (R', T, H) embeddings at (R', T) positions."""
        length, copies = embeds.shape[1], len(asked) - 1
        if self.slots is None:
            self.mask = torch.cat([self.mask, mask], dim=1)
            self.positions = torch.cat([self.positions, positions], dim=1)
            if not copies and (length == self.mask.shape[1] or not holds_all(self.cache)):
                self.hidden = self.model.step(embeds, positions, self.mask, self.cache, 1)
                return
        again = positions[:, -1:].expand(-1, copies)
        if copies:
            targets = self.model.audio.embed_targets(positions_of(asked, embeds.device))
            embeds = torch.cat([embeds, copies_of(embeds[:, -1], targets)], dim=1)
            positions = torch.cat([positions, again], dim=1)
        if self.slots is None:
            start: int | Tensor = self.mask.shape[1] - length
            padding = F.pad(self.mask, (0, copies), value=True)
            keys = torch.cat([self.positions, again], dim=1)
        else:
            keys = self.positions.index_copy_(1, self.slots.take(length + copies), positions)
            start, padding = self.slots.start, self.mask
        # The mask is ready: transformers would read back whether there is padding, and wait for it.
        visible = windowed(
            self.model.backbone, copies_mask(padding, start, length, copies), positions, keys
        )
        hidden = self.model.step(embeds, positions, visible, self.cache, 1 + copies)
        if self.slots is not None:
            self.hidden.copy_(hidden)
            self.slots.start += length
            return
        self.hidden = hidden
        if copies:
            forget(self.cache, copies)

    def feed(self, embeds: Tensor, asked: range | Tensor = NEXT) -> None:
        """Extend every row by (R', T, H) embeddings that follow one another."""
        length = embeds.shape[1]
        ahead = torch.arange(1, length + 1, device=embeds.device)
        mask = self.mask.new_ones(len(self.mask), length)
        self._extend(embeds, self.last + ahead, mask, asked)

    def feed_id(self, token: int, asked: range = NEXT) -> None:
        """Extend every row by a text id, the null prompt in unconditional rows, or by a marker.

        `<|audio_start|>` is `asked` for the first latents.
        """
        is_text = token not in (self.special.audio_start, self.special.audio_end)
        last = self.last
        is_null = torch.zeros_like(last, dtype=torch.bool)
        if self.guided and is_text:
            is_null.chunk(2)[1].fill_(True)
        predicts = torch.full_like(is_null, token == self.special.audio_start)
        batch = text_batch(
            torch.full_like(last, token),
            last + 1,
            is_null,
            predicts,
            self.model.audio.config.latent_dim,
        )
        self.feed(self.model.embed(batch), asked)

    def feed_latents(self, latents: Tensor, first: int | Tensor, asked: range | Tensor) -> None:
        """Extend every row by its (R, n, D) latents from content position `first` on.

        They are alike in both twins. Each predicts the one behind it, the last what is `asked`,
        which may be nothing.
        """
        audio, copies = self.model.audio, 2 if self.guided else 1
        rows, count, _ = latents.shape
        places = first + torch.arange(count, device=latents.device)
        embeds = audio.embed(latents.flatten(0, 1), places.repeat(rows)).unflatten(0, (rows, count))
        asked, predicting = (asked, count) if len(asked) else (NEXT, count - 1)
        targets = audio.embed_targets(places[:predicting] + 1)  # (n or n - 1, H)
        embeds = embeds + F.pad(targets, (0, 0, 0, count - predicting))
        self.feed(embeds.to(self.model.backbone.dtype).repeat(copies, 1, 1), asked)

    def draw(self, seeds: Tensor, sampling: SamplingConfig, asked: range | Tensor) -> Tensor:
        """Draw the latents that were asked for, (R, k, D), with noise by (R,) seeds and positions.

        `sampling` may have a guidance scale for each of them, (k, 1).
        """
        audio, (cond, uncond), count = self.model.audio, self.states, len(asked)
        if isinstance(sampling.guidance_scale, Tensor):
            scales = sampling.guidance_scale.repeat(len(seeds), 1)  # (R k, 1)
            sampling = replace(sampling, guidance_scale=scales)
        positions = positions_of(asked, seeds.device).repeat(len(seeds))
        noise = Noise(seeds.repeat_interleave(count), positions, audio.config.latent_dim)
        unconditional = None if uncond is None else uncond[:, :count].flatten(0, 1)
        latents = audio.sample(cond[:, :count].flatten(0, 1), unconditional, sampling, noise)
        return latents.unflatten(0, (len(seeds), count))


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
