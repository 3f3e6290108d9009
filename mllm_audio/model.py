"""`AudioLanguageModel`: a Hugging Face causal LM plus `AudioModality`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from mllm_audio import backbone as backbones
from mllm_audio.checkpointed import Checkpointed
from mllm_audio.modality import pad_rows
from mllm_audio.types import Batch, Losses, StepCounts


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
        if batch.prompts:
            assert batch.is_prompt is not None
            prompts = self.audio.embed_prompts(batch.prompts).flatten(0, 1)  # (B' L, H)
            embeds = embeds.masked_scatter(batch.is_prompt[..., None], prompts.to(embeds.dtype))
        if self.audio.start is not None:
            starts = (batch.predicts & ~batch.is_audio)[..., None]  # (B, T, 1)
            embeds = torch.where(starts, self.audio.start.to(embeds.dtype), embeds)
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

    def hidden_states(self, batch: Batch) -> Tensor:
        """Run the decoder on a batch; return (B, T, H) float32 states.

        Raises:
            ValueError: if a row is longer than the backbone's positions.
        """
        backbones.check_positions(self.backbone, batch.position_ids)
        return backbones.run(
            self.backbone,
            self.embed(batch),
            batch.position_ids,
            segment_ids=batch.segment_ids,
            has_copies=batch.has_copies,
        ).float()

    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        counts: StepCounts | None = None,
    ) -> Losses:
        """Compute the training losses of a batch.

        Every trained parameter takes part in every step, also when the batch holds no audio or no
        text to learn, so that data-parallel processes never wait for each other's gradients.

        Args:
            batch: rows of text and audio.
            generator: of the noise in the head's loss.
            counts: what the losses are means over; by default what the batch holds. With those of
                a step of many micro-batches, its loss is the sum over them.

        Raises:
            ValueError: if a row is longer than the backbone's positions.
        """
        counts = counts or batch.counts
        hidden_states = self.hidden_states(batch)
        text = self._text_loss(hidden_states, batch.text_labels) / max(1, counts.words)
        predicted = hidden_states[batch.predicts]  # (P, H)
        per_latent, ends = self._audio_losses(predicted, batch, hidden_states[0, :1], generator)
        audio = per_latent.sum() / max(1, counts.latents)
        end = ends.sum() / max(1, counts.targets)
        config = self.audio.config
        total = audio + config.end_loss_weight * end + config.text_loss_weight * text
        return Losses(
            total=total,
            text=text.detach(),
            audio=audio.detach(),
            end=end.detach(),
            per_latent=per_latent.detach(),
        )

    def _text_loss(self, hidden_states: Tensor, text_labels: Tensor) -> Tensor:
        """Sum the cross-entropy of (B, T) labels under (B, T, H) states; -100 is not learned."""
        says = text_labels >= 0  # (B, T)
        if bool(says.any()):
            labels = text_labels[says]  # (L,)
            logits = self.text_logits(pad_rows(hidden_states[says]))[: len(labels)]  # (L, V)
            return F.cross_entropy(logits.float(), labels, reduction="sum")
        return 0.0 * self.text_logits(hidden_states[0, :1]).float().sum()

    def _audio_losses(
        self, predicted: Tensor, batch: Batch, spare: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Score what (P, H) states predict: (L,) losses of latents, (P,) of the end.

        A batch without audio to learn scores nothing, by way of the (1, H) spare state: the modules
        must run in every process, or ZeRO waits for them for ever.
        """
        has_latent = ~batch.target_is_end  # (P,)
        if bool(has_latent.any()):
            targets = batch.target_latents[has_latent]
            per_latent = self.audio.loss(predicted[has_latent], targets, generator)
            ends = self.audio.end_loss(predicted, batch.target_is_end, batch.end_weight)
            return per_latent, ends
        nothing = spare.new_zeros(1, self.audio.config.latent_dim)
        per_latent = 0.0 * self.audio.loss(spare, nothing, generator)
        ends = 0.0 * self.audio.end_loss(
            spare, spare.new_zeros(1, dtype=torch.bool), spare.new_ones(1)
        )
        return per_latent, ends

    def step(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor],
        cache: Cache,
        count: int = 1,
    ) -> Tensor:
        """Extend the cache by (R, T, H) embeddings; return the last `count` states, (R, count, H).

        The mask is one of `backbone.run`.
        """
        states = backbones.run(self.backbone, inputs_embeds, position_ids, attention_mask, cache)
        return states[:, -count:].float()
