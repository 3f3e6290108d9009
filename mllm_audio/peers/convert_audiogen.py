"""facebook/audiogen-medium, as audiocraft publishes it, to the MusicGen of transformers.

AudioGen's published form (github.com/facebookresearch/audiocraft, config/solver/audiogen) is
MusicGen (Copet et al. 2023, arXiv:2306.05284) for 16 kHz sounds: a decoder over four delayed
codebooks with cross-attention to T5-large, and an EnCodec of strides 8, 5, 4, 2. Sizes are read
from the tensors; what they do not show is below.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    EncodecConfig,
    EncodecModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    MusicgenForConditionalGeneration,
    T5EncoderModel,
)

from mllm_audio.weights import check_fit

SAMPLE_RATE, RATIOS = 16000, [8, 5, 4, 2]
HEAD_SIZE = 64  # in every size that audiocraft defines, config/model/lm/model_scale
PROJECTION = "condition_provider.conditioners.description.output_proj."
# Names in audiocraft -> names in transformers, applied in order.
LM_NAMES = (
    (r"^emb\.", "model.decoder.embed_tokens."),
    (r"^linears\.", "lm_heads."),
    (r"^out_norm\.", "model.decoder.layer_norm."),
    (r"^transformer\.", "model.decoder."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm_cross\.", ".encoder_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
)
CODEC_NAMES = (
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv|convtr)\.\1\.", ".conv."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
)


def convert_audiogen(checkpoint: Path, t5: Path, out: Path) -> None:
    """Write AudioGen as one folder of safetensors with T5 and its tokenizer, in float32.

    Args:
        checkpoint: a copy of facebook/audiogen-medium.
        t5: a copy of google-t5/t5-large, which AudioGen was trained on and does not include.
        out: of the result.

    Raises:
        ValueError: if a file is missing, holds something else than tensors and text, or its
            tensors are not those of AudioGen.
    """
    lm = _unpickle(checkpoint / "state_dict.bin")
    codec = _unpickle(checkpoint / "compression_state_dict.bin")
    projection = {
        name.removeprefix(PROJECTION): lm.pop(name) for name in list(lm) if PROJECTION in name
    }
    text_encoder = T5EncoderModel.from_pretrained(t5, local_files_only=True, dtype=torch.float32)
    model = MusicgenForConditionalGeneration(
        text_encoder=text_encoder,
        audio_encoder=_filled(EncodecModel(_codec_config(codec)), _rename(codec, CODEC_NAMES)),
        decoder=_filled(MusicgenForCausalLM(_lm_config(lm)), _rename(_split(lm), LM_NAMES)),
    )
    check_fit(projection, model.enc_to_dec_proj.state_dict(), f"{checkpoint} with {t5}")
    model.enc_to_dec_proj.load_state_dict(projection)
    start = model.decoder.config.pad_token_id
    model.generation_config.decoder_start_token_id = start
    model.generation_config.pad_token_id = start
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(t5, local_files_only=True).save_pretrained(out)


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that audiocraft exported, and nothing but tensors and text."""
    if not path.is_file():
        raise ValueError(
            f"found no {path.name} in {path.parent}; copy facebook/audiogen-medium as a whole"
        )
    exported = torch.load(path, map_location="cpu", weights_only=True)
    if "best_state" not in exported:
        raise ValueError(f"{path} holds {sorted(exported)[:3]}, expected best_state; copy it again")
    state: dict[str, Tensor] = exported["best_state"]
    return dict(state)


def _lm_config(tensors: dict[str, Tensor]) -> MusicgenDecoderConfig:
    """Read the decoder's sizes from its tensors."""
    num_codes, hidden_size = tensors["linears.0.weight"].shape
    return MusicgenDecoderConfig(
        vocab_size=num_codes,
        hidden_size=hidden_size,
        num_hidden_layers=_count(tensors, r"transformer\.layers\.(\d+)\."),
        num_attention_heads=hidden_size // HEAD_SIZE,
        ffn_dim=tensors["transformer.layers.0.linear1.weight"].shape[0],
        num_codebooks=_count(tensors, r"emb\.(\d+)\."),
        activation_function="gelu",
        pad_token_id=num_codes,  # the code that stands before the first
        bos_token_id=num_codes,
    )


def _codec_config(tensors: dict[str, Tensor]) -> EncodecConfig:
    """Read the codec's sizes from its tensors."""
    num_codes, width = tensors["quantizer.vq.layers.0._codebook.embed"].shape
    num_codebooks = _count(tensors, r"quantizer\.vq\.layers\.(\d+)\.")
    frame_rate = SAMPLE_RATE / math.prod(RATIOS)  # 50 Hz
    return EncodecConfig(
        sampling_rate=SAMPLE_RATE,
        upsampling_ratios=RATIOS,
        hidden_size=width,
        codebook_dim=width,
        codebook_size=num_codes,
        num_filters=len(tensors["encoder.model.0.conv.conv.bias"]),
        num_lstm_layers=_count(tensors, r"encoder\.model\.\d+\.lstm\.weight_ih_l(\d+)"),
        use_causal_conv=False,
        use_conv_shortcut=False,
        pad_mode="constant",
        # In kbit/s: transformers counts the codebooks from it.
        target_bandwidths=[num_codebooks * math.ceil(math.log2(num_codes)) * frame_rate / 1000],
    )


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """Count what is numbered from 0 in tensor names."""
    return 1 + max(int(match[1]) for name in tensors if (match := re.match(pattern, name)))


def _split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the joint projections of attention into those of queries, keys and values."""
    split: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("in_proj_weight"):
            for kind, part in zip("qkv", value.chunk(3), strict=True):
                split[name.replace("in_proj_weight", f"{kind}_proj.weight")] = part
        else:
            split[name] = value
    return split


def _rename(tensors: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _filled(module: Any, tensors: dict[str, Tensor]) -> Any:
    """Give a network its weights; all of them, and no others."""
    check_fit(tensors, module.state_dict(), f"AudioGen as a {type(module).__name__}")
    module.load_state_dict(tensors)
    return module.eval()
