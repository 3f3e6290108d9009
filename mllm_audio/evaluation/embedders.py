"""Embedders by name, and what each was published to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mllm_audio.config import nearest
from mllm_audio.evaluation.base import Embedder
from mllm_audio.evaluation.clap import HfClapEmbedder, LaionClapEmbedder
from mllm_audio.evaluation.cnn14 import PannsEmbedder
from mllm_audio.evaluation.own import OwnEmbedder
from mllm_audio.evaluation.vggish import VggishEmbedder


@dataclass(frozen=True)
class EmbedderKind:
    """How to load an embedder and where its weights are published."""

    load: Callable[[Path, torch.device | str], Embedder]
    weights: str  # what the path must be


EMBEDDERS: dict[str, EmbedderKind] = {
    "panns": EmbedderKind(
        PannsEmbedder, "Cnn14_16k_mAP=0.438.pth or Cnn14_mAP=0.431.pth of zenodo.org/record/3987831"
    ),
    "vggish": EmbedderKind(
        VggishEmbedder, "vggish-10086976.pth of github.com/harritaylor/torchvggish, release v0.1"
    ),
    "clap_hf": EmbedderKind(
        HfClapEmbedder, "a folder of huggingface.co/laion/larger_clap_music_and_speech"
    ),
    "clap_laion": EmbedderKind(
        LaionClapEmbedder,
        "music_speech_audioset_epoch_15_esc_89.98.pt of huggingface.co/lukewys/laion_clap",
    ),
    "own": EmbedderKind(OwnEmbedder, "a folder of mllm-audio train-classifier"),
}


def load_embedder(
    spec: str, device: torch.device | str = "cpu", name: str | None = None
) -> Embedder:
    """Load the embedder that `spec` names, such as `panns:FILE` or `own:FOLDER`.

    Args:
        spec: a key of `EMBEDDERS`, a colon, and a path.
        device: where it runs.
        name: what metrics append; by default the key, or the folder's name for `own`.

    Raises:
        ValueError: if the embedder is unknown or the path does not hold its weights.
        ImportError: if it needs an extra that is not installed.
    """
    kind, _, path = spec.partition(":")
    if kind not in EMBEDDERS:
        raise ValueError(f"embedder {kind!r} is unknown; {nearest(kind, EMBEDDERS)}")
    if not path:
        raise ValueError(
            f"found embedder {spec!r} without weights, expected {kind}:PATH, the path of "
            f"{EMBEDDERS[kind].weights}"
        )
    if not Path(path).exists():
        raise ValueError(f"found nothing at {path}, expected {EMBEDDERS[kind].weights}")
    embedder = EMBEDDERS[kind].load(Path(path), device)
    if name is not None:
        embedder.name = name
    return embedder
