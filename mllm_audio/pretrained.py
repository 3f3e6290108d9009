"""Trained Hugging Face checkpoints: load one, check that it can take audio, grow its vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm_audio.backbone import run, text_logits
from mllm_audio.quiet import quiet
from mllm_audio.weights import ADAPTER_FILE


def load_backbone(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a trained decoder from a folder or the hub, and check that it can take audio.

    Raises:
        ValueError: if there is no such checkpoint, it is damaged or incomplete, or it is not a
            decoder that runs on embeddings and position ids.
    """
    config = _load_config(path)
    try:
        with quiet(is_local=Path(path).is_dir()):
            backbone, report = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load {path}: {first_line(error)}; copy or download it again"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of a {config.model_type} language model, e.g. "
            f"{missing[:3]}; expected a whole checkpoint of a causal language model"
        )
    backbone.eval()
    check_decoder(backbone, path)
    loaded: PreTrainedModel = backbone
    return loaded


def _load_config(path: str) -> PretrainedConfig:
    """Read the configuration, refusing what is no decoder before its weights are read."""
    if (Path(path) / ADAPTER_FILE).is_file():
        raise ValueError(f"{path} is a voice already; expected a text-only language model")
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"found no folder {path}; expected one with config.json and weights")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"found no Hugging Face model at {path} ({first_line(error)}); expected a folder with "
            "config.json and weights, or the name of a model on the hub"
        ) from error
    if hasattr(config, "audio"):
        raise ValueError(f"{path} already has a voice; expected a text-only language model")
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{path} is an encoder-decoder ({kind}); expected a decoder such as GPT-2")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(f"{path} is an encoder ({kind}); expected a decoder such as GPT-2")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{path} ({kind}) is not a causal language model; expected a decoder")
    for name in ("hidden_size", "max_position_embeddings"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(
                f"{path} ({kind}) has no {name} of its own; expected a text-only decoder with "
                "position ids, such as GPT-2, LLaMA, Qwen or Mistral"
            )
    return config


def load_text_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """Load the text tokenizer of a folder or hub model.

    Raises:
        ValueError: if there is none.
    """
    try:
        text_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not text_tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("an empty one")  # made up of the model's type alone
        return text_tokenizer
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"found no text tokenizer at {path} ({first_line(error)}); expected tokenizer.json, "
            "copy it from the model's origin"
        ) from error


@torch.no_grad()
def check_decoder(backbone: PreTrainedModel, path: str) -> None:
    """Refuse a model that sees the future, takes no position ids, or has logits we do not know.

    Raises:
        ValueError: naming what was found.
    """
    kind = backbone.config.model_type
    parameters = inspect.signature(backbone.base_model.forward).parameters
    missing = [name for name in ("inputs_embeds", "position_ids") if name not in parameters]
    if missing:
        raise ValueError(f"{path} ({kind}) takes no {missing[0]}; expected GPT-2, LLaMA, Qwen, ...")
    input_ids = torch.arange(8, device=backbone.device)[None] % backbone.config.vocab_size
    position_ids = torch.arange(8, device=backbone.device)[None]
    embeds = backbone.get_input_embeddings()(input_ids)
    changed = torch.cat([embeds[:, :-1], embeds[:, :1]], dim=1)
    hidden = run(backbone, embeds, position_ids)
    seen = run(backbone, changed, position_ids)
    # Not to the last bit: experts group tokens, and round, differently.
    if not torch.allclose(hidden[:, :-1], seen[:, :-1], rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{path} ({kind}) attends to future tokens: an encoder; expected a decoder"
        )
    mask = torch.ones_like(input_ids)  # without one transformers warns of padding
    expected = backbone(input_ids, attention_mask=mask, use_cache=False).logits
    if not torch.allclose(text_logits(backbone, hidden), expected, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{path} ({kind}) computes its logits in a way that is not supported; expected GPT-2, "
            "LLaMA, Qwen, Mistral, Gemma, ..."
        )


def resize_vocabulary(backbone: PreTrainedModel, new_ids: Sequence[int]) -> None:
    """Give `new_ids` rows in the embeddings; the rows of other ids stay as they are.

    A new row is drawn around the mean of the others with their spread, as an ordinary token's,
    from a seed of its own. So are rows that a text tokenizer has ids for and the table has not.
    """
    old = backbone.get_input_embeddings().weight.shape[0]
    size = max(old, max(new_ids, default=0) + 1)
    if size > old:
        backbone.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(sorted({*new_ids, *range(old, size)}), dtype=torch.long)
    for layer in (backbone.get_input_embeddings(), backbone.get_output_embeddings()):
        known = layer.weight.data[:old]
        noise = torch.randn(len(rows), known.shape[1], generator=generator).to(known)
        layer.weight.data[rows] = known.mean(dim=0) + known.std() * noise
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[rows] = 0.0


def first_line(error: BaseException) -> str:
    """Shorten a library's message of many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]
