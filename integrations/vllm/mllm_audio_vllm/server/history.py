"""Earlier answers that clients refer to by the id of their audio."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mllm_audio.data.messages import AudioPart, TextPart
from mllm_audio.types import Clip

Parts = tuple[TextPart | AudioPart, ...]
OVERHEAD = 512  # bytes that an answer, and each of its parts, takes beside its content


def new_id() -> str:
    """Make up an id that nobody guesses: who knows it may hear the answer."""
    return f"audio_{secrets.token_urlsafe(24)}"


@dataclass(frozen=True)
class _Answer:
    parts: Parts
    num_bytes: int
    expires_at: float


class History:
    """Answers by id, until they expire or others need their room, the least used first."""

    def __init__(
        self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.max_bytes, self.seconds, self.clock = max_bytes, seconds, clock
        self.num_bytes = 0
        self.answers: OrderedDict[str, _Answer] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self.answers)

    def put(self, answer_id: str, parts: Sequence[TextPart | AudioPart]) -> int:
        """Keep an answer, unless it has no room at all; return when it expires, in Unix time."""
        self._expire()
        own = tuple(map(_owned, parts))
        answer = _Answer(own, _num_bytes(own), self.clock() + self.seconds)
        if answer.num_bytes <= self.max_bytes:
            self.answers[answer_id] = answer
            self.num_bytes += answer.num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self.answers)))
        return int(answer.expires_at)

    def get(self, answer_id: str) -> Parts | None:
        """Return the parts of an answer, or None if it is unknown or has expired."""
        self._expire()
        if answer_id not in self.answers:
            return None
        self.answers.move_to_end(answer_id)
        return self.answers[answer_id].parts

    def _expire(self) -> None:
        now = self.clock()
        for answer_id in [i for i, a in self.answers.items() if a.expires_at <= now]:
            self._drop(answer_id)

    def _drop(self, answer_id: str) -> None:
        self.num_bytes -= self.answers.pop(answer_id).num_bytes


def _owned(part: TextPart | AudioPart) -> TextPart | AudioPart:
    """Copy latents, which may be a view of more than is counted."""
    if isinstance(part, AudioPart) and isinstance(part.audio, Tensor):
        return AudioPart(part.audio.detach().float().cpu().clone())
    return part


def _num_bytes(parts: Parts) -> int:
    return OVERHEAD + sum(OVERHEAD + _content_bytes(part) for part in parts)


def _content_bytes(part: TextPart | AudioPart) -> int:
    if isinstance(part, TextPart):
        return 4 * len(part.text)
    tensor = part.audio.waveform if isinstance(part.audio, Clip) else part.audio
    return int(tensor.numel() * tensor.element_size())
