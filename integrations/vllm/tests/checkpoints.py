"""Tiny random voices in the layout of published checkpoints, and what `generate` makes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from mllm_audio import AdaptConfig, AudioConfig, AudioLanguageModel
from mllm_audio.build import build_model
from mllm_audio.conditioners import load_conditioner
from mllm_audio.config import to_dict
from mllm_audio.data.layout import Text
from mllm_audio.data.messages import Message, TextPart, render, to_row
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.interleaved import Reply, end_ids
from mllm_audio.generation.parts import GENERATION_FILE
from mllm_audio.generation.rows import Rows
from mllm_audio.generation.text import TextConfig
from mllm_audio.generation.voice import Voice
from mllm_audio.heads.base import HeadConfig
from mllm_audio.presets import get_preset
from mllm_audio.presets.paper import prompted_by
from mllm_audio.text import SpecialIds, train_text_tokenizer, wordless_tokenizer
from mllm_audio.tokenizers import DCTTokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a dog barks while rain falls on the roof",
    "music plays softly and people talk in the background",
]
LIMIT = 512  # positions
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LIMIT,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.08,
}
FAMILIES = {
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 128,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": LIMIT,
            "bos_token_id": None,
            "initializer_range": 0.08,
        },
    ),
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 32}),
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DEFAULTS = GenerationConfig(
    num_inference_steps=4,
    guidance_scale=2.0,
    guidance_schedule="constant",
    min_seconds=0.32,
    max_seconds=1.28,
    end_threshold=None,
)


def write_voice(
    folder: Path,
    family: str = "llama",
    head: str = "flow",
    *,
    max_tokens: int = 64,
    audible: bool = False,
) -> Path:
    """Write a voice whose every weight is random, and which opens spans of its own accord.

    Its latents are far apart; where it is `audible`, they are those of quiet noise.
    """
    tokenizer = train_text_tokenizer(TEXTS, vocab_size=320, special_tokens=["<|end|>"])
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = TEMPLATE
    kind, options = FAMILIES[family]
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **options
    )
    torch.manual_seed(0)
    base = folder.with_name(f"{folder.name}-base")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    audio = AudioConfig(
        max_tokens=max_tokens,
        head=HeadConfig(name=head, width=64, num_blocks=3),
    )
    model = AudioLanguageModel.from_backbone(base, audio=audio, adapt=AdaptConfig(mode="full"))
    special = SpecialIds.of(model.text_tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.audio.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.audio.end_of_audio.bias.fill_(-1.5)
        mean, std = torch.full((128,), 0.5), torch.linspace(0.5, 2.0, 128)
        model.audio.set_statistics(*(_of_noise() if audible else (mean, std)))
        # So loud a row is the likeliest one in every few states.
        model.backbone.get_output_embeddings().weight[special.audio_start] *= 8
    voice = Voice(model.eval(), model.text_tokenizer, None, DEFAULTS)
    model.save_pretrained(folder)
    (folder / GENERATION_FILE).write_text(json.dumps(to_dict(voice.defaults)))
    return folder


def write_prompted(folder: Path, spec: str) -> Path:
    """Write a small model of the paper, prompted by what a conditioner makes of captions."""
    conditioner = load_conditioner(spec, torch.device("cpu"))
    config = prompted_by(get_preset("audiomntp_base_small"), *conditioner.streams)
    audio = replace(
        config.audio,
        conditioner=spec,
        conditioner_fingerprint=conditioner.fingerprint,
        max_tokens=16,
    )
    torch.manual_seed(3)
    text_tokenizer = wordless_tokenizer()
    model = build_model(replace(config, audio=audio), len(text_tokenizer))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.audio.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.audio.set_statistics(*_of_noise())
    defaults = GenerationConfig(num_inference_steps=4, guidance_scale=3.0)  # annealed, the paper's
    Voice(model.eval(), text_tokenizer, DCTTokenizer(), defaults).save(folder)
    return folder


def _of_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Give mean and a small deviation of the latents of quiet noise."""
    noise = 0.1 * torch.randn(4, 16000, generator=torch.Generator().manual_seed(2))
    latents = DCTTokenizer().encode(noise).flatten(0, 1)  # (N, D)
    return latents.mean(0), 0.1 * latents.std(0)


@dataclass
class Expected:
    """What the project's own generation says."""

    ids: list[int]  # of the reply
    latents: list[torch.Tensor]  # (D,) each, in order


class Reference:
    """The project's own generation, one request at a time, on the weights of a folder."""

    def __init__(self, folder: Path) -> None:
        self.model = AudioLanguageModel.from_pretrained(folder)
        self.tokenizer = self.model.text_tokenizer
        self.special = SpecialIds.of(self.tokenizer)
        eos = self.model.backbone.generation_config.eos_token_id
        self.end_ids = end_ids(eos, self.tokenizer)

    def row(self, text: str):
        """Lay out a request of one message."""
        pieces = render(
            [Message("user", (TextPart(text),))], self.tokenizer, add_generation_prompt=True
        )
        return to_row(pieces, lambda latents: latents)

    def ids_of(self, row) -> list[int]:
        """Give the ids of a row of text."""
        return [
            token for part in row if isinstance(part, Text) for token in part.input_ids.tolist()
        ]

    def reply(
        self,
        row,
        config: GenerationConfig,
        seed: int,
        max_tokens: int,
        *,
        open_span=False,
        spans=None,
    ) -> Expected:
        """Reply until `max_tokens` ids and latents are there, or the reply ends."""
        text = TextConfig(do_sample=False, max_new_tokens=10_000, max_audio_spans=spans)
        reply = Reply(
            model=self.model,
            text_tokenizer=self.tokenizer,
            row=row,
            config=config,
            text=text,
            seed=seed,
            open_span=open_span,
        )
        recorder = _Recorder(self.special.audio, max_tokens)
        with recorder:
            for _ in reply.events():
                pass
        return Expected(recorder.ids[:max_tokens], recorder.latents)


class _Recorder:
    """Writes down what is fed to `Rows`, and stops when there is enough."""

    class EnoughError(Exception):
        pass

    def __init__(self, audio: int, most: int) -> None:
        self.audio, self.most = audio, most
        self.ids: list[int] = []
        self.latents: list[torch.Tensor] = []

    def __enter__(self):
        self.before = Rows.feed_id, Rows.feed_latents
        recorder = self

        def feed_id(rows, token, *asked):
            recorder.add(token)
            recorder.before[0](rows, token, *asked)

        def feed_latents(rows, latents, first, asked):
            recorder.latents.append(latents[0, 0].clone())
            recorder.add(recorder.audio)
            recorder.before[1](rows, latents, first, asked)

        Rows.feed_id, Rows.feed_latents = feed_id, feed_latents
        return self

    def add(self, token: int) -> None:
        self.ids.append(token)
        if len(self.ids) >= self.most:
            raise self.EnoughError

    def __exit__(self, kind, error, trace):
        Rows.feed_id, Rows.feed_latents = self.before
        return kind is self.EnoughError


def exact(seconds: float, **changes) -> GenerationConfig:
    """Ask for spans of an exact duration."""
    return replace(DEFAULTS, seconds=seconds, **changes)


__all__ = ["DEFAULTS", "LIMIT", "Expected", "Reference", "exact", "write_prompted", "write_voice"]
