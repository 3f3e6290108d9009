"""`AudioLanguageModel`: a Hugging Face causal LM plus `AudioModality`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from mllm_audio import backbone as backbones
from mllm_audio.checkpointed import Checkpointed
from mllm_audio.modality import pad_rows
from mllm_audio.types import Batch, Losses


def default_device() -> torch.device:
    """Pick the first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class AudioLanguageModel(Checkpointed):
    """A generalised causal LM over text ids and continuous audio latents.

    The paper's AudioNTP and AudioMNTP are this class; which one is decided by the batch.
    """

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embed text ids of any shape; return (..., H)."""
        embeds: Tensor = self.backbone.get_input_embeddings()(input_ids)
        return embeds if self.special_rows is None else self.special_rows.embed(input_ids, embeds)

    def text_logits(self, hidden_states: Tensor) -> Tensor:
        """Score the next text id after (..., H) hidden states; return (..., V)."""
        hidden_states = hidden_states.to(self.backbone.dtype)
        rows = self.special_rows
        edit = None if rows is None else partial(rows.logits, hidden_states)
        return backbones.text_logits(self.backbone, hidden_states, edit)

    def embed(self, batch: Batch) -> Tensor:
        """Embed an interleaved batch; return (B, T, H)."""
        embeds = self.embed_text(batch.input_ids)  # (B, T, H)
        # The null prompt's k-th vector stands at position k, its last one ever after.
        last = len(self.audio.null_prompt) - 1
        null = self.audio.null_prompt[batch.position_ids.clamp(max=last)]  # (B, T, H)
        embeds = torch.where(batch.is_null[..., None], null.to(embeds.dtype), embeds)
        latents = self.audio.embed(batch.latents, batch.content_positions)  # (M, H)
        embeds = embeds.masked_scatter(batch.is_audio[..., None], latents.to(embeds.dtype))
        targets = self.audio.embed_targets(batch.target_positions)  # (P, H)
        added = torch.zeros_like(embeds).masked_scatter(
            batch.predicts[..., None], targets.to(embeds.dtype)
        )
        return embeds + added

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Losses:
        """Compute the training losses of a batch.

        Every trained parameter takes part in every step, also when the batch holds no audio or no
        text to learn, so that data-parallel ranks never wait for each other's gradients.

        Raises:
            ValueError: if a row is longer than the backbone's positions.
        """
        backbones.check_positions(self.backbone, batch.position_ids)
        hidden_states = backbones.run(
            self.backbone, self.embed(batch), batch.position_ids, segment_ids=batch.segment_ids
        ).float()  # (B, T, H)
        zero = hidden_states.new_zeros(())
        text, audio, end, per_latent = zero, zero, zero, hidden_states.new_zeros(0)
        idle: list[nn.Parameter] = []  # what this batch has no use for
        says = batch.text_labels >= 0  # (B, T)
        if bool(says.any()):
            labels = batch.text_labels[says]  # (L,)
            logits = self.text_logits(pad_rows(hidden_states[says]))[: len(labels)]  # (L, V)
            text = F.cross_entropy(logits.float(), labels)
        else:
            idle += self._text_parameters()
        predicted = hidden_states[batch.predicts]  # (P, H)
        has_latent = ~batch.target_is_end  # (P,)
        if bool(has_latent.any()):
            targets = batch.target_latents[has_latent]
            per_latent = self.audio.loss(predicted[has_latent], targets, generator)
            audio = per_latent.mean()
            end = self.audio.end_loss(predicted, batch.target_is_end, batch.end_weight).mean()
        else:
            idle += list(self.audio.parameters())
        config = self.audio.config
        total = audio + config.end_loss_weight * end + config.text_loss_weight * text
        if idle:
            total = total + 0.0 * (sum(p.sum() for p in idle) + hidden_states.sum())
        return Losses(
            total=total,
            text=text.detach(),
            audio=audio.detach(),
            end=end.detach(),
            per_latent=per_latent.detach(),
        )

    def _text_parameters(self) -> Iterable[nn.Parameter]:
        """List the trained parameters that only text to learn reaches."""
        rows = self.special_rows
        if rows is None and backbones.is_tied(self.backbone):
            return []
        holder = self.backbone.get_output_embeddings() if rows is None else rows
        return [p for p in holder.parameters() if p.requires_grad]

    def step(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache,
    ) -> Tensor:
        """Extend the cache by (R, T, H) embeddings; return the last element's (R, H) state."""
        states = backbones.run(self.backbone, inputs_embeds, position_ids, attention_mask, cache)
        return states[:, -1].float()
