"""Captioned clips at hand as rows to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mllm_audio.data.clips import PreparedClip
from mllm_audio.data.dataset import InMemory, prompt_ids
from mllm_audio.data.layout import Audio, Row, Text


@dataclass(frozen=True)
class CaptionedClips(InMemory):
    """Clips that follow one of their captions."""

    clips: Sequence[PreparedClip]
    text_tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.clips)

    def length(self, index: int) -> int:
        """Count the latents of a clip."""
        return self.clips[index].num_tokens

    def name(self, index: int) -> str:
        """Name the clip's sound file."""
        return self.clips[index].name

    def row(self, index: int, generator: torch.Generator) -> Row:
        """Put the clip behind a caption drawn from its wordings."""
        clip = self.clips[index]
        text = Text(prompt_ids(self.text_tokenizer, self.caption(index, generator)))
        return [text, Audio(clip.latents(), torch.arange(clip.num_tokens))]

    def caption(self, index: int, generator: torch.Generator) -> str:
        """Draw one of a clip's wordings."""
        return self.clips[index].captions[self.wording(index, generator)]

    def wording(self, index: int, generator: torch.Generator) -> int:
        """Draw the number of one of a clip's wordings."""
        count = len(self.clips[index].captions)
        return int(torch.randint(count, (1,), generator=generator))
