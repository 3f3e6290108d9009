"""Captions to prompts: text ids, or what the conditioner of the model makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.conditioners import Conditioner, PromptStream, load_conditioner, pad
from mllm_audio.data.dataset import prompt_ids
from mllm_audio.data.layout import Prompt, Text
from mllm_audio.data.messages import AudioPart, Message, TextPart, render
from mllm_audio.modality import AudioConfig


def load_checked(config: AudioConfig, spec: str | None, device: torch.device) -> Conditioner:
    """Load a model's conditioner.

    Args:
        config: of the model.
        spec: where the conditioner is now; None: where it was in training.
        device: to run it on.

    Raises:
        ValueError: if it is not the one that the model was trained with.
    """
    spec = spec or config.conditioner
    if spec is None:
        raise ValueError(
            "the model was not trained yet, so it names no conditioner; pass one, as "
            "--conditioner clap_t5:clap=FOLDER,t5=FOLDER"
        )
    conditioner = load_conditioner(spec, device)
    expected = config.conditioner_fingerprint
    if expected and conditioner.fingerprint != expected:
        raise ValueError(
            f"the model was trained on prompts of {config.conditioner} with fingerprint "
            f"{expected}, found {spec} with {conditioner.fingerprint}; name the one it was "
            "trained with, as --conditioner clap_t5:clap=FOLDER,t5=FOLDER"
        )
    return conditioner


def embed(
    conditioner: Conditioner, captions: Sequence[str], streams: Sequence[PromptStream]
) -> list[Prompt]:
    """Embed captions as those of a conditioner's streams that a model takes.

    Raises:
        ValueError: for an empty caption.
    """
    if not all(caption.strip() for caption in captions):
        raise ValueError("found an empty caption, expected a description of the sound to make")
    names = [stream.name for stream in conditioner.streams]
    places = [names.index(stream.name) for stream in streams]
    embedded = conditioner.embed(captions)
    return [Prompt(pad([row[place] for place in places], streams)) for row in embedded]


def caption_ids(
    text_tokenizer: PreTrainedTokenizerBase, caption: str, *, as_request: bool = False
) -> Tensor:
    """Tokenize a caption, (L,), as it is, or as a request that sound answers.

    Raises:
        ValueError: if it is empty.
    """
    if not as_request:
        return prompt_ids(text_tokenizer, caption)
    if not caption.strip():
        raise ValueError("found an empty caption, expected a description of the sound to make")
    # As in training, the answer there: templates may write something between prompt and reply.
    request, answer = Message("user", (TextPart(caption),)), AudioPart(None)
    pieces = render([request, Message("assistant", (answer,))], text_tokenizer)
    before = itertools.takewhile(lambda piece: isinstance(piece, Text), pieces)
    return torch.cat([piece.input_ids for piece in before if isinstance(piece, Text)])
