"""The network of every head: an MLP of residual blocks, modulated by condition and timestep.

The denoising MLP of MAR (Li et al. 2024, arXiv:2406.11838, section 4.1): adaptive layer norm
(Peebles & Xie 2023, arXiv:2212.09748) from the sum of the two embeddings, in every block.
`interop.adaln_mlp_from_mar` maps its released weights to the names used here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm_audio.diffusion.samplers import Predict, guided

NUM_SINUSOIDS = 256  # channels of the timestep code: cosines, then sines
MAX_PERIOD = 10_000  # of the slowest sinusoid, in timesteps, over 2 pi


def _modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale (R, W); all zeros is the identity."""
    return hidden * (1 + scale) + shift


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, through a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(NUM_SINUSOIDS, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed (R,) timesteps, whole or not, as (R, W)."""
        half = NUM_SINUSOIDS // 2
        exponents = torch.arange(half, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * (-math.log(MAX_PERIOD) * exponents).exp()
        code = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (R, 256)
        hidden = self.linear_in(code.to(self.linear_in.weight.dtype))
        return self.linear_out(F.silu(hidden))


class AdaLNBlock(nn.Module):
    """Residual MLP whose input and output are modulated by an embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_in = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Transform (R, W) under (R, W) `embedding`, which comes activated; returns (R, W)."""
        shift, scale, gate = self.modulation(embedding).chunk(3, dim=-1)
        update = _modulate(self.norm(hidden), shift, scale)
        return hidden + gate * self.linear_out(F.silu(self.linear_in(update)))


class AdaLNOutput(nn.Module):
    """Modulated norm without weights of its own, then the projection to the output."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, out_dim)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Project (R, W) to (R, out_dim)."""
        shift, scale = self.modulation(embedding).chunk(2, dim=-1)
        return self.projection(_modulate(self.norm(hidden), shift, scale))


class AdaLNMLP(nn.Module):
    """Predict something about noisy latents, given their timestep and a condition.

    Sampling calls the network many times under one condition, so the condition is embedded
    separately. Inputs of any precision are cast to that of the weights; outputs are float32.
    """

    def __init__(
        self, latent_dim: int, condition_dim: int, out_dim: int, width: int, num_blocks: int
    ) -> None:
        super().__init__()
        self.timestep_embedding = TimestepEmbedding(width)
        self.condition_projection = nn.Linear(condition_dim, width)
        self.input_projection = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(num_blocks))
        self.output = AdaLNOutput(width, out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as MAR: every block starts as the identity, and the output is zero."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.startswith("timestep_embedding"):
                nn.init.normal_(module.weight, std=0.02)
            elif name.endswith(("modulation", "output.projection")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Embed (R, Z) conditions as (R, W), for `forward`."""
        return self.condition_projection(condition.to(self.condition_projection.weight.dtype))

    def forward(self, noisy: Tensor, timesteps: Tensor, condition_embedding: Tensor) -> Tensor:
        """Map (R, D) noisy latents to (R, out_dim) float32.

        `timesteps` is (R,), or (1,) for all rows; `condition_embedding` is (R, W).
        """
        hidden = self.input_projection(noisy.to(self.input_projection.weight.dtype))  # (R, W)
        embedding = F.silu(self.timestep_embedding(timesteps) + condition_embedding)  # (R, W)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.output(hidden, embedding).float()


def predict_under(
    network: AdaLNMLP,
    condition: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float | Tensor,
) -> Predict:
    """Close `network` over (R, Z) conditions, as samplers want it.

    With guidance both branches go through one batch. Only the first D channels are guided; a
    variance behind them is the conditional branch's. Scale 1 never runs the second branch;
    an (R, 1) scale for each row always does.

    Raises:
        ValueError: if `guidance_scale` asks for a branch that is not given.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
        condition_embedding = network.embed_condition(condition)  # (R, W)
        return lambda noisy, timesteps: network(noisy, timesteps, condition_embedding)
    if unconditional is None:
        raise ValueError(
            f"guidance_scale is {guidance_scale} but no unconditional hidden states were given; "
            "pass them, or set guidance_scale=1"
        )
    both = network.embed_condition(torch.cat([condition, unconditional]))  # (2R, W)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        dim = noisy.shape[-1]
        first, second = network(torch.cat([noisy, noisy]), timesteps, both).chunk(2)  # (R, out)
        prediction = guided(first[:, :dim], second[:, :dim], guidance_scale)  # (R, D)
        return torch.cat([prediction, first[:, dim:]], dim=-1)

    return predict
