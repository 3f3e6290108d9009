"""Weights of other projects under our names, and trained blocks as the start of a model."""

from mllm_audio.interop.renaming import (
    adaln_mlp_from_mar,
    audiomar_from_mar,
    gpt2_block_from_timm,
)
from mllm_audio.interop.start import InitReport, load_audiomar_blocks, load_image_mar

__all__ = [
    "InitReport",
    "adaln_mlp_from_mar",
    "audiomar_from_mar",
    "gpt2_block_from_timm",
    "load_audiomar_blocks",
    "load_image_mar",
]
