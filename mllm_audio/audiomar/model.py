"""`AudioMAR`: the masked autoencoder with `AudioModality`; training, saving, loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from mllm_audio.audiomar.network import AudioMARConfig, Stack, initialise
from mllm_audio.config import from_dict, read_json, to_dict
from mllm_audio.files import write_atomic
from mllm_audio.folder import read_audio_config
from mllm_audio.modality import AudioConfig, AudioModality, pad_rows
from mllm_audio.types import Batch, Losses, StepCounts
from mllm_audio.weights import check_fit, read_tensors, write_tensors

ARCHITECTURE = "AudioMAR"


class AudioMAR(nn.Module):
    """Predict masked latents from the prompt and the known ones, wherever they stand.

    Of `AudioModality` it uses the embedding of latents, prompts and the null prompt (MAR's class
    and fake latent), the content positions (the part of MAR's encoder positions that is not the
    buffer's), the target positions (MAR's diffusion positions), the head and the statistics.
    Below, L is the length of the prompt, and N the most latents of a clip in the batch.

    Attributes:
        config: sizes of the blocks.
        audio: every audio parameter that decoders have too.
        encoder_blocks: transform the prompt and the known latents.
        decoder_blocks: transform the prompt and all places.
    """

    def __init__(self, config: AudioMARConfig, audio: AudioConfig) -> None:
        super().__init__()
        _check(audio)
        self.config, width = config, config.hidden_size
        self.audio = AudioModality(audio, width)
        self.audio.start = None  # nothing here is predicted from a start
        self.prompt_positions = nn.Embedding(audio.prompt_length, width)
        self.encoder_blocks = Stack(config, config.encoder_layers)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder_positions = nn.Embedding(audio.prompt_length + audio.max_tokens, width)
        self.decoder_blocks = Stack(config, config.decoder_layers)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        for module in (self.encoder_blocks, self.decoder_embed, self.decoder_blocks):
            initialise(module)
        for table in (self.prompt_positions, self.decoder_positions):
            nn.init.normal_(table.weight, std=audio.position_init_std)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.audio.latent_mean.device

    @property
    def blocks(self) -> list[nn.Module]:
        """List the encoder's blocks, then the decoder's."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def gradient_checkpointing_enable(self) -> None:
        """Compute the blocks twice in training, to store less."""
        for stack in (self.encoder_blocks, self.decoder_blocks):
            stack.gradient_checkpointing = True

    def hidden_states(
        self, prompts: Tensor, latents: Tensor, is_known: Tensor, is_place: Tensor | None = None
    ) -> Tensor:
        """Transform what is known into a state for every place.

        Args:
            prompts: (B, L, H) embeddings.
            latents: (M, D) that are known, in row-major order of `is_known`.
            is_known: (B, N) bool.
            is_place: (B, N) bool, false where a row is padded; None if nowhere.

        Returns:
            (B, N, H), to which heads want the target positions added.
        """
        encoded = self.encode(prompts, latents, is_known)  # (E, H)
        return self.decode(encoded, is_known, is_place)[:, prompts.shape[1] :]  # (B, N, H)

    def encode(self, prompts: Tensor, latents: Tensor, is_known: Tensor) -> Tensor:
        """Transform the prompt and the known latents, and only those, each at its own position.

        MAR's norm of embeddings follows their sum with positions, and is the prompt's too.

        Args:
            prompts: (B, L, H) embeddings.
            latents: (M, D) that are known, in row-major order of `is_known`.
            is_known: (B, N) bool.

        Returns:
            (E, H), each row's prompt and known latents behind one another.
        """
        length = prompts.shape[1]
        known = self._project(latents) + self.audio.content_positions(is_known.nonzero()[:, 1])
        order = torch.arange(length, device=prompts.device)  # (L,)
        num_held = length + is_known.sum(dim=1)  # (B,)
        column = torch.arange(int(num_held.max()), device=prompts.device)  # (V,)
        is_held = column < num_held[:, None]  # (B, V), of rows padded on the right
        hidden = known.new_zeros(*is_held.shape, known.shape[1])  # (B, V, H)
        hidden[:, :length] = prompts + self.prompt_positions(order)
        hidden = hidden.masked_scatter((is_held & (column >= length))[..., None], known)
        hidden = self.encoder_blocks(self.audio.latent_norm(hidden), _mask(is_held))
        encoded: Tensor = self.encoder_norm(hidden)[is_held]
        return encoded

    def decode(self, encoded: Tensor, is_known: Tensor, is_place: Tensor | None = None) -> Tensor:
        """Transform all elements, the mask token where nothing is known.

        Args:
            encoded: (E, H), of `encode`.
            is_known: (B, N) bool.
            is_place: (B, N) bool, false where a row is padded; None if nowhere.

        Returns:
            (B, L+N, H) states.
        """
        is_prompt = is_known.new_ones(len(is_known), self.audio.config.prompt_length)  # (B, L)
        is_visible = torch.cat([is_prompt, is_known], dim=1)  # (B, L+N)
        known = self.decoder_embed(encoded)  # (E, H)
        hidden = self.mask_token.to(known.dtype).expand(*is_visible.shape, -1)  # (B, L+N, H)
        hidden = hidden.masked_scatter(is_visible[..., None], known)
        positions = torch.arange(is_visible.shape[1], device=is_visible.device)  # (L+N,)
        mask = None if is_place is None else _mask(torch.cat([is_prompt, is_place], dim=1))
        hidden = self.decoder_blocks(hidden + self.decoder_positions(positions), mask)
        states: Tensor = self.decoder_norm(hidden)
        return states

    def embed_prompts(self, prompts: Sequence[Tensor], is_null: Tensor) -> Tensor:
        """Embed streams of (B, L_s, D_s), the null prompt where (B, L) `is_null`; (B, L, H)."""
        embeds = self.audio.embed_prompts(prompts)
        null = self.audio.null_prompt.to(embeds.dtype)  # (1, H) or (L, H)
        return torch.where(is_null[..., None], null, embeds)

    def _project(self, latents: Tensor) -> Tensor:
        """Project (M, D) latents to (M, H), as `AudioModality.embed` before its norm."""
        rows = self.audio.normalise(latents)
        if self.training:
            rows = pad_rows(self.audio.disturb(rows))
        projected: Tensor = self.audio.latent_proj(rows)[: len(latents)]
        return projected

    def forward(
        self,
        batch: Batch,
        generator: torch.Generator | None = None,
        counts: StepCounts | None = None,
    ) -> Losses:
        """Compute the training losses of a batch, as `AudioLanguageModel.forward` does.

        Args:
            batch: rows of a prompt and a place for every latent, not packed.
            generator: of the noise in the head's loss.
            counts: what the loss is a mean over; by default what the batch holds.

        Raises:
            ValueError: if the rows are laid out otherwise.
        """
        length = self.audio.config.prompt_length
        _check_layout(batch, length)
        counts = counts or batch.counts
        places = slice(length, length + self.audio.config.max_tokens)  # without padding behind
        is_known, predicts = batch.is_audio[:, places], batch.predicts[:, places]  # (B, N)
        prompts = self.embed_prompts(batch.prompts, batch.is_null[:, :length])  # (B, L, H)
        states = self.hidden_states(prompts, batch.latents, is_known, is_known | predicts)
        predicted, positions = states[predicts], batch.target_positions  # (P, H), (P,)
        targets, weight = batch.target_latents, 1.0
        if not len(positions):  # the head must run in every process, or ZeRO waits for ever
            predicted, positions, weight = states[0, :1], positions.new_zeros(1), 0.0
            targets = predicted.new_zeros(1, self.audio.config.latent_dim)
        predicted = predicted.float() + self.audio.embed_targets(positions)
        per_latent = weight * self.audio.loss(predicted, targets, generator)  # (P,)
        audio = per_latent.sum() / max(1, counts.latents)
        nothing = torch.zeros_like(audio.detach())
        return Losses(
            total=audio,
            text=nothing,
            audio=audio.detach(),
            end=nothing,
            per_latent=per_latent.detach()[: len(batch.target_positions)],
        )

    def save_pretrained(
        self, folder: Path | str, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors`.

        Args:
            folder: made if absent.
            state_dict: weights to write instead of this model's, e.g. an average.
        """
        folder = Path(folder)
        write_tensors(state_dict if state_dict is not None else self.state_dict(), folder)
        values = {
            "architectures": [ARCHITECTURE],
            "model_type": ARCHITECTURE.lower(),
            **to_dict(self.config),
            "audio": to_dict(self.audio.config),
        }
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomic(folder / "config.json", text.encode())

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Load a folder that `save_pretrained` wrote, strictly, in evaluation mode.

        Raises:
            ValueError: if the folder is none, or tensors are missing, unknown or of another shape.
        """
        folder = Path(folder)
        audio = read_audio_config(folder)
        values = read_json(folder / "config.json", "train again, or restore the folder")
        if values.get("architectures") != [ARCHITECTURE]:
            raise ValueError(
                f"{folder} holds {values.get('architectures')}, expected an {ARCHITECTURE} that "
                "`mllm-audio train --preset audiomar_base` wrote"
            )
        known = {field.name for field in fields(AudioMARConfig)}
        sizes = {key: value for key, value in values.items() if key in known}
        config = from_dict(AudioMARConfig, sizes, str(folder / "config.json"))
        model = cls(config, audio)
        tensors = read_tensors(folder)
        check_fit(tensors, model.state_dict(), str(folder))
        model.load_state_dict(tensors)
        return model.eval()


def _check(audio: AudioConfig) -> None:
    """Refuse audio settings that AudioMAR has no use for.

    Raises:
        ValueError: naming the setting.
    """
    if not audio.prompt_streams:
        raise ValueError(
            "audio.prompt_streams is empty, AudioMAR is prompted by embeddings alone; start from "
            "--preset audiomar_base"
        )
    for key, wanted in (("end_of_audio", False), ("target_positions", True)):
        if getattr(audio, key) is not wanted:
            raise ValueError(
                f"audio.{key}={getattr(audio, key)}, AudioMAR needs {wanted}; set "
                f"audio.{key}={str(wanted).lower()}"
            )


def _check_layout(batch: Batch, length: int) -> None:
    """Refuse a batch whose rows are not a prompt of `length` elements and a place per latent.

    Raises:
        ValueError: with what was found.
    """
    if batch.segment_ids is not None:
        raise ValueError(
            "found packed rows, AudioMAR takes one clip a row; set data.pack_tokens=none"
        )
    prompts = 0 if batch.is_prompt is None else int(batch.is_prompt[:, :length].sum())
    rows = len(batch.input_ids)
    if prompts != rows * length or len(batch.prompts) == 0:
        raise ValueError(
            f"found {prompts} prompt embeddings at the head of {rows} rows, expected {length} in "
            "each; prepare the data with --conditioner"
        )
    if bool((batch.is_audio & batch.predicts).any()):
        raise ValueError(
            "found latents that predict the next one, AudioMAR predicts masked ones at their own "
            "places; set masking.hidden=own"
        )


def _mask(is_there: Tensor) -> Tensor | None:
    """Give attention a (B, T) mask only where some element is not there: without, it is faster."""
    return None if bool(is_there.all()) else is_there
