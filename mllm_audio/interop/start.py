"""Trained blocks as the start of a model: MAR's image weights, or those of an AudioMAR."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mllm_audio import backbone as backbones
from mllm_audio.audiomar import ARCHITECTURE, AudioMAR
from mllm_audio.config import read_json
from mllm_audio.interop.renaming import STACKS, block_prefixes, gpt2_block_from_timm, timm_block
from mllm_audio.model import AudioLanguageModel
from mllm_audio.weights import read_tensors


@dataclass(frozen=True)
class InitReport:
    """What a model started from: numbers of parameters by the name of the tensor."""

    source: str
    loaded: dict[str, int]  # of the model
    new: dict[str, int]  # of the model, left as they were
    unused: dict[str, int]  # of the source

    def __str__(self) -> str:
        """Sum up by parts, in three lines."""
        total = sum(self.loaded.values())
        return (
            f"loaded {len(self.loaded)} tensors, {total:,} parameters, from {self.source}\n"
            f"new: {_by_part(self.new)}\nunused: {_by_part(self.unused)}"
        )


def load_image_mar(model: AudioLanguageModel | AudioMAR, path: Path | str) -> InitReport:
    """Start a model's blocks from MAR's image weights, averaged ones if the file has them.

    As the paper: encoder blocks, then decoder blocks become the blocks of a causal backbone, or
    those of AudioMAR's encoder and decoder. Nothing else is taken.

    Args:
        model: a decoder on a GPT-2 backbone, or an `AudioMAR`; changed in place.
        path: a released `checkpoint-last.pth`, or `.safetensors` of the same names.

    Raises:
        ValueError: if the file cannot be read, or its blocks do not fit the model's.
    """
    source, tensors = _read_mar(Path(path))
    return _load_blocks(model, tensors, source)


def load_audiomar_blocks(model: AudioLanguageModel | AudioMAR, folder: Path | str) -> InitReport:
    """Start a model's blocks from a trained AudioMAR, as the paper's ablation B (table 3).

    Args:
        model: as `load_image_mar` takes it.
        folder: of an AudioMAR run.

    Raises:
        ValueError: if the folder holds no AudioMAR, or its blocks do not fit the model's.
    """
    folder = Path(folder)
    remedy = "expected the folder of a finished `mllm-audio train --preset audiomar_base` run"
    architectures = read_json(folder / "config.json", remedy).get("architectures")
    if architectures != [ARCHITECTURE]:
        raise ValueError(f"{folder} holds {architectures}, no {ARCHITECTURE}; {remedy}")
    return _load_blocks(model, read_tensors(folder), str(folder))


def _read_mar(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Read a MAR checkpoint; return where its weights lie, and the weights by name."""
    if not path.is_file():
        raise ValueError(
            f"found no file {path}, expected checkpoint-last.pth of MAR; its addresses are in "
            "util/download.py of github.com/LTH14/mar"
        )
    try:
        if path.suffix == ".safetensors":
            checkpoint: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # MAR keeps its arguments
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is no MAR checkpoint ({reason}); download checkpoint-last.pth again"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds {type(checkpoint).__name__}, expected MAR's weights by name"
        )
    for key in ("model_ema", "model"):
        if isinstance(checkpoint.get(key), dict):
            return f"{path} ({key})", checkpoint[key]
    return str(path), {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}


def _load_blocks(
    model: AudioLanguageModel | AudioMAR, tensors: Mapping[str, Tensor], source: str
) -> InitReport:
    """Copy all blocks of `tensors` into the model's, once it is known that they fit."""
    silent: set[str] = set()
    if isinstance(model, AudioLanguageModel):
        stacks, convert = [_gpt2_blocks(model)], gpt2_block_from_timm
        silent = {f"backbone.{name}" for name in model.silent}  # tables that stay at zero
    else:
        stacks = [list(model.encoder_blocks), list(model.decoder_blocks)]
        convert = timm_block
    prefixes, blocks = block_prefixes(tensors), [block for stack in stacks for block in stack]
    _check_count(prefixes, [len(stack) for stack in stacks], source)
    states = [convert(tensors, prefix) for prefix in prefixes]
    for prefix, block, state in zip(prefixes, blocks, states, strict=True):
        for name, value in block.state_dict().items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"{source}: {name} of {prefix[:-1]} is {tuple(state[name].shape)}, the model's "
                    f"is {tuple(value.shape)}; set backbone.hidden_size="
                    f"{len(tensors[prefix + 'norm1.weight'])}"
                )
    for block, state in zip(blocks, states, strict=True):
        block.load_state_dict(state)
    inside = {id(p) for block in blocks for p in block.parameters()}
    own = {name: p for name, p in model.named_parameters() if name not in silent}
    return InitReport(
        source=source,
        loaded={name: p.numel() for name, p in own.items() if id(p) in inside},
        new={name: p.numel() for name, p in own.items() if id(p) not in inside},
        unused={k: v.numel() for k, v in tensors.items() if not k.startswith((*prefixes,))},
    )


def _gpt2_blocks(model: AudioLanguageModel) -> list[nn.Module]:
    """List the blocks of a backbone that are timm's but causal.

    Raises:
        ValueError: if they compute something else.
    """
    config = model.backbone.config
    wanted = {"model_type": "gpt2", "activation_function": "gelu", "layer_norm_epsilon": 1e-6}
    found = {key: getattr(config, key, None) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"the backbone has {found}, MAR's blocks need {wanted}; set backbone.family=gpt2"
        )
    return list(backbones.blocks(model.backbone))


def _check_count(prefixes: Sequence[str], expected: Sequence[int], source: str) -> None:
    """Refuse blocks that are not as many as in the model's stacks, one or two.

    Raises:
        ValueError: naming both numbers.
    """
    if not prefixes:
        raise ValueError(
            f"{source} holds no {' and '.join(STACKS)}; expected checkpoint-last.pth of MAR"
        )
    found = [sum(prefix.startswith(stack) for prefix in prefixes) for stack in STACKS]
    if [*expected] not in (found, [sum(found)]):
        raise ValueError(
            f"{source} holds {' + '.join(map(str, found))} blocks, the model has "
            f"{' + '.join(map(str, expected))}; name one of that size, or set backbone.num_layers="
            f"{sum(found)}"
        )


def _by_part(counts: Mapping[str, int]) -> str:
    """Sum up parameters by part: the first name, of audio modules the second too."""
    parts: dict[str, int] = {}
    for name, count in counts.items():
        head, _, rest = name.partition(".")
        part = f"{head}.{rest.split('.')[0]}" if head == "audio" else head
        parts[part] = parts.get(part, 0) + count
    return ", ".join(f"{part} {count:,}" for part, count in parts.items()) or "nothing"
