"""Conditioners by name: a caption to the embeddings that prompt a model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mllm_audio.conditioners.base import Conditioner, PromptStream, pad
from mllm_audio.conditioners.clap_t5 import ClapT5
from mllm_audio.conditioners.words import Words
from mllm_audio.config import nearest

__all__ = ["CONDITIONERS", "Conditioner", "PromptStream", "load_conditioner", "pad"]

CONDITIONERS: dict[str, Callable[[dict[str, str], torch.device], Conditioner]] = {
    "clap_t5": ClapT5.from_pretrained,
    "words": Words.from_pretrained,
}


def load_conditioner(spec: str, device: torch.device | str = "cpu") -> Conditioner:
    """Load the conditioner that `spec` names.

    "clap_t5:clap=FOLDER,t5=FOLDER", or one of the two, or "words", which has no weights.

    Raises:
        ValueError: if name, sources or weights are not what was expected.
    """
    name, _, rest = spec.partition(":")
    if name not in CONDITIONERS:
        raise ValueError(f"conditioner {name!r} is unknown; {nearest(name, CONDITIONERS)}")
    sources: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        encoder, equals, source = part.partition("=")
        if not equals or not source or encoder in sources:
            raise ValueError(
                f"found {part!r} in conditioner {spec!r}, expected "
                f"{name}:clap=FOLDER,t5=FOLDER, each once"
            )
        sources[encoder] = source
    return CONDITIONERS[name](sources, torch.device(device))
