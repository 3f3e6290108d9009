"""What differs between Hugging Face decoders: building one, running it on embeddings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mllm_audio.attention import square_mask, window_binds
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
    initialisation: str = "transformers"  # key in INITIALISATIONS: the library's own, or MAR's

    def __post_init__(self) -> None:
        """Check the family's name and that heads divide the width."""
        if self.family not in FAMILIES:
            raise ValueError(
                f"unknown backbone family {self.family!r}; {nearest(self.family, FAMILIES)}"
            )
        if self.initialisation not in INITIALISATIONS:
            raise ValueError(
                f"unknown backbone initialisation {self.initialisation!r}; "
                f"{nearest(self.initialisation, INITIALISATIONS)}"
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
    backbone = from_hf_config(FAMILIES[config.family](config, vocab_size))
    INITIALISATIONS[config.initialisation](backbone)
    return backbone


@torch.no_grad()
def _xavier(backbone: PreTrainedModel) -> None:
    """Draw the blocks' matrices xavier-uniform, and make their biases zero, as MAR does."""
    for name, parameter in blocks(backbone).named_parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


INITIALISATIONS: dict[str, Callable[[PreTrainedModel], None]] = {
    "transformers": lambda backbone: None,
    "xavier": _xavier,
}


@torch.no_grad()
def silence(backbone: PreTrainedModel) -> dict[str, torch.Size]:
    """Hold the tables of text ids and positions at zero: the model has prompts and audio only.

    They stay because the checkpoint is one of the family's, but are no parameters of the model.

    Returns:
        Their names and shapes.
    """
    inside = {id(p) for p in blocks(backbone).parameters()}
    silent = {k: p for k, p in backbone.named_parameters() if p.dim() == 2 and id(p) not in inside}
    for table in silent.values():
        table.zero_()
        table.requires_grad_(False)
    return {name: table.shape for name, table in silent.items()}


def from_hf_config(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the causal LM that an HF configuration describes, with random weights."""
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=False
    )


def blocks(backbone: PreTrainedModel) -> nn.ModuleList:
    """Find the decoder's blocks, whatever the family calls them."""
    lists = [m for m in backbone.base_model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def embedding_scale(backbone: PreTrainedModel) -> float:
    """Return what the embedding layer multiplies its rows by (Gemma), else 1."""
    return float(getattr(backbone.get_input_embeddings(), "embed_scale", 1.0))


def is_tied(backbone: PreTrainedModel) -> bool:
    """Tell whether input and output embeddings are one tensor."""
    return backbone.get_input_embeddings().weight is backbone.get_output_embeddings().weight


def text_logits(
    backbone: PreTrainedModel,
    hidden_states: Tensor,
    edit: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Apply the text head to (..., H) hidden states; return (..., V).

    `edit` sees the logits before the scaling (Granite, Cohere) and soft cap (Gemma) of some
    families.
    """
    logits: Tensor = backbone.get_output_embeddings()(hidden_states)
    if edit is not None:
        logits = edit(logits)
    config = backbone.config
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def run(
    backbone: PreTrainedModel,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None = None,
    cache: Cache | None = None,
    segment_ids: Tensor | None = None,
    has_copies: bool = False,
) -> Tensor:
    """Run the decoder below its text head.

    Args:
        backbone: any HF causal LM.
        inputs_embeds: (B, T, H).
        position_ids: (B, T), gaps allowed.
        attention_mask: (B, cached + T) bool, false where a row is padded; None if nowhere. Or who
            looks at whom, as `windowed` returns it.
        cache: keys and values of earlier positions, extended in place.
        segment_ids: (B, T) of packed rows, which attention must not cross; without a cache.
        has_copies: whether elements at the position of the one before them are copies of it, see
            `Audio.far`; without a cache.

    Returns:
        (B, T, H) hidden states after the final norm.
    """
    if attention_mask is None:
        # Never None: transformers would read a gap in `position_ids` as the start of another
        # packed sequence and forbid attention across it. All true keeps SDPA's causal path.
        attention_mask = torch.ones(
            inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device
        )
    mask = attention_mask
    hides = segment_ids is not None or has_copies
    if cache is None and (hides or window_binds(backbone, position_ids)):
        mask = square_mask(backbone, position_ids, segment_ids, has_copies)
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
    with _attention_kernel(backbone, inputs_embeds):
        output = backbone.base_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=mask,
            **options,
        )
    hidden_states: Tensor = output.last_hidden_state
    return hidden_states


def check_positions(backbone: PreTrainedModel, position_ids: Tensor) -> None:
    """Refuse positions the backbone was not trained with.

    Raises:
        ValueError: naming the limit.
    """
    limit = backbone.config.max_position_embeddings
    last = int(position_ids.max())
    if last >= limit:
        raise ValueError(
            f"a sequence of {last + 1} text and audio positions is longer than the model's "
            f"max_position_embeddings={limit}; shorten the text or the audio"
        )


def _attention_kernel(
    backbone: PreTrainedModel, inputs_embeds: Tensor
) -> AbstractContextManager[None]:
    """Pick the attention kernel for training on (B, T, H) embeddings.

    torch's fused CPU kernel takes three times as long as plain matrix products in bf16 on rows
    this short; everywhere else the fused kernel is right, also where blocks are computed a second
    time, out of reach of what is picked here.
    """
    short = inputs_embeds.shape[1] <= 64 and not backbone.is_gradient_checkpointing
    if short and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return kernel
    return nullcontext()
