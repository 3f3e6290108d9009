"""The text side of a sequence: the special ids, and a tokenizer that needs no download."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

AUDIO_START = "<|audio_start|>"  # opens a span: the paper's BOS
AUDIO = "<|audio|>"  # holds the place of one latent
AUDIO_END = "<|audio_end|>"  # closes a span
COND = "<|cond|>"  # holds the place of one prompt embedding
SPECIAL_TOKENS = (AUDIO_START, AUDIO, AUDIO_END, COND)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Where the special tokens stand in a text tokenizer's vocabulary."""

    audio_start: int
    audio: int
    audio_end: int
    cond: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
        """Look the ids up.

        Raises:
            ValueError: if the tokenizer lacks one of `SPECIAL_TOKENS`.
        """
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the text tokenizer lacks {', '.join(missing)}; was it saved by mllm-audio?"
            )
        return cls(**{token[2:-2]: vocabulary[token] for token in SPECIAL_TOKENS})

    @property
    def all(self) -> list[int]:
        """List the ids in the order of `SPECIAL_TOKENS`."""
        return [self.audio_start, self.audio, self.audio_end, self.cond]


def add_special_tokens(text_tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Add `SPECIAL_TOKENS` to a text tokenizer, in place; return the ids that are new.

    Raises:
        ValueError: if the tokenizer knows one of them already: it means something else there.
    """
    known = [token for token in SPECIAL_TOKENS if token in text_tokenizer.get_vocab()]
    if known:
        raise ValueError(
            f"the text tokenizer already has {', '.join(known)}, which mllm-audio gives another "
            "meaning; expected a text-only language model"
        )
    tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    text_tokenizer.add_tokens(tokens, special_tokens=True)
    return SpecialIds.of(text_tokenizer).all


def adds_bos(text_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer begins every text with its start token, as LLaMA's does."""
    start = text_tokenizer.bos_token_id
    return start is not None and text_tokenizer("a")["input_ids"][:1] == [start]


def train_text_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerBase:
    """Train a lower-casing byte-level BPE, on captions usually.

    A small corpus merges every word it holds into one token, which keeps prompts short; a word
    it has never seen is spelled in bytes, so no text is out of vocabulary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(texts), trainer)  # sorted: merges must not depend on the order
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=list(special_tokens),
        clean_up_tokenization_spaces=False,
    )


def wordless_tokenizer() -> PreTrainedTokenizerBase:
    """Make the text tokenizer of a model without text: the special tokens and nothing else."""
    names = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token=SPECIAL_TOKENS[-1])),
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )
