"""Weights of other projects under our names.

MAR's released checkpoints (github.com/LTH14/mar, MIT licence) hold timm transformer blocks and a
diffusion MLP; here the blocks become GPT-2 blocks and the MLP becomes `heads.adaln_mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_MAR_HEAD_NAMES = {
    "time_embed.mlp.0": "timestep_embedding.linear_in",
    "time_embed.mlp.2": "timestep_embedding.linear_out",
    "cond_embed": "condition_projection",
    "input_proj": "input_projection",
    "final_layer.adaLN_modulation.1": "output.modulation",
    "final_layer.linear": "output.projection",
}
_MAR_BLOCK_NAMES = {
    "in_ln": "norm",
    "mlp.0": "linear_in",
    "mlp.2": "linear_out",
    "adaLN_modulation.1": "modulation",
}
_TIMM_BLOCK_NAMES = {
    "norm1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def adaln_mlp_from_mar(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename a MAR diffusion MLP to the state of an `AdaLNMLP`.

    Args:
        state_dict: tensors by name; those outside `prefix` are ignored.
        prefix: where the MLP lies, "diffloss.net." in a whole MAR checkpoint.

    Raises:
        ValueError: if a tensor of the MLP is missing, or one is there that it does not have.
    """
    tensors = _below(state_dict, prefix)
    blocks = [
        int(match[1]) for name in tensors if (match := re.match(r"res_blocks\.(\d+)\.", name))
    ]
    layers = dict(_MAR_HEAD_NAMES)
    for block in range(max(blocks, default=0) + 1):
        for theirs, ours in _MAR_BLOCK_NAMES.items():
            layers[f"res_blocks.{block}.{theirs}"] = f"blocks.{block}.{ours}"
    names = _tensor_names(layers)
    _check_names(tensors, names, f"MAR diffusion MLP at prefix {prefix!r}")
    return {ours: tensors[theirs] for theirs, ours in names.items()}


def gpt2_block_from_timm(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename a timm `Block` to the state of a Hugging Face `GPT2Block`.

    The two are the same causal function when GPT-2 is configured with `activation_function`
    "gelu" and `layer_norm_epsilon` 1e-6.

    Args:
        state_dict: tensors by name; those outside `prefix` are ignored.
        prefix: where the block lies, such as "encoder_blocks.0.".

    Raises:
        ValueError: if a tensor of the block is missing, or one is there that it does not have.
    """
    tensors = _below(state_dict, prefix)
    names = _tensor_names(_TIMM_BLOCK_NAMES)
    _check_names(tensors, names, f"timm block at prefix {prefix!r}")
    # GPT-2's Conv1D keeps its matrix as (in, out), a linear layer as (out, in).
    return {
        ours: tensors[theirs].T.contiguous() if tensors[theirs].ndim == 2 else tensors[theirs]
        for theirs, ours in names.items()
    }


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors under `prefix`, and the prefix off their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }


def _tensor_names(layers: Mapping[str, str]) -> dict[str, str]:
    """Extend names of layers to those of their weights and biases."""
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in layers.items()
        for kind in ("weight", "bias")
    }


def _check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{what} does not fit: missing {missing or 'nothing'}, unexpected "
            f"{unexpected or 'nothing'}; check the prefix and the checkpoint"
        )
