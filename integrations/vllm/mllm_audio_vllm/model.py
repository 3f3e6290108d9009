"""The model that vLLM runs: its own backbone, twin KV caches, and mllm-audio's `AudioModality`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.model_executor.models.utils import maybe_prefix

from mllm_audio.config import from_dict
from mllm_audio.modality import AudioConfig, AudioModality
from mllm_audio.pretrained import load_text_tokenizer
from mllm_audio.text import SpecialIds
from mllm_audio_vllm.checks import ADDRESS, BACKBONES, settings
from mllm_audio_vllm.decoding import Choices, Decoder, Held, Row
from mllm_audio_vllm.frames import Sender
from mllm_audio_vllm.state import RequestState
from mllm_audio_vllm.twin import add_twins

PREFIX = "audio."  # of the modality's tensors in a checkpoint


class AudioLanguageModel(nn.Module):
    """Any backbone of `BACKBONES` with a voice.

    One step is: `begin_step` by the model runner's adapter, `forward`, `compute_logits`. With
    guidance, `forward` runs the elements of the step twice, the unconditional ones below the
    conditional ones, and its states are (T, 2H).
    """

    embeds: Tensor  # (T, H) of elements that are no text
    is_held: Tensor  # (T, 1) bool, of them those alike in both branches
    is_prompt: Tensor  # (T, 1) bool, of them those that the null prompt replaces

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        config = model.hf_config
        self.special = SpecialIds.of(load_text_tokenizer(model.tokenizer))
        self.audio_config: AudioConfig = from_dict(AudioConfig, dict(config.audio), "config.json")
        self.limit: int = model.max_model_len
        module, name = BACKBONES[config.model_type].split(":")
        backbone = getattr(import_module(module), name)
        self.lm = backbone(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "lm"))
        self.has_twins = bool(settings(vllm_config).get("guidance", True))
        if self.has_twins:
            add_twins(self.lm, vllm_config)
        self.make_empty_intermediate_tensors = self.lm.make_empty_intermediate_tensors
        self.audio = self._modality(config.hidden_size)
        size, hidden = vllm_config.scheduler_config.max_num_batched_tokens, config.hidden_size
        # Buffers whose address never changes, as captured graphs want them.
        for buffer, shape, dtype in (
            ("embeds", (size, hidden), model.dtype),
            ("is_held", (size, 1), torch.bool),
            ("is_prompt", (size, 1), torch.bool),
        ):
            self.register_buffer(buffer, torch.zeros(shape, dtype=dtype), persistent=False)
        self.decoder = Decoder(self.audio, self.special, _shared)
        self.rows: list[Row] | None = None
        self.last_places: Tensor | None = None
        self.sender: Sender | None = None
        self.num_steps = 0

    def _modality(self, hidden_size: int) -> AudioModality:
        """Build the modality in float32, whatever the backbone's type."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return AudioModality(self.audio_config, hidden_size).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint: the backbone by its own rules, the modality strictly."""
        mine: dict[str, Tensor] = {}
        others = []
        for name, tensor in weights:
            if name.startswith(PREFIX):
                mine[name.removeprefix(PREFIX)] = tensor
            else:
                others.append((name, tensor))
        self.audio.load_state_dict(mine)
        loaded = {f"lm.{name}" for name in self.lm.load_weights(others)}
        return loaded | {f"audio.{name}" for name, _ in self.audio.named_parameters()}

    def state_of(self, options: Any, prompt_ids: Sequence[int]) -> RequestState | None:
        """Make the state of a request; None for one of text."""
        if options is None:
            return None
        device = self.audio.latent_mean.device
        state = RequestState(
            options, prompt_ids, self.special, self.audio_config, self.limit, device
        )
        longest = state.room.lengths[1]
        if not self.has_twins and options.generation.is_guided(longest):
            raise ValueError("found guidance, which this server was started without")
        return state

    # ---- before the step, by the adapter of the model runner

    @torch.inference_mode()
    def begin_step(self, rows: list[Row], input_ids: Tensor) -> None:
        """Embed what the step's elements hold beside text.

        Args:
            rows: in the order of the flattened batch.
            input_ids: (T,) of it.
        """
        self.rows, self.num_steps = rows, self.num_steps + 1
        places = torch.tensor([row.offset + row.count - 1 for row in rows], device=input_ids.device)
        self.last_ids = input_ids[places]
        self.is_held.zero_()
        self.is_prompt.zero_()
        marker = self._marker() if any(row.state and row.state.spans for row in rows) else None
        if marker is not None:
            self._hold(self.decoder.held(rows, marker), self.is_held)
        self._hold(self.decoder.prompted(rows), self.is_prompt)

    def _marker(self) -> Tensor:
        """Embed `<|audio_start|>`, (H,), as it stands where nothing is predicted."""
        if self.audio.start is not None:
            return self.audio.start
        marker = torch.tensor([self.special.audio_start], device=self.embeds.device)
        embeds: Tensor = self.lm.embed_input_ids(marker)
        return embeds[0]

    def _hold(self, held: Held | None, mask: Tensor) -> None:
        if held is not None:
            self.embeds[held.places] = held.embeds.to(self.embeds.dtype)
            mask[held.places] = True

    # ---- the step itself; graphs may capture it

    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Embed text ids."""
        embeds: Tensor = self.lm.embed_input_ids(input_ids)
        return embeds

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the backbone on (T,) ids at (T,) positions; return (T, H) or, with twins, (T, 2H)."""
        size = positions.shape[-1]
        is_start = (input_ids == self.special.audio_start)[:, None]
        is_end = (input_ids == self.special.audio_end)[:, None]
        is_held, is_prompt = self.is_held[:size], self.is_prompt[:size]
        embeds = self.lm.embed_input_ids(input_ids)  # (T, H)
        start = embeds if self.audio.start is None else self.audio.start.to(embeds.dtype)
        first = self.audio.embed_targets(torch.zeros_like(positions[:1])).to(embeds.dtype)  # (1, H)
        embeds = torch.where(is_start, start + first, embeds)
        cond = torch.where(is_held | is_prompt, self.embeds[:size], embeds)
        if not self.has_twins:
            states: Tensor = self._backbone(None, positions, None, cond)
            return states
        # The null prompt's k-th vector stands at position k, its last one ever after.
        null = self.audio.null_prompt[positions.clamp(max=len(self.audio.null_prompt) - 1)]
        is_audio = (is_held | is_start | is_end) & ~is_prompt
        uncond = torch.where(is_audio, cond, null.to(cond.dtype))
        both = self._backbone(
            None, torch.cat([positions, positions]), None, torch.cat([cond, uncond])
        )
        return torch.cat([both[:size], both[size:]], dim=-1)

    @property
    def _backbone(self) -> nn.Module:
        """Give the decoder below the text head."""
        return getattr(self.lm, "model", None) or self.lm.transformer

    # ---- behind the step, one row per request

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Score the next ids, (R, V); markers and places of latents are decided here."""
        cond, uncond = hidden_states, None
        if self.has_twins:
            cond, uncond = hidden_states.chunk(2, dim=-1)
        logits: Tensor | None = self.lm.compute_logits(cond.contiguous())
        rows, self.rows = self.rows, None
        if rows is None:  # a rehearsal of the engine's
            return logits
        assert len(rows) == len(hidden_states), (len(rows), hidden_states.shape)
        states = cond.float(), None if uncond is None else uncond.float()
        choices = self.decoder.choose(rows, self.last_ids.tolist(), *states)
        if choices.latents is not None and get_tensor_model_parallel_rank() == 0:
            self._send(choices)
        if logits is not None:
            self._edit(logits, choices)
        return logits

    def _edit(self, logits: Tensor, choices: Choices) -> None:
        """Leave only what may come: text never holds a marker that the model did not choose."""
        special = self.special
        logits[:, [special.audio, special.audio_end, special.cond]] = -torch.inf
        if choices.closed:
            logits[list(choices.closed), special.audio_start] = -torch.inf
        if choices.forced:
            numbers, ids = (list(values) for values in zip(*choices.forced, strict=True))
            logits[numbers] = -torch.inf
            logits[numbers, ids] = 0.0

    def _send(self, choices: Choices) -> None:
        named = [number for number, (key, _) in enumerate(choices.drawn) if key]
        address = os.environ.get(ADDRESS)
        if not named or address is None:
            return
        if self.sender is None:
            self.sender = Sender(address)
        assert choices.latents is not None
        self.sender.send([choices.drawn[n] for n in named], choices.latents[named])

    @staticmethod
    def get_model_state_cls() -> type:
        """Tell vLLM's V2 model runner who keeps the state of requests."""
        from mllm_audio_vllm.runner_v2 import AudioModelState

        return AudioModelState


def _shared(tensor: Tensor) -> Tensor:
    """Give every process of a tensor-parallel group the tensor of the first."""
    if get_tensor_model_parallel_world_size() == 1:
        return tensor
    shared: Tensor = get_tp_group().broadcast(tensor.contiguous(), src=0)
    return shared
