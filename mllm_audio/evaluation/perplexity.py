"""Perplexity on held-out text: how much of its language a model kept while it learnt to speak."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.config import from_dict, read_json, to_dict
from mllm_audio.files import write_atomic
from mllm_audio.text import adds_bos

DRIFT_FILE = "text_drift.json"  # in a run folder


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a causal language model on a corpus."""

    value: float  # exp of the mean negative log likelihood; 1 is certainty
    num_tokens: int  # that were predicted


@dataclass(frozen=True, kw_only=True)
class TextDrift:
    """A model's perplexity on held-out text, before and after it got a voice."""

    base: Perplexity
    voice: Perplexity

    def __post_init__(self) -> None:
        if self.base.num_tokens != self.voice.num_tokens:
            raise ValueError(
                f"the base model predicted {self.base.num_tokens} text tokens and the voice "
                f"{self.voice.num_tokens}; measure both on the same texts with one tokenizer"
            )

    @property
    def change(self) -> float:
        """Relative change of the perplexity: 0.1 is 10 % worse."""
        return self.voice.value / self.base.value - 1

    def __str__(self) -> str:
        """Say both in one line."""
        return (
            f"held-out text perplexity {self.voice.value:.2f}, base model {self.base.value:.2f} "
            f"({100 * self.change:+z.1f} %) over {self.voice.num_tokens:,} tokens"
        )

    def write(self, folder: Path) -> None:
        """Write `folder/text_drift.json`."""
        write_atomic(folder / DRIFT_FILE, (json.dumps(to_dict(self), indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> TextDrift:
        """Read `folder/text_drift.json`.

        Raises:
            ValueError: if it is missing or damaged.
        """
        path = folder / DRIFT_FILE
        remedy = "measure the perplexity again"
        try:
            drift: TextDrift = from_dict(cls, read_json(path, remedy), str(path))
        except TypeError as error:
            raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
        return drift


@torch.inference_mode()
def perplexity(
    logits_of: Callable[[Tensor], Tensor],
    text_tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int,
    device: torch.device | str = "cpu",
) -> Perplexity:
    """Measure the perplexity of a causal language model on texts, over its full vocabulary.

    Each text is cut into windows of `max_length` tokens that do not overlap, each behind the start
    token where the tokenizer writes one. The first token of a window is context only; a last
    window of one token is left out. Special tokens are not recognised in the texts.

    Args:
        logits_of: (1, T) int64 ids on `device` to (1, T, V) logits, e.g.
            `lambda ids: base(ids).logits`; the model must be in evaluation mode.
        text_tokenizer: splits the texts.
        texts: held-out text.
        max_length: T of a full window, at least 2 and no more than the model has positions.
        device: where the model is.

    Raises:
        ValueError: if there is no text, or no text has two tokens.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2: one token is context")
    bos = [text_tokenizer.bos_token_id] if adds_bos(text_tokenizer) else []
    start = torch.tensor(bos, dtype=torch.long, device=device)
    total, num_tokens, num_texts = 0.0, 0, 0
    for text in texts:
        num_texts += 1
        # verbose: texts longer than the model's context are expected here.
        ids = text_tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        for block in torch.tensor(ids, dtype=torch.long, device=device).split(
            max_length - len(start)
        ):
            window = torch.cat([start, block])
            if len(window) < 2:
                continue
            logits = logits_of(window[None])[0, :-1].float()  # (T - 1, V)
            total += F.cross_entropy(logits, window[1:], reduction="none").double().sum().item()
            num_tokens += len(window) - 1
    if not num_tokens:
        found = f"{num_texts} texts, each shorter than 2 tokens" if num_texts else "no text"
        raise ValueError(f"perplexity got {found}; expected held-out text of some sentences")
    return Perplexity(value=math.exp(total / num_tokens), num_tokens=num_tokens)


def read_texts(path: Path | str) -> list[str]:
    """Read held-out texts: JSONL with a row {"text": ...} each, or one text from a .txt file.

    Raises:
        ValueError: if the file is missing or of another kind, or naming the row at fault.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f'{path} is neither .jsonl nor .txt; expected rows {{"text": ...}} or plain text'
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); expected a file of UTF-8") from error
    if path.suffix == ".txt":
        return [content]
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028, as they are.
    lines = enumerate(content.split("\n"), start=1)
    return [_text_of(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _text_of(line: str, where: str) -> str:
    """Take the text out of one JSONL row."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{where} is not JSON ({error}); expected {{"text": ...}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where} holds {line[:60]!r}; expected {{"text": "some sentences"}}')
    text: str = row["text"]
    return text
