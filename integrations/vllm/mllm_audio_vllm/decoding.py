"""One step of all requests: what enters the language model, and what is drawn from its states.

The embeddings, the ends and the latents are `AudioModality`'s, as in training and in `generate`.
Pure torch: nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mllm_audio.diffusion.noise import Noise
from mllm_audio.heads.base import SamplingConfig
from mllm_audio.modality import AudioModality
from mllm_audio.text import SpecialIds
from mllm_audio_vllm.state import Query, RequestState

SettingT = TypeVar("SettingT", bound=Hashable)


@dataclass(frozen=True)
class Row:
    """What one request computes in a step."""

    state: RequestState | None  # None: a request of text
    start: int  # position of its first element
    count: int  # elements
    offset: int  # of them in the flattened batch
    samples: bool  # false for a part of the prompt that is not the last

    @property
    def last(self) -> int:
        """Position of its last element."""
        return self.start + self.count - 1


@dataclass(frozen=True)
class Held:
    """Elements whose embedding is no text id's: places in the flattened batch, and embeddings."""

    places: Tensor  # (M,) int64
    embeds: Tensor  # (M, H)


@dataclass(frozen=True)
class Choices:
    """What a step decides about the next ids."""

    forced: tuple[tuple[int, int], ...]  # row, id that comes
    closed: tuple[int, ...]  # rows of text that may not open a span
    drawn: tuple[tuple[str, int], ...]  # key of the request and position of each new latent
    latents: Tensor | None  # (R, D) of them


class Decoder:
    """Audio in the steps of an engine.

    Attributes:
        audio: the modality, in evaluation mode.
        special: ids of the markers.
        share: makes a tensor that of the first of several processes that decode the same.
        num_drawn, num_stored: latents drawn, and found drawn after a preemption.
    """

    def __init__(
        self,
        audio: AudioModality,
        special: SpecialIds,
        share: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.audio, self.special, self.share = audio, special, share
        self.num_drawn, self.num_stored = 0, 0

    def held(self, rows: Iterable[Row], marker: Tensor) -> Held | None:
        """Embed latents, and markers of audio that the model did not say; (H,) is the marker's."""
        places: list[int] = []
        latents: list[Tensor] = []
        indices, predicting, plain = [], [], []
        for row in rows:
            if row.state is None:
                continue
            for position, span, index in row.state.held(row.start, row.start + row.count):
                place = row.offset + position - row.start
                if index >= 0:
                    if row.state.predicts(span, index):
                        predicting.append(len(places))
                    places.append(place)
                    latents.append(span.latents[index])
                    indices.append(index)
                elif not span.learned:
                    plain.append(place)
        if not places and not plain:
            return None
        device = self.audio.latent_mean.device
        embeds = marker.new_zeros(0, len(marker))
        if places:
            positions = torch.tensor(indices, device=device)
            embeds = self.audio.embed(torch.stack(latents), positions)  # (M, H)
            chosen = torch.tensor(predicting, device=device, dtype=torch.long)
            targets = self.audio.embed_targets(positions[chosen] + 1)
            embeds = embeds.index_add(0, chosen, targets)
        embeds = torch.cat([embeds, marker.to(embeds).expand(len(plain), -1)])
        return Held(torch.tensor(places + plain, device=device), embeds)

    def prompted(self, rows: Iterable[Row]) -> Held | None:
        """Embed what the conditioner made of captions, where a step computes it."""
        places: list[int] = []
        embeds: list[Tensor] = []
        for row in rows:
            if row.state is None or row.state.prompts is None:
                continue
            first, streams = row.state.prompts
            begin = max(row.start, first)
            end = min(row.start + row.count, first + sum(map(len, streams)))
            if begin < end:
                embedded = self.audio.embed_prompts([s[None] for s in streams])[0]  # (L, H)
                offset = row.offset - row.start
                places += range(offset + begin, offset + end)
                embeds.append(embedded[begin - first : end - first])
        if not places:
            return None
        return Held(torch.tensor(places, device=embeds[0].device), torch.cat(embeds))

    def choose(
        self, rows: Sequence[Row], last_ids: Sequence[int], cond: Tensor, uncond: Tensor | None
    ) -> Choices:
        """Decide what follows each row, and draw the latents that do.

        Args:
            rows: of the step.
            last_ids: the id of each row's last element.
            cond: (R, H) states of these elements.
            uncond: (R, H) of the unconditional branch; None: there is none.
        """
        queries: dict[int, Query] = {}
        closed = []
        for number, (row, last_id) in enumerate(zip(rows, last_ids, strict=True)):
            query = self._query(row, last_id)
            if query is not None:
                queries[number] = query
            elif row.state is None or not row.state.may_open(row.last + 1):
                closed.append(number)
        ended = self._ended(rows, queries, cond)
        forced = [
            (number, self.special.audio_end if number in ended else self.special.audio)
            for number in queries
        ]
        new = {n: q for n, q in queries.items() if n not in ended and not q.is_stored}
        self.num_stored += len(queries) - len(ended) - len(new)
        self.num_drawn += len(new)
        if not new:
            return Choices(tuple(forced), tuple(closed), (), None)
        latents = self.share(self._draw(rows, new, cond, uncond))
        for query, latent in zip(new.values(), latents, strict=True):
            query.span.latents.append(latent)
        drawn = tuple((rows[n].state.options.key, rows[n].last + 1) for n in new)  # type: ignore[union-attr]
        return Choices(tuple(forced), tuple(closed), drawn, latents)

    def _query(self, row: Row, last_id: int) -> Query | None:
        if row.state is None or not row.samples:
            return None
        query = row.state.after(row.last)
        if query is None and last_id == self.special.audio_start:
            return Query(row.state.open(row.last), 0)
        return query

    def _ended(self, rows: Sequence[Row], queries: dict[int, Query], cond: Tensor) -> set[int]:
        """List the rows whose span ends; what was drawn once is never ended before."""
        ended, open_questions = set(), {}
        for number, query in queries.items():
            state = rows[number].state
            assert state is not None
            if query.is_stored:
                continue
            if query.index >= query.span.longest:
                ended.add(number)
            elif query.index >= state.room.lengths[0] and self._is_column(query.index):
                open_questions[number] = (state.options.generation.end_threshold, query)
        if not self.audio.config.end_of_audio or not open_questions:
            return ended
        for threshold, numbers in _grouped({n: t for n, (t, _) in open_questions.items()}):
            noise = self._noise([open_questions[n][1] for n in numbers])
            ends = self.audio.ends(cond[numbers], noise, threshold)
            answers = self.share(ends.int()).tolist()
            ended |= {n for n, end in zip(numbers, answers, strict=True) if end}
        return ended

    def _is_column(self, index: int) -> bool:
        return index % self.audio.config.tokens_per_column == 0

    def _draw(
        self, rows: Sequence[Row], queries: dict[int, Query], cond: Tensor, uncond: Tensor | None
    ) -> Tensor:
        """Draw the latent of each query, (R, D): rows of equal settings in one call of the head."""
        settings: dict[int, SamplingConfig] = {}  # but for the guidance, which is a row's own
        scales: dict[int, float] = {}
        for number, query in queries.items():
            state = rows[number].state
            assert state is not None
            config = state.options.generation
            scales[number] = config.scale_at(query.index, query.span.longest)
            sampling = config.sampling_at(query.index, query.span.longest)
            guidance = 1.0 if scales[number] == 1 else 2.0
            settings[number] = replace(sampling, guidance_scale=guidance)
        latents: dict[int, Tensor] = {}
        for shared, numbers in _grouped(settings):
            is_guided, sampling = shared.guidance_scale != 1, shared
            if is_guided:
                scale = cond.new_tensor([scales[n] for n in numbers])[:, None]  # (R', 1)
                sampling = replace(shared, guidance_scale=scale)
            noise = self._noise([queries[n] for n in numbers])
            twins = uncond[numbers] if is_guided and uncond is not None else None
            drawn = self.audio.sample(cond[numbers], twins, sampling, noise)
            latents |= dict(zip(numbers, drawn, strict=True))
        return torch.stack([latents[number] for number in queries])

    def _noise(self, queries: Sequence[Query]) -> Noise:
        device = self.audio.latent_mean.device
        seeds = torch.tensor([query.span.seed for query in queries], device=device)
        positions = torch.tensor([query.index for query in queries], device=device)
        return Noise(seeds, positions, self.audio.config.latent_dim)


def _grouped(settings: Mapping[int, SettingT]) -> list[tuple[SettingT, list[int]]]:
    """Group row numbers of equal settings."""
    groups: dict[SettingT, list[int]] = {}
    for number, setting in settings.items():
        groups.setdefault(setting, []).append(number)
    return list(groups.items())
