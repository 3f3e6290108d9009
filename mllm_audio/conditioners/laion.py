"""LAION's own CLAP checkpoints (`.pt`), through the extra laion-clap: the only import of it.

Wu et al. 2023 (arXiv:2211.06687). The package downloads its text tokenizer from the Hugging Face
hub when it is imported. The same weights converted for transformers need none of this: prefer them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_audio.conditioners.torch_file import read_torch_file

SAMPLE_RATE = 48_000  # Hz
MAX_SAMPLES = 480_000  # 10 s: of longer clips the package would hear a random piece
WIDTHS = {96: "HTSAT-tiny", 128: "HTSAT-base"}  # channels of the patch embedding -> audio encoder


class Laion:
    """A CLAP that embeds captions and clips in one space."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Embed captions: (n, 512) float32."""
        # A single caption loses its batch dimension in the package.
        padded = [*captions, ""] if len(captions) == 1 else list(captions)
        return _tensor(self._module.get_text_embedding(padded))[: len(captions)]

    @torch.no_grad()
    def embed_audio(self, waveforms: Sequence[Tensor]) -> Tensor:
        """Embed (S,) waveforms at 48 kHz, the first 10 s of each: (n, 512) float32."""
        heard = [waveform[:MAX_SAMPLES].float().cpu().numpy() for waveform in waveforms]
        return _tensor(self._module.get_audio_embedding_from_data(heard))


def load_laion(path: Path) -> Laion:
    """Load a checkpoint such as `music_speech_audioset_epoch_15_esc_89.98.pt`.

    The audio encoder's size, and whether it fuses pieces of long clips, is read from the weights.

    Raises:
        ImportError: if laion-clap is not installed.
        ValueError: if the file is no CLAP checkpoint of LAION.
    """
    weights = _read(path)
    width = len(weights["audio_branch.patch_embed.proj.weight"])
    if width not in WIDTHS:
        raise ValueError(
            f"{path} has an audio encoder of width {width}, expected one of {sorted(WIDTHS)}"
        )
    try:
        import laion_clap  # an extra
    except ImportError as error:
        raise ImportError(
            f"{path} needs laion-clap with torchvision and torchaudio ({error}); type pip install "
            "mllm-audio[clap], or give a folder of a transformers ClapModel"
        ) from error
    module = laion_clap.CLAP_Module(
        enable_fusion=any("mel_conv2d" in name for name in weights), amodel=WIDTHS[width]
    )
    expected = module.model.state_dict().keys()
    # Newer transformers computes this one instead of storing it.
    found = {k: v for k, v in weights.items() if k in expected or not k.endswith("position_ids")}
    try:
        module.model.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit laion-clap's {WIDTHS[width]} ({str(error).splitlines()[0]}); "
            "download the checkpoint again"
        ) from error
    module.eval()
    return Laion(module)


def _read(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint."""
    content = read_torch_file(path, "a CLAP checkpoint of LAION")
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    weights = {str(name).removeprefix("module."): value for name, value in weights.items()}
    if "audio_branch.patch_embed.proj.weight" not in weights:
        raise ValueError(
            f"{path} holds {sorted(weights)[:3]}, expected the weights of a CLAP of LAION such as "
            "audio_branch.patch_embed.proj.weight"
        )
    return weights


def _tensor(value: Any) -> Tensor:
    """Turn an array or a tensor into float32 on the CPU."""
    return torch.as_tensor(value).detach().float().cpu()
