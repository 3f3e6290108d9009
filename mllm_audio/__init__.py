"""Continuous-valued audio tokens as an output modality of Hugging Face causal language models."""

from __future__ import annotations

import importlib
from typing import Any

# Public names and their homes. Loaded on first use, so that `import mllm_audio` costs nothing.
_HOMES = {
    "AdaptConfig": "mllm_audio.adapter",
    "AudioChunk": "mllm_audio.types",
    "AudioConfig": "mllm_audio.modality",
    "AudioLanguageModel": "mllm_audio.model",
    "AudioModality": "mllm_audio.modality",
    "Clip": "mllm_audio.types",
    "GenerationConfig": "mllm_audio.generation.decode",
    "RunConfig": "mllm_audio.presets",
    "StreamConfig": "mllm_audio.tokenizers",
    "TextConfig": "mllm_audio.generation.text",
    "TextDelta": "mllm_audio.types",
    "Voice": "mllm_audio.generation.voice",
    "get_preset": "mllm_audio.presets",
    "load_tokenizer": "mllm_audio.tokenizers",
    "prepare": "mllm_audio.data.prepare",
    "push_to_hub": "mllm_audio.hub",
    "train_run": "mllm_audio.run",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mllm_audio' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
