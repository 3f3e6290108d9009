"""Tensors of a checkpoint folder: read whole, written whole, matched by name and shape."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm_audio.config import read_json
from mllm_audio.files import share

MAX_SHARD_SIZE = "5GB"  # of one safetensors file
WEIGHTS_NAME = "model.safetensors"
ADAPTER_FILE = "audio_adapter.json"  # makes a folder an adapter, see `folder.py`
LORA_FILE, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, name: str = WEIGHTS_NAME) -> None:
    """Write `folder/name`, as shards with an index where it is `WEIGHTS_NAME` and large.

    Written beside and moved over: a reader, or a kill, finds the old weights or the new; where
    there are several shards, perhaps neither, but never a mixture.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {key: value.detach().contiguous() for key, value in tensors.items()}
    with TemporaryDirectory(dir=folder, prefix=".saving-") as beside:
        try:
            if name == WEIGHTS_NAME:
                save_torch_state_dict(whole, beside, max_shard_size=MAX_SHARD_SIZE)
            else:
                save_file(whole, Path(beside) / name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write the model to {folder}: {error}") from error
        new = sorted(Path(beside).iterdir())  # an index comes last
        if len(new) > 1:  # a kill in between leaves no checkpoint rather than a mixed one
            (folder / f"{name}.index.json").unlink(missing_ok=True)
        for path in new:
            share(path)
            path.replace(folder / path.name)
    stem = name.removesuffix(".safetensors")
    for path in [*folder.glob(f"{stem}-*-of-*.safetensors"), folder / f"{name}.index.json"]:
        if path.name not in {file.name for file in new}:  # of an earlier, sharded save
            path.unlink(missing_ok=True)
    if name not in {file.name for file in new}:
        (folder / name).unlink(missing_ok=True)


def read_tensors(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """Read `folder/name`, or every shard that its index lists.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    index = folder / f"{name}.index.json"
    files = [name]
    if index.is_file():
        listed = read_json(index, "restore the folder")["weight_map"].values()
        files = sorted({Path(file).name for file in listed})  # of this folder, whatever it says
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ValueError(f"found no {file} in {folder}: the checkpoint is incomplete")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    return tensors


def check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are missing, unknown or of another shape.

    Raises:
        ValueError: naming `where` and the first few tensors.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{where} does not fit its own configuration: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    for name, value in sorted(expected.items()):
        if value.shape != found[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(found[name].shape)}, "
                f"its configuration says {tuple(value.shape)}"
            )


def tied_names(module: nn.Module) -> set[str]:
    """Name the state-dict entries that share an earlier entry's storage."""
    seen: set[int] = set()
    tied = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) in seen:
            tied.add(name)
        seen.add(id(value))
    return tied


def fingerprint(module: nn.Module) -> str:
    """Hash the names, shapes and first values of all weights: two checkpoints differ in it.

    Sixteen values a tensor, as bfloat16: quick for billions of parameters, and the same whatever
    precision they are loaded in.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        first = value.detach().flatten()[:16].to("cpu", torch.bfloat16)
        digest.update(first.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
