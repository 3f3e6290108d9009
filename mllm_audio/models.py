"""Both kinds of model, and which of them a folder holds."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mllm_audio import audiomar
from mllm_audio.audiomar import AudioMAR
from mllm_audio.config import read_json
from mllm_audio.model import AudioLanguageModel
from mllm_audio.pretrained import load_text_tokenizer
from mllm_audio.quiet import quiet

Model = AudioLanguageModel | AudioMAR


def is_audiomar(folder: Path) -> bool:
    """Tell the folder of an AudioMAR from any other."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    return bool(read_json(path, "restore it").get("architectures") == [audiomar.ARCHITECTURE])


def load_model(
    folder: Path, base: str | None = None, *, merge: bool = True
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a folder that training wrote, with its text tokenizer.

    Args:
        folder: a checkpoint or an adapter.
        base: where an adapter's base model is now, if it moved.
        merge: false leaves an adapter beside its base model.

    Raises:
        ValueError: if the folder is no such checkpoint, or has no text tokenizer.
    """
    if is_audiomar(folder):
        if base is not None:
            raise ValueError(f"{folder} stands alone, it has no base model; leave --base out")
        with quiet(is_local=True):  # transformers does not know the architecture
            return AudioMAR.from_pretrained(folder), load_text_tokenizer(folder)
    model = AudioLanguageModel.from_pretrained(folder, base, merge=merge)
    if model.text_tokenizer is None:
        raise ValueError(f"{folder} has no text tokenizer; restore its tokenizer.json")
    return model, model.text_tokenizer
