"""The text of a reply: which id comes next, and ids to characters as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mllm_audio.config import check_range
from mllm_audio.data.dataset import seeded

BROKEN = "\ufffd"  # what bytes decode to that are not, or not yet, a character


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How the text of a reply is chosen; names and order of the steps are Hugging Face's."""

    do_sample: bool = True  # False always takes the likeliest id
    temperature: float = 1.0  # below 1 sharpens the distribution
    top_p: float = 1.0  # sample among the likeliest ids of this total probability
    top_k: int = 0  # sample among this many ids; 0 = all
    repetition_penalty: float = 1.0  # on ids of the conversation's text; above 1 avoids them
    max_new_tokens: int = 256  # text ids of a reply, each `<|audio_start|>` one of them
    stop_strings: tuple[str, ...] = ()  # end the reply before any of them
    max_audio_spans: int | None = None  # that a reply may open; None = any number

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range("text", self, 0, 100, "temperature", "repetition_penalty", open_low=True)
        check_range("text", self, 0, 1, "top_p", open_low=True)
        check_range("text", self, 0, 10_000_000, "top_k", "max_audio_spans")
        check_range("text", self, 1, 10_000_000, "max_new_tokens")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(
                f"text.stop_strings={self.stop_strings!r}, expected a tuple of strings, none empty"
            )


class TextSampler:
    """Choose the next id of one conversation; the same seed repeats the same choices."""

    def __init__(self, config: TextConfig, seed: int, input_ids: Sequence[int]) -> None:
        self.config = config
        self.input_ids = list(input_ids)  # text so far, without markers
        self.generator = seeded("text", seed)
        self.processors = LogitsProcessorList()
        if config.repetition_penalty != 1:
            penalty = float(config.repetition_penalty)
            self.processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if config.do_sample:
            self.processors.append(TemperatureLogitsWarper(float(config.temperature)))
            if config.top_k:
                self.processors.append(TopKLogitsWarper(config.top_k))
            if config.top_p < 1:
                self.processors.append(TopPLogitsWarper(config.top_p))

    def choose(self, logits: Tensor, forbidden: Sequence[int]) -> int:
        """Pick an id by (1, V) logits, none of the `forbidden`.

        On the CPU in float32, so that a seed means the same on every device.
        """
        logits = logits.float().cpu().index_fill(1, torch.tensor(forbidden), -torch.inf)
        said = torch.tensor([self.input_ids], dtype=torch.long)  # (1, L)
        scores = self.processors(said, logits)  # (1, V)
        if not self.config.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))

    def add(self, token: int) -> None:
        """Count an id as said."""
        self.input_ids.append(token)


class TextStream:
    """Turn the ids of one stretch of text into characters as they come.

    What it returns never ends inside a character, and never holds a stop string nor the beginning
    of what may become one.
    """

    def __init__(
        self, text_tokenizer: PreTrainedTokenizerBase, before: int, stop_strings: Sequence[str]
    ) -> None:
        """Begin behind the id `before`: some tokenizers drop the space at the start of a text."""
        self.text_tokenizer = text_tokenizer
        self.stop_strings = stop_strings
        self.input_ids = [before]
        self.start = len(self._decoded())  # characters that are not of this stretch
        self.stopped = False  # at a stop string
        added = text_tokenizer.added_tokens_decoder.items()
        self.silent = {token for token, content in added if content.special}

    def push(self, token: int) -> str:
        """Take the next id; return the characters that are certain now."""
        if token in self.silent:
            return ""
        self.input_ids.append(token)
        text = self._pending()
        stops = [text.find(stop) for stop in self.stop_strings if stop in text]
        if stops:
            self.stopped = True
            return self._taken(text[: min(stops)])
        return self._taken(text[: len(text) - self._held(text)])

    def flush(self) -> str:
        """Return what was held back, at the end of the stretch; half a character is dropped."""
        return self._taken(self._pending())

    def _decoded(self) -> str:
        text: str = self.text_tokenizer.decode(
            self.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _pending(self) -> str:
        """Decode what was not returned yet."""
        return self._decoded()[self.start :].rstrip(BROKEN)

    def _taken(self, text: str) -> str:
        self.start += len(text)
        return text

    def _held(self, text: str) -> int:
        """Count the characters at the end that a stop string may begin with."""
        heads = (stop[:n] for stop in self.stop_strings for n in range(1, len(stop)))
        return max((len(head) for head in heads if text.endswith(head)), default=0)
