"""Replies of text and audio: the language model itself says where audio begins."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm_audio.data.dataset import seeded
from mllm_audio.data.layout import Audio, ChatRow, Text, collate
from mllm_audio.data.messages import AudioPart, TextPart
from mllm_audio.data.template import end_of_reply
from mllm_audio.generation.decode import GenerationConfig, audio_span
from mllm_audio.generation.parallel import asked_targets
from mllm_audio.generation.room import Room
from mllm_audio.generation.rows import NEXT, Rows
from mllm_audio.generation.text import TextConfig, TextSampler, TextStream
from mllm_audio.model import AudioLanguageModel
from mllm_audio.text import SpecialIds
from mllm_audio.types import AudioChunk, TextDelta


@dataclass(frozen=True)
class SpanLatents:
    """The next latents of a span of audio in a reply."""

    index: int  # of the span in the reply, from 0
    latents: Tensor  # (M, D) on the CPU; of a span that ends (0, D)
    given: Tensor  # (N, D) that the conversation held of it
    last: bool = False  # the span ends


def span_seed(seed: int, index: int) -> int:
    """Derive the seed of a span's noise, so that no two spans of a reply share theirs."""
    return seeded("audio", seed, index).initial_seed()


def join(
    events: Iterable[TextDelta | AudioChunk],
    parts: Iterable[TextPart | AudioPart] = (),
    *,
    open_span: bool = False,
) -> tuple[TextPart | AudioPart, ...]:
    """Put a reply together: a text part per stretch of text, an audio part of latents per span.

    Args:
        events: in order.
        parts: of the message that the reply continues.
        open_span: whether `parts` end in latents that span 0 goes on from.
    """
    joined = list(parts)
    span = 0 if open_span else None  # that the last part belongs to
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta):
            if isinstance(last, TextPart):
                joined[-1] = TextPart(last.text + event.text)
            else:
                joined.append(TextPart(event.text))
        elif isinstance(last, AudioPart) and event.span == span:
            joined[-1] = AudioPart(torch.cat([last.audio, event.latents]))
        else:
            joined.append(AudioPart(event.latents))
            span = event.span
    return tuple(joined)


@dataclass(kw_only=True)
class Reply:
    """One reply of text and audio to a conversation.

    It ends at an end-of-text id, at a stop string, after `text.max_new_tokens`, or where the
    backbone's positions are used up; a span opens only where the shortest one has room, and ends
    where there is no room for more. With guidance an unconditional row is fed the same reply, the
    null prompt in place of text; the conditional row alone decides the text.

    Raises:
        ValueError: if the conversation leaves no room for a reply.
    """

    model: AudioLanguageModel  # in evaluation mode
    text_tokenizer: PreTrainedTokenizerBase
    row: ChatRow  # the conversation, up to where the reply begins
    config: GenerationConfig  # of each span; durations count what an open span holds already
    text: TextConfig
    seed: int  # of the text; span i has `span_seed(seed, i)`
    open_span: bool = False  # the row's last part is audio that goes on

    def __post_init__(self) -> None:
        """Measure the row, and check that the shortest reply has room behind it."""
        self.special = SpecialIds.of(self.text_tokenizer)
        settings = getattr(self.model.backbone.generation_config, "eos_token_id", None)
        self.end_ids = end_ids(settings, self.text_tokenizer)
        limit: int = self.model.backbone.config.max_position_embeddings
        self.room = Room(self.model.audio.config, self.config, limit)
        self.length = num_positions(self.row) - int(self.open_span)  # an open span has no end yet
        self.given = torch.zeros(0, self.model.audio.config.latent_dim)  # (N, D)
        if self.open_span:
            assert isinstance(self.row[-1], Audio)
            self.given = self.row[-1].latents
        self.num_ids, self.num_spans = 0, 0  # said so far
        self.room.check(self.length, len(self.given) if self.open_span else None)

    @torch.inference_mode()
    def events(self) -> Iterator[TextDelta | SpanLatents]:
        """Generate the reply, once; each piece comes as soon as it is certain."""
        ids = [token for p in self.row if isinstance(p, Text) for token in p.input_ids.tolist()]
        sampler = TextSampler(self.text, self.seed, ids)
        rows = self._begin()
        if self.open_span:
            yield from self._span(rows, self.given, self._longest_open)
        last = self.row[-1]
        before = int(last.input_ids[-1]) if isinstance(last, Text) else self.special.audio_end
        while (yield from self._text(rows, sampler, before)) == self.special.audio_start:
            longest = self.room.most(rows.last_position + 1)
            rows.feed_id(self.special.audio_start, self._asked(0, longest))
            yield from self._span(rows, self.given[:0], longest)
            before = self.special.audio_end

    def _begin(self) -> Rows:
        """Feed the conversation, laid out as in training."""
        row, copies = list(self.row), 1 + int(self.config.is_guided(self.room.lengths[1]))
        if self.open_span:
            # One latent more, cut off again below: so the last one predicts what follows it.
            latents = torch.cat([self.given, self.given[:1]])
            row[-1] = Audio(latents, torch.arange(len(latents)))
        elif isinstance(row[-1], Audio):
            row.append(Text(torch.zeros(0, dtype=torch.long)))  # closes it
        batch = collate(
            [row] * copies,
            ["conversation"] * copies,
            self.special,
            unconditional=[False, True][:copies],
            end_of_audio=self.model.audio.config.end_of_audio,
        ).to(self.model.device)
        embeds = self.model.embed(batch)[:, : self.length]  # (R', T, H), no padding
        positions = batch.position_ids[:, : self.length]
        mask = torch.ones_like(positions, dtype=torch.bool)
        asked = NEXT
        if self.open_span:
            asked = self._asked(len(self.given), self._longest_open)
        return Rows.begin(self.model, self.special, copies == 2, embeds, positions, mask, asked)

    @property
    def _longest_open(self) -> int:
        """Count the latents that the open span may have in all."""
        return self.room.most(self.length - len(self.given) - 1)

    def _asked(self, first: int, longest: int) -> range:
        """List what a span is asked for first, from content position `first` on."""
        return asked_targets(first, self.config.tokens_per_step, longest)

    def _text(
        self, rows: Rows, sampler: TextSampler, before: int
    ) -> Generator[TextDelta, None, int | None]:
        """Say text behind the id `before`; return `<|audio_start|>` to come, or None at the end."""
        stream = TextStream(self.text_tokenizer, before, self.text.stop_strings)
        while True:
            token = self._next_id(rows, sampler)
            if token is None or token == self.special.audio_start:
                break
            if text := stream.push(token):
                yield TextDelta(text)
            if stream.stopped:
                return None
            rows.feed_id(token)
            sampler.add(token)
        if text := stream.flush():
            yield TextDelta(text)
        return token

    def _next_id(self, rows: Rows, sampler: TextSampler) -> int | None:
        """Choose the next id; None where the reply ends."""
        position = rows.last_position + 1
        if self.num_ids == self.text.max_new_tokens or position >= self.room.limit:
            return None
        forbidden = [self.special.audio, self.special.audio_end, self.special.cond]
        opened = self.num_spans - int(self.open_span)
        if opened == self.text.max_audio_spans or not self.room.opens(position):
            forbidden.append(self.special.audio_start)
        token = sampler.choose(self.model.text_logits(rows.states[0][:, -1]), forbidden)
        self.num_ids += 1
        return None if token in self.end_ids else token

    def _span(self, rows: Rows, given: Tensor, longest: int) -> Iterator[SpanLatents]:
        """Go on with a span of which (N, D) latents are fed, and close it after `longest`."""
        seed = span_seed(self.seed, self.num_spans)
        index, self.num_spans = self.num_spans, self.num_spans + 1
        for step in audio_span(rows, [seed], self.config, longest, first=len(given)):
            yield SpanLatents(index, step.latents.cpu(), given)
        rows.feed_id(self.special.audio_end)
        yield SpanLatents(index, given[:0], given, last=True)


def num_positions(row: ChatRow) -> int:
    """Count the positions of a conversation, both markers of each span among them."""
    return sum(len(p.input_ids) if isinstance(p, Text) else len(p.latents) + 2 for p in row)


def end_ids(eos: int | list[int] | None, text_tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Collect the ids that end a reply: `eos`, the model's, and those of tokenizer and template."""
    listed = eos if isinstance(eos, list) else [eos]
    ends = [*listed, text_tokenizer.eos_token_id, end_of_reply(text_tokenizer)]
    return {token for token in ends if token is not None}
