"""Where latents stand and what follows them, without an engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.interleaved import span_seed
from mllm_audio.modality import AudioConfig
from mllm_audio.text import SpecialIds
from mllm_audio_vllm.options import AudioOptions
from mllm_audio_vllm.state import RequestState

SPECIAL = SpecialIds(audio_start=1, audio=2, audio_end=3, cond=4)
AUDIO = AudioConfig(max_tokens=16)
CONFIG = GenerationConfig(seconds=0.32)  # 8 latents


def state(ids, limit=100, latents=0, **options):
    given = torch.arange(latents * 128).float().numpy().tobytes()
    made = AudioOptions(**{"generation": CONFIG, "seed": 5, "latents": given, **options})
    return RequestState(made, ids, SPECIAL, AUDIO, limit, torch.device("cpu"))


def test_spans_of_the_prompt_are_found():
    found = state([9, 1, 2, 2, 2, 2, 3, 9, 1, 2, 2, 2, 2], latents=8, learned=(False, True))
    said, goes_on = found.spans
    assert (said.start, said.given, said.learned, len(said.latents)) == (1, True, False, 4)
    assert (goes_on.start, goes_on.given, goes_on.learned) == (8, False, True)
    assert goes_on.seed == span_seed(5, 0)  # the reply's span 0
    assert float(goes_on.latents[0][0]) == 4 * 128
    assert found.after(6) is None and found.after(12).index == 4
    assert [place for place, _, _ in found.held(0, 5)] == [1, 2, 3, 4]
    assert found.predicts(goes_on, 3) and not found.predicts(said, 0)


def test_latents_and_places_must_agree():
    with pytest.raises(ValueError, match=r"more <\|audio\|> ids than latents"):
        state([1, 2, 2, 2, 2], latents=3)
    with pytest.raises(ValueError, match=r"fewer <\|audio\|> ids than latents"):
        state([1, 2, 2], latents=3)
    with pytest.raises(ValueError, match="found 100 bytes of rows, expected 512"):
        options = AudioOptions(generation=CONFIG, latents=b"1" * 100)
        RequestState(options, [1], SPECIAL, AUDIO, 100, torch.device("cpu"))


def test_what_a_preemption_drops_is_forgotten():
    """Latents of a span that stays are kept: they are what would be drawn again."""
    found = state([9, 9])
    first = found.open(2)
    first.latents = [torch.zeros(128)] * 8
    found.open(12)
    assert found.opened == 2 and found.spans[1].seed == span_seed(5, 1)
    found.truncate(6)
    assert found.spans == [first] and found.opened == 1
    query = found.after(5)
    assert (query.index, query.is_stored) == (3, True)
    found.truncate(2)
    assert found.spans == [] and found.opened == 0


def test_spans_open_where_there_is_room_and_as_often_as_allowed():
    found = state([9], limit=24, max_audio_spans=1)
    assert found.may_open(1)
    found.open(1)
    assert not found.may_open(12)
    assert not state([9], limit=10).may_open(1)  # 8 latents and two markers need 10 behind it
    assert state([9], limit=11).may_open(1)


def test_options_survive_their_way_and_unknown_ones_are_refused():
    options = AudioOptions(
        key="k",
        generation=replace(CONFIG, temperature=0.5),
        seed=3,
        learned=(True,),
        latents=b"1234",
    )
    assert AudioOptions.from_extra_args(options.to_extra_args()) == options
    assert AudioOptions.from_extra_args(None) is None
    with pytest.raises(ValueError, match="unknown options sink"):
        AudioOptions.from_extra_args({"mllm_audio": {"sink": "tcp://elsewhere"}})
    with pytest.raises(ValueError, match="temprature"):
        AudioOptions.from_extra_args({"mllm_audio": {"generation": {"temprature": 1}}})
