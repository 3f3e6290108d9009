"""The network of every head: an MLP of residual blocks, modulated by condition and timestep.

The denoising MLP of MAR (Li et al. 2024, arXiv:2406.11838, section 4.1): adaptive layer norm
(Peebles & Xie 2023, arXiv:2212.09748) from the sum of the two embeddings, in every block.
`interop.adaln_mlp_from_mar` maps its released weights to the names used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability
from torch.nn import functional as F

from mllm_audio.diffusion.samplers import Predict, guided

NUM_SINUSOIDS = 256  # channels of the timestep code: cosines, then sines
MAX_PERIOD = 10_000  # of the slowest sinusoid, in timesteps, over 2 pi
FEW_ROWS = {"AVX512": (1, 2, 3, 4), "": (2, 3)}  # multiplied as columns by a CPU, any other
MODULATED_ROWS = 256  # modulated at once while sampling, which bounds what that holds


def _modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale (R, W); all zeros is the identity."""
    return hidden * (1 + scale) + shift


def project(linear: nn.Module, rows: Tensor) -> Tensor:
    """Apply `linear` to (..., I), by the kernel that is fastest on a CPU where nothing is learned.

    The product of weights and few columns takes a third to two thirds of the time of that of rows
    and weights; with AVX-512 also that of 4, and of one column written twice, which is spread over
    the cores. Without instructions for bfloat16 many rows are multiplied in float32 in a quarter of
    the time. Beside bfloat16 weights rows are rounded to them.
    """
    if linear.bias.dtype == torch.bfloat16:
        rows = rows.bfloat16()
    if rows.device.type == "cpu" and type(linear) is nn.Linear and not torch.is_grad_enabled():
        cpu = get_cpu_capability()
        is_float = rows.dtype == linear.weight.dtype == torch.float32
        if is_float and rows.dim() == 2 and len(rows) in FEW_ROWS.get(cpu, FEW_ROWS[""]):
            twice = rows.repeat(2, 1) if len(rows) == 1 else rows
            columns = torch.addmm(linear.bias[:, None], linear.weight, twice.t())  # (O, R)
            return columns.t()[: len(rows)].contiguous()
        is_half = rows.dtype == linear.weight.dtype == torch.bfloat16
        if is_half and rows.shape[:-1].numel() > 4 and cpu == "AVX2":
            weight, bias = linear.weight.float(), linear.bias.float()
            return F.linear(rows.float(), weight, bias).bfloat16()
    projected: Tensor = linear(rows)
    return projected


def _normalised(norm: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """Apply `norm` to (R, W); beside bfloat16 weights in float32, as all that is no product."""
    if norm.weight.dtype == torch.bfloat16:
        weight, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(hidden.float(), norm.normalized_shape, weight, bias, norm.eps)
    normalised: Tensor = norm(hidden)
    return normalised


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
        hidden = self.linear_in(code.to(self.linear_in.bias.dtype))
        return self.linear_out(F.silu(hidden))


class AdaLNBlock(nn.Module):
    """Residual MLP whose input and output are modulated by an embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear_in = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """Transform (R, W) under (R, 3W), what `self.modulation` made; returns (R, W)."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        update = _modulate(_normalised(self.norm, hidden), shift, scale)
        update = project(self.linear_out, F.silu(project(self.linear_in, update)))
        return hidden + gate * update


class AdaLNOutput(nn.Module):
    """Modulated norm without weights of its own, then the projection to the output."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, out_dim)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """Project (R, W) under (R, 2W), what `self.modulation` made, to (R, out_dim)."""
        shift, scale = modulation.chunk(2, dim=-1)
        return project(self.projection, _modulate(self.norm(hidden), shift, scale))


class AdaLNMLP(nn.Module):
    """Predict something about noisy latents, given their timestep and a condition.

    Most weights make the modulations, of timestep and condition and not of the latents. Sampling
    knows its timesteps beforehand, so `modulations` makes them for many calls in one product, and a
    call reads the other weights only. Inputs of any precision are cast to that of the weights;
    outputs are float32.
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
        return self.condition_projection(condition.to(self.condition_projection.bias.dtype))

    def modulate(self, timestep_embedding: Tensor, condition_embedding: Tensor) -> list[Tensor]:
        """Make (..., 3W) for each block and (..., 2W) for the output of two (..., W)."""
        if not torch.is_grad_enabled():
            timestep_embedding = timestep_embedding.float()
        embedding = F.silu(timestep_embedding + condition_embedding)
        return [project(layer.modulation, embedding) for layer in (*self.blocks, self.output)]

    def modulations(
        self, timesteps: Tensor, condition_embedding: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """Give what `forward` takes in each of K calls, for `MODULATED_ROWS` rows at a time.

        Args:
            timesteps: (K,), each for all rows, in the order of the calls.
            condition_embedding: (R, W), of `embed_condition`.
        """
        embeddings = self.timestep_embedding(timesteps)  # (K, W)
        num_calls = max(1, MODULATED_ROWS // max(1, len(condition_embedding)))
        for some in embeddings.split(num_calls):
            yield from zip(*self.modulate(some[:, None], condition_embedding), strict=True)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor | None = None,
        condition_embedding: Tensor | None = None,
        modulation: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Map (R, D) noisy latents to (R, out_dim) float32.

        Args:
            noisy: (R, D).
            timesteps: (R,), or (1,) for all rows.
            condition_embedding: (R, W), of `embed_condition`.
            modulation: in place of these two, one of `modulations`.
        """
        if modulation is None:
            assert timesteps is not None and condition_embedding is not None
            modulation = self.modulate(self.timestep_embedding(timesteps), condition_embedding)
        noisy = noisy.to(self.input_projection.bias.dtype)
        hidden = project(self.input_projection, noisy)  # (R, W)
        if not torch.is_grad_enabled():
            hidden = hidden.float()
        for block, of_block in zip(self.blocks, modulation, strict=False):
            hidden = block(hidden, of_block)
        return self.output(hidden, modulation[-1]).float()


def predict_under(
    network: AdaLNMLP,
    condition: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float | Tensor,
    timesteps: Tensor | None = None,
) -> Predict:
    """Close `network` over (R, Z) conditions, as samplers want it.

    With guidance both branches go through one batch. Only the first D channels are guided; a
    variance behind them is the conditional branch's. Scale 1 never runs the second branch;
    an (R, 1) scale for each row always does.

    Args:
        network: weights are read when it is called and not kept, except within a chain.
        condition: (R, Z).
        unconditional: (R, Z), or None without guidance.
        guidance_scale: MAR's s, or (R, 1).
        timesteps: (K,), those of the calls to come, in order, which is much faster: the closure
            serves one chain, and does not read the timesteps it is called with. None: any call.

    Raises:
        ValueError: if `guidance_scale` asks for a branch that is not given.
    """
    is_guided = isinstance(guidance_scale, Tensor) or guidance_scale != 1
    if is_guided:
        if unconditional is None:
            raise ValueError(
                f"guidance_scale is {guidance_scale} but no unconditional hidden states were "
                "given; pass them, or set guidance_scale=1"
            )
        condition = torch.cat([condition, unconditional])  # (2R, Z)
    embedding = network.embed_condition(condition)  # (R or 2R, W)
    modulations = None if timesteps is None else network.modulations(timesteps, embedding)

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        rows = torch.cat([noisy, noisy]) if is_guided else noisy
        if modulations is None:
            output = network(rows, timestep, embedding)
        else:
            output = network(rows, modulation=next(modulations))
        if not is_guided:
            return output
        dim = noisy.shape[-1]
        first, second = output.chunk(2)  # (R, out_dim) each
        prediction = guided(first[:, :dim], second[:, :dim], guidance_scale)  # (R, D)
        return torch.cat([prediction, first[:, dim:]], dim=-1)

    return predict
