"""Int8 weights for decoding on a CPU: a quarter of the memory, and of what a step reads.

Each row of a weight, an output channel, has a scale of its own, symmetric around 0, as in W8A16 of
`torchao`. Activations stay floating point: none is quantised, so no row depends on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

LARGEST = 127  # of a weight; -128 is not used
# Up to here the kernel for int8 weights, which reads them as they are, is faster than to widen them
# and multiply in float32. Measured on AVX2.
MOST_PACKED_ROWS = 16
# The kernel reads so many inputs at a time (AVX-512; AVX2 half of it), also beyond the last of a
# matrix whose width is no multiple: what lies there is no number, or no memory.
PACKED_INPUTS = 16


class Int8Linear(nn.Module):
    """A linear map with int8 weights.

    With scales s_o = max_i |W_oi| / 127, output o of (I,) inputs x is off by at most
    s_o / 2 * sum |x_i|; up to `MOST_PACKED_ROWS` rows on a CPU, of a multiple of `PACKED_INPUTS`
    inputs, these and products are rounded to bfloat16 besides, by at most 2^-8 of
    sum |W_oi x_i|, s_o / 2 * sum |x_i| included, each.
    """

    weight: Tensor  # (O, I) int8
    scale: Tensor  # (O,) float32
    bias: Tensor  # (O,) float32
    ones: Tensor  # (O,) bfloat16

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        if isinstance(linear, Conv1D):  # GPT-2's
            weight = weight.T.contiguous()
        # A row of zeros has any scale but 0.
        scale = (weight.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = (weight / scale[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias.float())
        ones = torch.ones(len(weight), dtype=torch.bfloat16, device=weight.device)
        # The kernel's own scales are bfloat16; ours are applied after it.
        self.register_buffer("ones", ones, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., I) to (..., O) float32."""
        rows = inputs.reshape(-1, inputs.shape[-1])  # (R, I)
        is_few = rows.device.type == "cpu" and 0 < len(rows) <= MOST_PACKED_ROWS
        if is_few and rows.shape[1] % PACKED_INPUTS == 0:
            products = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.ones)
        else:
            products = F.linear(rows.float(), self.weight.float())
        outputs = torch.addcmul(self.bias, products.float(), self.scale)  # (R, O)
        return outputs.view(*inputs.shape[:-1], len(self.bias))


def to_int8(module: nn.Module) -> None:
    """Convert what is linear in a module to `Int8Linear`, in place; it cannot be trained any more.

    Those named projection stay as they are: in a head they are 6 % of the weights, between the
    network and what it is given or gives, and in int8 they make as much error as all the others. Of
    the head of the paper (3 x 1024, random weights) the network's output is then off by 0.8 % in
    relative norm, and a latent after 100 steps by 1.2 %.

    Raises:
        ValueError: if there is nothing to convert, as in a head that was converted before.
    """
    found = [
        (owner, name, child)
        for owner in module.modules()
        for name, child in owner.named_children()
        if isinstance(child, (nn.Linear, Conv1D)) and not name.endswith("projection")
    ]
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no nn.Linear to convert, expected float weights; convert "
            "it once only"
        )
    for owner, name, child in found:
        setattr(owner, name, Int8Linear(child))
