"""The audio of one request: where its latents stand, and what comes after each position.

A request's state is keyed by its id and outlives preemption: its latents cannot be had back from
token ids. Pure torch: nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllm_audio.generation.interleaved import span_seed
from mllm_audio.generation.room import Room
from mllm_audio.modality import AudioConfig
from mllm_audio.text import SpecialIds
from mllm_audio_vllm.options import AudioOptions


@dataclass
class Span:
    """A stretch of audio: its marker at `start`, latent i behind it at `start + 1 + i`."""

    start: int  # position of `<|audio_start|>`
    seed: int  # of its noise
    longest: int  # latents after which it ends in any case
    learned: bool = True  # its elements predict
    given: bool = False  # it stands in the prompt, and is closed there
    latents: list[Tensor] = field(default_factory=list)  # each (D,)


@dataclass(frozen=True)
class Query:
    """What is to be decided behind a row: the next latent of a span, or its end."""

    span: Span
    index: int  # content position of the latent that may come

    @property
    def is_stored(self) -> bool:
        """Tell whether the latent was drawn before a preemption; it is never drawn again."""
        return self.index < len(self.span.latents)


class RequestState:
    """The spans of one request, in order."""

    def __init__(
        self,
        options: AudioOptions,
        prompt_ids: Sequence[int],
        special: SpecialIds,
        audio: AudioConfig,
        limit: int,
        device: torch.device,
    ) -> None:
        """Find the spans of the prompt.

        Args:
            options: of the request.
            prompt_ids: with an `<|audio|>` for each given latent.
            special: ids of the markers.
            audio: of the model.
            limit: positions that a sequence may have.
            device: for the latents.

        Raises:
            ValueError: if ids and latents do not agree.
        """
        self.options, self.audio = options, audio
        self.room = Room(audio, options.generation, limit)
        self.prompt_length = len(prompt_ids)
        self.spans: list[Span] = []
        self.opened = 0  # by the reply itself
        self.first = (
            0  # of the spans that belong to the reply: those before are closed in the prompt
        )
        self.prompts = self._read_prompts(prompt_ids, special, device)
        self._read_spans(prompt_ids, special, device)

    def _read_prompts(
        self, ids: Sequence[int], special: SpecialIds, device: torch.device
    ) -> tuple[int, tuple[Tensor, ...]] | None:
        """Read the conditioner's streams, each (L_s, D_s), and where they begin."""
        if not self.options.prompts:
            return None
        streams = zip(self.options.prompts, self.audio.prompt_streams, strict=True)
        read = tuple(_rows(data, stream.dim, device) for data, stream in streams)
        if sum(map(len, read)) != list(ids).count(special.cond):
            raise ValueError("the prompt's embeddings and its <|cond|> ids differ in number")
        return list(ids).index(special.cond), read

    def _read_spans(self, ids: Sequence[int], special: SpecialIds, device: torch.device) -> None:
        latents = iter(_rows(self.options.latents, self.audio.latent_dim, device))
        learned = iter(self.options.learned)
        span: Span | None = None
        for position, token in enumerate(ids):
            if token == special.audio_start:
                span = self.open(position, learned=next(learned, True))
            elif token == special.audio and span is not None:
                latent = next(latents, None)
                if latent is None:
                    raise ValueError("the prompt has more <|audio|> ids than latents")
                span.latents.append(latent)
            elif token == special.audio_end and span is not None:
                span.given, span.longest, span = True, len(span.latents), None
        if next(latents, None) is not None:
            raise ValueError("the prompt has fewer <|audio|> ids than latents")
        self.opened = 0
        self.first = len(self.spans) - int(span is not None)
        if span is not None:  # it goes on in the reply, whose span 0 it is
            span.seed = self._seed(0)

    def _seed(self, index: int) -> int:
        """Give the seed of span `index` of the reply."""
        options = self.options
        return options.seed if options.single else span_seed(options.seed, index)

    def open(self, start: int, *, learned: bool = True) -> Span:
        """Begin a span whose marker stands at position `start`."""
        seed = self._seed(len(self.spans) - self.first)
        longest = self.room.lengths[1] if self.options.single else self.room.most(start)
        span = Span(start, seed, longest, learned)
        self.spans.append(span)
        self.opened += 1
        return span

    def may_open(self, start: int) -> bool:
        """Tell whether a span may begin at position `start`."""
        most = self.options.max_audio_spans
        return (most is None or self.opened < most) and self.room.opens(start)

    def after(self, position: int) -> Query | None:
        """Say what the element at `position` asks for; None where text follows."""
        for span in reversed(self.spans):
            index = position - span.start
            if index >= 0:
                within = index <= len(span.latents) and not span.given
                return Query(span, index) if within else None
        return None

    def truncate(self, length: int) -> None:
        """Forget spans whose marker is not among the first `length` positions.

        A step in flight may be dropped when its request is preempted. Latents of a span that
        stays are kept: they are what would be drawn again.
        """
        kept = [span for span in self.spans if span.start < length]
        self.opened -= len(self.spans) - len(kept)
        self.spans = kept

    def held(self, start: int, end: int) -> Iterator[tuple[int, Span, int]]:
        """Yield (position, span, content position) of latents in [start, end); -1 is the marker."""
        for span in self.spans:
            first, last = max(start, span.start), min(end, span.start + 1 + len(span.latents))
            for position in range(first, last):
                yield position, span, position - span.start - 1

    def predicts(self, span: Span, index: int) -> bool:
        """Tell whether the latent at content position `index` predicts what follows it."""
        return span.learned and (self.audio.end_of_audio or index + 1 < span.longest)


def _rows(data: bytes, dim: int, device: torch.device) -> Tensor:
    """Read (K, dim) float32.

    Raises:
        ValueError: if they are no whole rows, or not finite.
    """
    if len(data) % (4 * dim):
        raise ValueError(f"found {len(data)} bytes of rows, expected {4 * dim} for each")
    rows = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.zeros(0)
    if not bool(rows.isfinite().all()):
        raise ValueError("found values that are not finite")
    return rows.view(-1, dim).to(device)
