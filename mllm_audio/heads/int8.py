"""Int8 weights for a head that samples on a CPU: a quarter of the memory.

Each row of a weight, an output channel, has a scale of its own, symmetric around 0, as in W8A16 of
`torchao`. Activations stay floating point: none is quantised, so no row depends on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127  # of a weight; -128 is not used
# Up to here the kernel for int8 weights, which reads them as they are, is faster than to widen them
# and multiply in float32. Measured on AVX2.
MOST_PACKED_ROWS = 16


class Int8Linear(nn.Module):
    """A linear map with int8 weights.

    With scales s_o = max_i |W_oi| / 127, output o of (I,) inputs x is off by at most
    s_o / 2 * sum |x_i|; up to `MOST_PACKED_ROWS` rows on a CPU inputs and products are rounded to
    bfloat16 besides, by at most 2^-8 of sum |W_oi x_i|, s_o / 2 * sum |x_i| included, each.
    """

    weight: Tensor  # (O, I) int8
    scale: Tensor  # (O,) float32
    bias: Tensor  # (O,) float32
    ones: Tensor  # (O,) bfloat16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # A row of zeros has any scale but 0.
        scale = (weight.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = (weight / scale[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach().float())
        ones = torch.ones(len(weight), dtype=torch.bfloat16, device=weight.device)
        # The kernel's own scales are bfloat16; ours are applied after it.
        self.register_buffer("ones", ones, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., I) to (..., O) float32."""
        rows = inputs.reshape(-1, inputs.shape[-1])  # (R, I)
        if rows.device.type == "cpu" and 0 < len(rows) <= MOST_PACKED_ROWS:
            products = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.ones)
        else:
            products = F.linear(rows.float(), self.weight.float())
        outputs = torch.addcmul(self.bias, products.float(), self.scale)  # (R, O)
        return outputs.view(*inputs.shape[:-1], len(self.bias))


def to_int8(head: nn.Module) -> None:
    """Convert the linears of a head to `Int8Linear`, in place; it cannot be trained any more.

    Those named projection, 6 % of the weights, between the network and what it is given or gives,
    stay as they are: in int8 they make as much error as all the others. Of the head of the paper
    (3 x 1024, random weights) the network's output is then off by 0.8 % in relative norm, and a
    latent after 100 steps by 1.2 %.

    Raises:
        ValueError: if there is nothing to convert, as in a head that was converted before.
    """
    found = [
        (owner, name, child)
        for owner in head.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.Linear) and not name.endswith("projection")
    ]
    if not found:
        raise ValueError(
            f"{type(head).__name__} has no nn.Linear to convert, expected a head with float "
            "weights; convert it once only"
        )
    for owner, name, child in found:
        setattr(owner, name, Int8Linear(child))
