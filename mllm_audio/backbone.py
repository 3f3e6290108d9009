"""What differs between Hugging Face decoders: building one, running it on embeddings."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mllm_audio.config import check_range, nearest


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A randomly initialised decoder; sizes mean the same in every family."""

    family: str = "gpt2"  # key in FAMILIES
    hidden_size: int = 768  # H
    num_layers: int = 24
    num_heads: int = 12
    max_positions: int = 512  # text, prompt and audio together, before any token is dropped
    dropout: float = 0.1  # on attention and residual projections; LLaMA has attention dropout only

    def __post_init__(self) -> None:
        """Check the family's name and that heads divide the width."""
        if self.family not in FAMILIES:
            raise ValueError(
                f"unknown backbone family {self.family!r}; {nearest(self.family, FAMILIES)}"
            )
        sizes = ("hidden_size", "num_layers", "num_heads", "max_positions")
        check_range("backbone", self, 1, 1_000_000, *sizes)
        check_range("backbone", self, 0, 1, "dropout")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"backbone.hidden_size={self.hidden_size} is not a multiple of "
                f"backbone.num_heads={self.num_heads}"
            )


def _gpt2(config: BackboneConfig, vocab_size: int) -> PretrainedConfig:
    """Size a GPT-2 whose blocks are the paper's: exact GELU, pre-LN with eps 1e-6, biases."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=config.max_positions,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        activation_function="gelu",
        layer_norm_epsilon=1e-6,
        embd_pdrop=0.0,
        resid_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=None,
        eos_token_id=None,
    )


def _llama(config: BackboneConfig, vocab_size: int) -> PretrainedConfig:
    """Size a LLaMA with SwiGLU at 8/3 of the width, rounded up to a multiple of 32."""
    intermediate_size = -(-config.hidden_size * 8 // 3 // 32) * 32
    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=config.max_positions,
        hidden_size=config.hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        attention_dropout=config.dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


FAMILIES = {"gpt2": _gpt2, "llama": _llama}


def build_backbone(config: BackboneConfig, vocab_size: int) -> PreTrainedModel:
    """Build a decoder with random weights; consumes torch's global random state."""
    return from_hf_config(FAMILIES[config.family](config, vocab_size))


def from_hf_config(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal LM that an HF configuration describes, with random float32 weights."""
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
    )


def run(
    backbone: PreTrainedModel,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Run the decoder below its text head.

    Args:
        backbone: any HF causal LM.
        inputs_embeds: (B, T, H).
        position_ids: (B, T), gaps allowed.
        attention_mask: (B, cached + T) bool, false where a row is padded; None if nowhere.
        cache: keys and values of earlier positions, extended in place.

    Returns:
        (B, T, H) hidden states after the final norm.
    """
    if attention_mask is None:
        # Never None: transformers would read a gap in `position_ids` as the start of another
        # packed sequence and forbid attention across it. All true keeps SDPA's causal path.
        attention_mask = torch.ones(
            inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device
        )
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
    with _attention_kernel(inputs_embeds):
        output = backbone.base_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **options,
        )
    hidden_states: Tensor = output.last_hidden_state
    return hidden_states


def _attention_kernel(inputs_embeds: Tensor) -> AbstractContextManager[None]:
    """Pick the attention kernel for training on (B, T, H) embeddings.

    torch's fused CPU kernel takes three times as long as plain matrix products in bf16 on rows
    this short; everywhere else the fused kernel is right.
    """
    short = inputs_embeds.shape[1] <= 64
    if short and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return kernel
    return nullcontext()
