"""Put published weights into our modules, and refuse those of another network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_audio.files import file_sha256


def fill(module: nn.Module, weights: Any, path: Path, expected: str) -> None:
    """Load `weights`, which must be exactly those of `module`.

    Raises:
        ValueError: if one is missing, too many, or of another shape.
    """
    needed = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} holds a {type(weights).__name__}, expected {expected}")
    found = {k: v for k, v in weights.items() if not str(k).endswith("num_batches_tracked")}
    missing, extra = sorted(needed.keys() - found.keys()), sorted(found.keys() - needed.keys())
    if missing or extra:
        raise ValueError(
            f"{path} lacks {len(missing)} weights {missing[:2]} and has {len(extra)} others "
            f"{extra[:2]}, expected {expected}"
        )
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.shape != needed[name].shape:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{path}: {name} is {shape}, not {list(needed[name].shape)}; expected {expected}"
            )
    module.load_state_dict(found, strict=False)
    module.eval().requires_grad_(False)


def files_sha256(paths: Sequence[Path]) -> str:
    """Hash several files as one."""
    if len(paths) == 1:
        return file_sha256(paths[0])
    return hashlib.sha256("".join(map(file_sha256, paths)).encode()).hexdigest()


def device_of(module: nn.Module) -> torch.device:
    """Tell where a module's weights are."""
    return next(module.parameters()).device
