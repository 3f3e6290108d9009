"""The masked autoencoder of AudioMAR: an encoder of what is known, a decoder of all places.

MAR (Li et al. 2024, arXiv:2406.11838, section 4.2), after MAE (He et al. 2021, arXiv:2111.06377).
Tensor names inside blocks are timm's, which MAR's released weights have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mllm_audio.backbone import BackboneConfig
from mllm_audio.config import check_range


@dataclass(frozen=True, kw_only=True)
class AudioMARConfig:
    """Sizes of the encoder and the decoder; saved in `config.json`."""

    hidden_size: int = 768  # H, of both
    encoder_layers: int = 12  # blocks that see the prompt and the known latents
    decoder_layers: int = 12  # blocks that see all places
    num_heads: int = 12  # of attention, in both
    dropout: float = 0.1  # on attention and projections, as MAR

    def __post_init__(self) -> None:
        """Check ranges, and that heads divide the width."""
        sizes = ("hidden_size", "encoder_layers", "decoder_layers", "num_heads")
        check_range("audiomar", self, 1, 1_000_000, *sizes)
        check_range("audiomar", self, 0, 1, "dropout")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )

    @classmethod
    def like(cls, backbone: BackboneConfig) -> AudioMARConfig:
        """Take as many blocks as a decoder has, half of them for the encoder, as the paper.

        Raises:
            ValueError: for an odd number of blocks.
        """
        half, odd = divmod(backbone.num_layers, 2)
        if odd or not half:
            raise ValueError(
                f"backbone.num_layers={backbone.num_layers}, AudioMAR needs as many blocks in its "
                f"encoder as in its decoder; set backbone.num_layers={2 * half + 2}"
            )
        return cls(
            hidden_size=backbone.hidden_size,
            encoder_layers=half,
            decoder_layers=half,
            num_heads=backbone.num_heads,
            dropout=backbone.dropout,
        )


class Attention(nn.Module):
    """Attention without a direction."""

    def __init__(self, config: AudioMARConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Mix (B, T, H) over the elements that the (B, T) mask holds true, None is all of them."""
        heads, dropout = self.config.num_heads, self.config.dropout if self.training else 0.0
        qkv = self.qkv(hidden).unflatten(-1, (3, heads, -1))  # (B, T, 3, heads, H / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, H / heads) each
        allowed = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
        mixed = F.scaled_dot_product_attention(query, key, value, allowed, dropout)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (B, T, H)
        return F.dropout(projected, dropout)


class MLP(nn.Module):
    """Two layers with an exact GELU, four times as wide inside."""

    def __init__(self, config: AudioMARConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.fc2 = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform (B, T, H)."""
        inner = F.dropout(F.gelu(self.fc1(hidden)), self.dropout, self.training)
        return F.dropout(self.fc2(inner), self.dropout, self.training)


class Block(nn.Module):
    """A pre-LN transformer block: timm's, or a GPT-2 block that looks both ways."""

    def __init__(self, config: AudioMARConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform (B, T, H) under a (B, T) mask of the elements to look at."""
        hidden = hidden + self.attn(self.norm1(hidden), mask)
        transformed: Tensor = hidden + self.mlp(self.norm2(hidden))
        return transformed


class Stack(nn.ModuleList):
    """Blocks one after another."""

    def __init__(self, config: AudioMARConfig, num_layers: int) -> None:
        super().__init__(Block(config) for _ in range(num_layers))
        self.gradient_checkpointing = False  # compute the blocks twice to store less

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Transform (B, T, H) under a (B, T) mask of the elements to look at."""
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, mask, use_reentrant=False)
            else:
                hidden = block(hidden, mask)
        return hidden


def initialise(module: nn.Module) -> None:
    """Draw a module's linear layers xavier-uniform, with zero bias, as MAR does."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
