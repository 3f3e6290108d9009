"""Weights of other projects under our names.

MAR's released checkpoints (github.com/LTH14/mar, MIT licence) hold timm transformer blocks and a
diffusion MLP; here the blocks become GPT-2 blocks or AudioMAR's, and the MLP becomes
`heads.adaln_mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
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
STACKS = ("encoder_blocks", "decoder_blocks")  # in the order of a decoder's blocks
# Of a whole MAR beside blocks, head, encoder positions and classes.
_MAR_NAMES = {
    "z_proj.weight": "audio.latent_proj.weight",
    "z_proj.bias": "audio.latent_proj.bias",
    "z_proj_ln.weight": "audio.latent_norm.weight",
    "z_proj_ln.bias": "audio.latent_norm.bias",
    "fake_latent": "audio.null_prompt",
    "diffusion_pos_embed_learned": "audio.target_positions.weight",
    "decoder_pos_embed_learned": "decoder_positions.weight",
    "mask_token": "mask_token",
    "encoder_norm.weight": "encoder_norm.weight",
    "encoder_norm.bias": "encoder_norm.bias",
    "decoder_embed.weight": "decoder_embed.weight",
    "decoder_embed.bias": "decoder_embed.bias",
    "decoder_norm.weight": "decoder_norm.weight",
    "decoder_norm.bias": "decoder_norm.bias",
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
    tensors = timm_block(state_dict, prefix)
    # GPT-2's Conv1D keeps its matrix as (in, out), a linear layer as (out, in).
    return {
        ours: tensors[theirs].T.contiguous() if tensors[theirs].ndim == 2 else tensors[theirs]
        for theirs, ours in _tensor_names(_TIMM_BLOCK_NAMES).items()
    }


def audiomar_from_mar(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole MAR to the state of an `AudioMAR`.

    MAR is an AudioMAR whose prompt is one stream "class", a one-hot vector repeated over its
    buffer: the class embedding becomes that stream's projection. Its null prompt has length 1.

    Raises:
        ValueError: if a tensor is missing, or one is there that MAR does not have.
    """
    is_part = re.compile(rf"({'|'.join(STACKS)}|diffloss\.net)\.").match
    own = {name: tensor for name, tensor in state_dict.items() if not is_part(name)}
    _check_names(own, [*_MAR_NAMES, "encoder_pos_embed_learned", "class_emb.weight"], "MAR")
    state = {ours: own[theirs] for theirs, ours in _MAR_NAMES.items()}
    state["mask_token"] = state["mask_token"].flatten()  # (H,)
    for name in ("audio.target_positions.weight", "decoder_positions.weight"):
        state[name] = state[name][0]  # (N, H), (L+N, H)
    num_places = len(state["audio.target_positions.weight"])  # N
    positions = own["encoder_pos_embed_learned"][0]  # (L+N, H)
    state["prompt_positions.weight"] = positions[:-num_places]  # (L, H)
    state["audio.content_positions.weight"] = positions[-num_places:]  # (N, H)
    classes = own["class_emb.weight"].T  # (H, classes)
    state["audio.prompt_proj.class.weight"] = classes
    state["audio.prompt_proj.class.bias"] = torch.zeros_like(classes[:, 0])
    state["audio.latent_mean"] = torch.zeros(own["z_proj.weight"].shape[1])  # (D,)
    state["audio.latent_std"] = torch.ones_like(state["audio.latent_mean"])
    head = adaln_mlp_from_mar(state_dict, "diffloss.net.")
    state |= {f"audio.head.network.{name}": tensor for name, tensor in head.items()}
    for prefix in block_prefixes(state_dict):
        block = timm_block(state_dict, prefix)
        state |= {prefix + name: tensor for name, tensor in block.items()}
    return state


def block_prefixes(state_dict: Mapping[str, Tensor]) -> list[str]:
    """List where the blocks of a MAR lie: the encoder's in order, then the decoder's."""
    prefixes = []
    for stack in STACKS:
        places = (re.match(rf"{stack}\.(\d+)\.", name) for name in state_dict)
        count = max((int(place[1]) + 1 for place in places if place), default=0)
        prefixes += [f"{stack}.{number}." for number in range(count)]
    return prefixes


def timm_block(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors of the timm block at `prefix`; AudioMAR's blocks have the same names.

    Raises:
        ValueError: if a tensor of the block is missing, or one is there that it does not have.
    """
    tensors = _below(state_dict, prefix)
    _check_names(tensors, _tensor_names(_TIMM_BLOCK_NAMES), f"timm block at prefix {prefix!r}")
    return tensors


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
