"""What a checkpoint must be, and have beside it, to be served."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `model_type` of the backbones that the vLLM package has a model for.
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the server's settings depend on."""

    folder: Path
    max_positions: int  # text, prompt and audio of a request together
    values_per_token: int  # keys and values of all layers, for one position
    conditioner: str | None  # spec, of models that are prompted by embeddings
    has_twin: bool = True  # false where guidance is distilled into the head


def check_checkpoint(folder: Path, conditioner: str | None = None) -> Served:
    """Read a checkpoint and load what turns its latents into sound, and captions into prompts.

    Args:
        folder: that training, `merge` or `export` wrote.
        conditioner: spec of the conditioner, if its folders moved.

    Raises:
        ValueError: if it cannot be served, saying what to type instead.
    """
    # Imported here: they load torch and transformers, which wait until the environment is checked.
    from mllm_audio.config import read_json
    from mllm_audio.folder import is_adapter, read_audio_config
    from mllm_audio.models import is_audiomar
    from mllm_audio.pretrained import load_text_tokenizer

    if not folder.is_dir():
        raise ValueError(f"found no folder {folder}; expected a checkpoint on this machine")
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter beside a base model; to make a checkpoint that can be served "
            f"type  mllm-audio merge {folder} --out {folder}-merged"
        )
    if is_audiomar(folder):
        raise ValueError(
            f"{folder} is an AudioMAR, which sees a whole clip in every pass and has no cache; "
            "vLLM cannot serve it, type  mllm-audio generate"
        )
    audio = read_audio_config(folder)
    config = read_json(folder / "config.json", "restore it")
    _check_family(folder, config)
    max_positions = _first(folder, config, "max_position_embeddings", "n_positions")
    values_per_token = _values_per_token(folder, config)
    _check_weights(folder)
    load_text_tokenizer(folder)
    _check_tokenizer(folder, audio)
    return Served(
        folder=folder,
        max_positions=max_positions,
        values_per_token=values_per_token,
        conditioner=_check_conditioner(folder, audio, conditioner),
        has_twin=not audio.guidance_distilled,
    )


def cache_gib(served: Served, *, tokens: int, value_bytes: int, guidance: bool, most: int) -> int:
    """Size a key and value cache that holds `tokens` positions, twice for the unconditional twin.

    Args:
        served: the checkpoint.
        tokens: of all requests at once.
        value_bytes: of a key or value.
        guidance: whether the twin is there.
        most: never more, in GiB.

    Returns:
        whole GiB, at least 1.
    """
    needed = served.values_per_token * value_bytes * tokens * (2 if guidance else 1)
    return max(1, min(most, math.ceil(needed / GIB)))


def _check_family(folder: Path, config: dict[str, Any]) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{folder} has a backbone of type {family!r}, expected one of {', '.join(FAMILIES)}; "
            "it still runs with  mllm-audio generate  and  mllm-audio chat"
        )


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("model*.safetensors")):
        raise ValueError(
            f"found no model.safetensors in {folder}; wait for training, or copy the folder again"
        )


def _check_tokenizer(folder: Path, audio: Any) -> None:
    """Load the audio tokenizer, and compare it with the one that made the training latents."""
    from mllm_audio.tokenizers import load_tokenizer

    try:
        found = load_tokenizer(audio.tokenizer).fingerprint
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: audio.tokenizer {audio.tokenizer!r} does not load "
            f"({error}); put it back there, or edit audio.tokenizer"
        ) from error
    if audio.tokenizer_fingerprint not in ("", found):
        raise ValueError(
            f"{folder} was trained on {audio.tokenizer} latents of fingerprint "
            f"{audio.tokenizer_fingerprint}, found {found}; restore that tokenizer"
        )


def _check_conditioner(folder: Path, audio: Any, spec: str | None) -> str | None:
    """Load the conditioner of a model that is prompted by embeddings; return its spec."""
    import torch

    from mllm_audio.generation.prompts import load_checked

    if not audio.prompt_streams:
        if spec is not None:
            raise ValueError(f"{folder} reads captions as text; leave --conditioner {spec} out")
        return None
    load_checked(audio, spec, torch.device("cpu"))
    return spec or str(audio.conditioner)


def _values_per_token(folder: Path, config: dict[str, Any]) -> int:
    """Count the numbers that attention keeps of a position."""
    layers = _first(folder, config, "num_hidden_layers", "n_layer")
    heads = _first(folder, config, "num_attention_heads", "n_head")
    width = _first(folder, config, "hidden_size", "n_embd")
    kv_heads = config.get("num_key_value_heads") or heads
    return 2 * layers * int(kv_heads) * int(config.get("head_dim") or width // heads)


def _first(folder: Path, config: dict[str, Any], *names: str) -> int:
    """Take the first of these settings that config.json has: GPT-2 has names of its own."""
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ValueError(f"{folder / 'config.json'} has no {names[0]}; restore the folder")
