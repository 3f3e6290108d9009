"""How much of a reply fits among a model's positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mllm_audio.generation.decode import GenerationConfig, token_limits
from mllm_audio.modality import AudioConfig


@dataclass(frozen=True)
class Room:
    """The lengths that spans of audio may have in a sequence of at most `limit` positions.

    Raises:
        ValueError: from every property, if the model cannot make a span as long as asked for.
    """

    audio: AudioConfig
    config: GenerationConfig  # durations count what an open span holds already
    limit: int  # positions of text, markers and latents together

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Give (fewest, most) latents of a span by the duration settings."""
        return token_limits(self.audio, self.config)

    def most(self, start: int) -> int:
        """Count the latents for which there is room in a span that starts at position `start`."""
        room = self.limit - start - 2  # beside both markers
        column = self.audio.tokens_per_column
        return min(self.lengths[1], room // column * column)

    def opens(self, start: int) -> bool:
        """Tell whether the shortest span has room at position `start`."""
        return self.most(start) >= self.lengths[0]

    def check(self, length: int, given: int | None = None) -> None:
        """Refuse a conversation that is too long to reply to, or a recording to go on with.

        Args:
            length: positions of the conversation.
            given: latents of a recording at its end that goes on; None: there is none.

        Raises:
            ValueError: with what was found and what there is room for.
        """
        fewest, longest = self.lengths
        column = self.audio.tokens_per_column
        seconds = self.audio.column_seconds / column  # of a latent
        if given is not None and given >= longest:
            raise ValueError(
                f"the recording to continue lasts {given * seconds:g} s, the whole may last "
                f"{longest * seconds:g} s; shorten it, or allow more: this model makes at most "
                f"{self.audio.max_seconds:g} s (audio.max_tokens)"
            )
        needed = 1
        if given is not None:
            needed = max(fewest - given, column) + 1  # and the end
        if length + needed > self.limit:
            raise ValueError(
                f"the conversation takes {length} positions, a reply at least {needed}, and the "
                f"model has max_position_embeddings={self.limit}; shorten the text or the audio, "
                "or begin a new conversation"
            )
