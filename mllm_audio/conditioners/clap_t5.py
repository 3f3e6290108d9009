"""The paper's text prompt: a CLAP embedding of the caption, then FLAN-T5's of its tokens.

CLAP (Wu et al. 2023, arXiv:2211.06687) gives one vector of length 1 for the whole caption; FLAN-T5
(Chung et al. 2022, arXiv:2210.11416) one for each of its first 77 tokens, 78 elements in all. Both
are frozen. Their encoders never attend to padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mllm_audio.conditioners.base import PromptStream
from mllm_audio.files import file_sha256
from mllm_audio.quiet import quiet

T5_LENGTH = 77  # tokens of a caption that are kept, the end token among them
BATCH_SIZE = 64  # captions embedded at once
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # of a folder; the first kind that is there


class TextEncoder(Protocol):
    """One of the encoders."""

    stream: PromptStream
    fingerprint: str

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed a batch of captions: for each (l, D_s) float32 on the CPU."""


class ClapT5:
    """CLAP and FLAN-T5, or one of them."""

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self._encoders = list(encoders)

    @classmethod
    def from_pretrained(cls, sources: dict[str, str], device: torch.device) -> ClapT5:
        """Load the encoders named "clap" and "t5" from folders, hub ids or LAION's `.pt` file.

        Raises:
            ValueError: if an encoder is unknown, none is named, or its weights cannot be loaded.
        """
        loaders: dict[str, Callable[[str, torch.device], TextEncoder]] = {
            "clap": load_clap,
            "t5": T5Text,
        }
        if not sources or not sources.keys() <= loaders.keys():
            raise ValueError(
                f"conditioner clap_t5 got {', '.join(sources) or 'nothing'}, expected "
                "clap_t5:clap=FOLDER,t5=FOLDER (google/flan-t5-large, laion/larger_clap_general, "
                "or LAION's .pt)"
            )
        named = [name for name in loaders if name in sources]
        return cls([loaders[name](sources[name], device) for name in named])

    @property
    def streams(self) -> tuple[PromptStream, ...]:
        """What a caption becomes."""
        return tuple(encoder.stream for encoder in self._encoders)

    @property
    def fingerprint(self) -> str:
        """Short hash of configurations and weights."""
        text = "".join(encoder.fingerprint for encoder in self._encoders)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def embed(self, captions: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Embed captions, see `Conditioner.embed`."""
        result: list[tuple[Tensor, ...]] = []
        for start in range(0, len(captions), BATCH_SIZE):
            batch = captions[start : start + BATCH_SIZE]
            result += zip(*(encoder.embed(batch) for encoder in self._encoders), strict=True)
        return result


def load_clap(source: str, device: torch.device) -> TextEncoder:
    """Load CLAP's text side: transformers' layout, or LAION's own `.pt` file."""
    return LaionText(source) if source.endswith(".pt") else ClapText(source, device)


class ClapText:
    """The text side of `transformers.ClapModel`."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import ClapModel

        self._model, self._tokenizer = _load(ClapModel, source, device)
        self.stream = PromptStream(name="clap", length=1, dim=self._model.config.projection_dim)
        self.fingerprint = _fingerprint(source)

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions, each (1, 512), of length 1."""
        limit = self._model.config.text_config.max_position_embeddings
        # RoBERTa counts positions from behind its padding id.
        limit -= (self._model.config.text_config.pad_token_id or 0) + 1
        inputs = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self._model.device)
        output = self._model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        return list(output.pooler_output.float().cpu()[:, None])  # (1, 512) each


class LaionText:
    """The text side of LAION's own checkpoint format, through the package laion-clap."""

    def __init__(self, source: str) -> None:
        from mllm_audio.conditioners.laion import load_laion

        self._model: Any = load_laion(Path(source))
        self.stream = PromptStream(name="clap", length=1, dim=512)
        self.fingerprint = file_sha256(Path(source))

    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions, each (1, 512), of length 1."""
        return list(torch.as_tensor(self._model.embed_text(list(captions))).float().cpu()[:, None])


class T5Text:
    """The encoder of a T5 of any size."""

    def __init__(self, source: str, device: torch.device) -> None:
        from transformers import T5EncoderModel

        self._model, self._tokenizer = _load(T5EncoderModel, source, device)
        self.stream = PromptStream(name="t5", length=T5_LENGTH, dim=self._model.config.d_model)
        self.fingerprint = _fingerprint(source)

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed the first tokens of captions, each (l, D_s) with l at most `T5_LENGTH`."""
        inputs = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=T5_LENGTH, return_tensors="pt"
        ).to(self._model.device)
        mask = inputs["attention_mask"]
        states = self._model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        rows = zip(states.float().cpu(), mask.sum(1).tolist(), strict=True)
        return [row[:length].clone() for row, length in rows]  # a view would keep the padding


def _load(kind: Any, source: str, device: torch.device) -> tuple[Any, Any]:
    """Load an encoder in float32 and its tokenizer from a folder or hub id.

    Raises:
        ValueError: if they are not there.
    """
    from transformers import AutoTokenizer

    try:
        with quiet(is_local=Path(source).is_dir()):
            model, report = kind.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Bad ids are ValueErrors, missing files and networks OSErrors; each names what it looked for.
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source} cannot be loaded as {kind.__name__} ({reason}); expected a folder or hub id "
            "in the layout of transformers, with its tokenizer"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} weights of a {kind.__name__}, e.g. {missing[:3]}; "
            "expected a whole checkpoint"
        )
    return model.to(device).eval(), tokenizer


def _fingerprint(source: str) -> str:
    """Hash configuration and weights of a folder or a downloaded repository."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, local_files_only=True))
    found = [sorted(folder.glob(pattern)) for pattern in WEIGHTS]
    weights = next(filter(None, found), [])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written_by = {key for key in config if key.startswith("_") or key.endswith("_version")}
    kept = {key: value for key, value in config.items() if key not in written_by}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in [*weights, *sorted(folder.glob("tokenizer*.json"))]:
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()
