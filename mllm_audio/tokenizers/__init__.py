"""Audio tokenizers by name."""

from __future__ import annotations

from collections.abc import Callable

from mllm_audio.tokenizers.audioldm import AudioLDMTokenizer
from mllm_audio.tokenizers.base import AudioTokenizer, ColumnDecoder, StreamConfig, num_columns
from mllm_audio.tokenizers.dct import DCTConfig, DCTTokenizer

__all__ = [
    "TOKENIZERS",
    "AudioLDMTokenizer",
    "AudioTokenizer",
    "ColumnDecoder",
    "DCTConfig",
    "DCTTokenizer",
    "StreamConfig",
    "load_tokenizer",
    "num_columns",
]


def _load_dct(source: str) -> AudioTokenizer:
    """Build the weightless tokenizer; it takes no `source`."""
    if source:
        raise ValueError(f"tokenizer 'dct' has no weights but got {source!r}; write just 'dct'")
    return DCTTokenizer()


def _load_audioldm(source: str) -> AudioTokenizer:
    """Load AudioLDM's VAE and vocoder from `source`, a folder or a hub id."""
    if not source:
        raise ValueError(
            "tokenizer 'audioldm' needs weights; write 'audioldm:FOLDER' or a hub id such as "
            "'audioldm:cvssp/audioldm-s-full-v2'"
        )
    return AudioLDMTokenizer.from_pretrained(source)


TOKENIZERS: dict[str, Callable[[str], AudioTokenizer]] = {
    "dct": _load_dct,
    "audioldm": _load_audioldm,
}


def load_tokenizer(spec: str) -> AudioTokenizer:
    """Load the tokenizer that `spec` names: "dct", or "audioldm:FOLDER_OR_HUB_ID".

    Raises:
        ValueError: if the name is unknown, or its weights are missing or not wanted.
    """
    name, _, source = spec.partition(":")
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is unknown; use one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name](source)
