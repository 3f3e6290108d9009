"""What a checkpoint's folder says of generation, beside the weights of its model."""

from __future__ import annotations

from pathlib import Path

from mllm_audio.config import from_dict, read_json
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.modality import AudioConfig
from mllm_audio.tokenizers import AudioTokenizer, load_tokenizer

GENERATION_FILE = "audio_generation.json"  # defaults of `generate`, beside config.json


def read_defaults(folder: Path) -> GenerationConfig:
    """Read the defaults of a folder, the library's where it has none.

    Raises:
        ValueError: if its file is damaged.
    """
    path = folder / GENERATION_FILE
    values = read_json(path, "delete it to use the defaults") if path.is_file() else {}
    defaults: GenerationConfig = from_dict(GenerationConfig, values, str(path))
    return defaults


def load_audio_tokenizer(config: AudioConfig, folder: Path) -> AudioTokenizer:
    """Load the audio tokenizer of the model in a folder.

    Raises:
        ValueError: if it is not the one that the model was trained with.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    expected = config.tokenizer_fingerprint
    if expected and tokenizer.fingerprint != expected:
        raise ValueError(
            f"{folder} was trained on {config.tokenizer} latents of fingerprint {expected}, found "
            f"{tokenizer.fingerprint}; restore that tokenizer"
        )
    return tokenizer
