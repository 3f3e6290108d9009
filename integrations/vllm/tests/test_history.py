"""Earlier answers are kept within their time and room."""

from __future__ import annotations

import torch

from mllm_audio.data.messages import AudioPart, TextPart
from mllm_audio.types import Clip
from mllm_audio_vllm.server.history import OVERHEAD, History, new_id


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def sound(num_floats):
    return (AudioPart(torch.arange(num_floats).float()[:, None]),)


def test_answer_is_what_was_put_until_it_expires():
    clock = Clock()
    history = History(10_000, 60.0, clock)
    parts = (TextPart("a"), *sound(3))
    assert history.put("id", parts) == 1060
    clock.now = 1059.9
    found = history.get("id")
    assert found[0] == parts[0]
    assert torch.equal(found[1].audio, parts[1].audio)
    clock.now = 1060.0
    assert history.get("id") is None
    assert (len(history), history.num_bytes) == (0, 0)


def test_least_used_answer_leaves_first():
    room = 2 * OVERHEAD + 400
    history = History(3 * room, 60.0, Clock())
    for name in "abc":
        history.put(name, sound(100))
    assert history.num_bytes == 3 * room
    history.get("a")
    history.put("d", sound(100))
    assert [name for name in "abcd" if history.get(name)] == ["a", "c", "d"]
    assert history.num_bytes == 3 * room


def test_answer_without_room_is_not_kept_and_costs_nobody_theirs():
    history = History(5_000, 60.0, Clock())
    history.put("small", sound(10))
    history.put("large", sound(2_000))
    assert history.get("large") is None
    assert history.get("small")


def test_views_and_clips_are_counted_as_what_they_hold():
    history = History(100_000, 60.0, Clock())
    whole = torch.zeros(20_000, 1)
    history.put("view", (AudioPart(whole[:5]),))
    assert history.get("view")[0].audio.untyped_storage().nbytes() == 20
    history.put("clip", (AudioPart(Clip(torch.zeros(1_000), 16_000)), TextPart("x" * 10)))
    assert history.num_bytes == 5 * OVERHEAD + 20 + 4_000 + 40


def test_ids_are_long_and_of_their_own():
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(name) == 38 for name in ids)
