"""Tiny random text encoders in the layouts of the published ones."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(folder: Path, specials: list[str], template: str) -> None:
    """Save a byte-level tokenizer whose first ids are `specials`."""
    names = {token: number for number, token in enumerate([*specials, *BYTES])}
    bpe = Tokenizer(models.BPE(vocab=names, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(s, names[s]) for s in specials if s in template]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def write_t5(folder: Path, width: int = 16, seed: int = 0) -> Path:
    """Save a T5 encoder with its tokenizer, as google/flan-t5-* lie on the hub."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=300,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    write_tokenizer(folder, ["<pad>", "</s>"], "$A </s>")
    return folder


def write_clap(folder: Path, seed: int = 0) -> Path:
    """Save a CLAP with tokenizer and feature extractor, as laion/clap-* lie on the hub."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        "projection_dim": 24,
    }
    audio = {
        "spec_size": 64,
        "num_mel_bins": 64,
        "hidden_size": 64,
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "num_attention_heads": [2, 2],
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "projection_dim": 24,
    }
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    ClapModel(config).save_pretrained(folder)
    write_tokenizer(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>")
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return folder
