"""The type of the weights that decoding reads: of backbone, head and audio tokenizer."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mllm_audio.audiomar import AudioMAR
from mllm_audio.backbone import blocks
from mllm_audio.config import nearest
from mllm_audio.hardware import has_bf16
from mllm_audio.int8 import to_int8
from mllm_audio.models import Model
from mllm_audio.tokenizers.base import AudioTokenizer

DTYPES = ("float32", "bfloat16", "int8")


def check_dtype(dtype: str) -> None:
    """Refuse a type that is not in `DTYPES`.

    Raises:
        ValueError: with the nearest name.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")


def cast(model: Model, dtype: str) -> None:
    """Hold the weights of backbone and head in `dtype`, in place.

    The sampling chain, positions and embeddings of latents stay float32. With int8 so does all but
    the matrices of the backbone's blocks and of the head, and nothing can be trained or saved.

    Raises:
        ValueError: for an unknown type, or one that the model cannot decode in.
    """
    check_dtype(dtype)
    if dtype == "float32":
        return
    if isinstance(model, AudioMAR):
        raise ValueError(f"found dtype {dtype}, AudioMAR decodes in float32; leave it out")
    head = model.audio.head
    assert isinstance(head, nn.Module)
    convert(head, dtype)
    convert(model.backbone if dtype == "bfloat16" else blocks(model.backbone), dtype)


def cast_decoder(audio_tokenizer: AudioTokenizer, dtype: str, device: torch.device) -> None:
    """Hold what decodes latents in bfloat16 beside weights in `dtype`, in place.

    It stays float32 beside float32, and on a CPU without bf16 arithmetic: convolutions that are
    emulated take many times as long.
    """
    if dtype != "float32" and has_bf16(device.type):
        audio_tokenizer.decode_in(torch.bfloat16)


def convert(module: nn.Module, dtype: str) -> None:
    """Hold the weights of a module in `dtype`, in place."""
    if dtype == "int8":
        to_int8(module)
    elif dtype == "bfloat16":
        module.to(torch.bfloat16)
        for layer in module.modules():
            if isinstance(layer, Conv1D):
                # A CPU reads a column of weights, what makes one number, in three quarters of the
                # time where it lies together; the numbers stay the same.
                layer.weight.data = layer.weight.data.t().contiguous().t()
