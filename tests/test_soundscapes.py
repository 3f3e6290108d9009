"""The built-in soundscapes, and the recogniser that judges them."""

import ast
import json
import math
import random
from pathlib import Path

import pytest
import torch

from mllm_audio import wav
from mllm_audio.data.events import KINDS
from mllm_audio.data.soundscapes import (
    SAMPLE_RATE,
    SAMPLES_PER_COLUMN,
    Group,
    Soundscape,
    all_soundscapes,
    render,
    split,
    write_soundscapes,
)
from mllm_audio.evaluation import adherence as judge
from mllm_audio.tokenizers.dct import DCTTokenizer
from mllm_audio.types import Clip


def draw(num: int, seed: int) -> list[tuple[Soundscape, torch.Tensor]]:
    rng = random.Random(seed)
    chosen = rng.choices(all_soundscapes(), k=num)
    return [(soundscape, render(soundscape, rng.randrange(10**9))) for soundscape in chosen]


def heard_share(waveforms, soundscapes) -> float:
    pairs = [(Clip(w, SAMPLE_RATE), s.label) for w, s in zip(waveforms, soundscapes, strict=True)]
    return judge.adherence(pairs).all


def round_trip(drawn, noise: float) -> float:
    """Share heard right after the DCT tokenizer, with noise on the normalised latents."""
    tokenizer = DCTTokenizer()
    latents = [tokenizer.encode((w / w.abs().max() * 0.5)[None])[0] for _, w in drawn]
    std = torch.cat(latents).std(0)
    generator = torch.Generator().manual_seed(0)
    decoded = [
        tokenizer.decode((x + noise * std * torch.randn(x.shape, generator=generator))[None])[0]
        for x in latents
    ]
    return heard_share(decoded, [s for s, _ in drawn])


def wrong_labels(soundscape: Soundscape) -> list[str]:
    """Labels one edit away: order swapped, one count, pitch or kind changed, a group gone."""
    groups = [(g.kind, g.pitch, g.count) for g in soundscape.groups]
    edits = [groups[::-1], groups[:-1]]
    for i, (kind, pitch, count) in enumerate(groups):
        changed = [(kind, pitch, c) for c in (count - 1, count + 1)]
        changed += [(kind, p, count) for p in ("low", "mid", "high") if pitch and p != pitch]
        changed += [
            (k, pitch if KINDS[k].pitched else None, count)
            for k in KINDS
            if k != kind and not (KINDS[k].pitched and pitch is None)
        ]
        edits += [[*groups[:i], change, *groups[i + 1 :]] for change in changed]
    labels = {" ".join(f"{k}:{p or ''}:{c}" for k, p, c in edit) for edit in edits}
    return sorted(labels - {soundscape.label})


def test_every_soundscape_is_heard_right():
    soundscapes = all_soundscapes()
    waveforms = [render(s, seed) for seed, s in enumerate(soundscapes)]
    assert heard_share(waveforms, soundscapes) >= 0.995


def test_tokenizer_round_trip_is_heard_right():
    assert round_trip(draw(24, 1), noise=0.0) >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.97), (0.15, 0.93)])
def test_500_round_trips_are_heard_right(noise, share):
    assert round_trip(draw(500, 2), noise) >= share


def test_levels_noise_and_smear_do_not_change_what_is_heard():
    drawn = draw(60, 3)
    generator = torch.Generator().manual_seed(0)
    waveforms = []
    for soundscape, waveform in drawn:
        lengths = [
            KINDS[g.kind].columns * SAMPLES_PER_COLUMN
            for g in soundscape.groups
            for _ in range(g.count)
        ]
        gains = 10 ** ((torch.rand(len(lengths), generator=generator) * 12 - 6) / 20)
        levelled = waveform * gains.repeat_interleave(torch.tensor(lengths))
        tail = torch.randn(800, generator=generator) * torch.exp(-torch.arange(800) / 320)
        smear = torch.nn.functional.conv1d(
            torch.nn.functional.pad(levelled, (799, 0))[None, None], tail.flip(0)[None, None]
        )[0, 0]
        hiss = torch.randn(len(waveform), generator=generator)
        waveforms.append(levelled + 0.1 * smear / tail.norm() + 0.004 * hiss)
    assert heard_share(waveforms, [s for s, _ in drawn]) >= 0.97


def test_wrong_labels_are_refused():
    verdicts = [
        judge.adheres(waveform, SAMPLE_RATE, label)
        for soundscape, waveform in draw(40, 4)
        for label in random.Random(0).sample(wrong_labels(soundscape), 4)
    ]
    assert sum(verdicts) / len(verdicts) < 0.01


@pytest.mark.parametrize("frequency", [180.0, 550.0, 1650.0, 4500.0])
def test_tone_between_pitch_classes_is_unknown(frequency):
    times = torch.arange(1440) / SAMPLE_RATE
    tone = 0.4 * torch.sin(2 * math.pi * frequency * times) * torch.hann_window(1440).sqrt()
    waveform = torch.nn.functional.pad(tone, (400, 720))
    assert [g.kind for g in judge.recognise(waveform, SAMPLE_RATE)] != ["beep"]


def test_silence_and_steady_sounds_hold_no_known_event():
    generator = torch.Generator().manual_seed(0)
    steady = torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / SAMPLE_RATE)
    noise = torch.randn(16_000, generator=generator)
    assert judge.recognise(torch.zeros(16_000), SAMPLE_RATE) == ()
    for waveform in (0.3 * steady, 0.1 * noise):
        assert {g.kind for g in judge.recognise(waveform, SAMPLE_RATE)} == {"unknown"}


def test_report_blames_the_attribute_that_is_wrong():
    waveform = render(Soundscape((Group("beep", "low", 2), Group("click", None, 1))), 0)
    clip = Clip(waveform, SAMPLE_RATE)

    def report(label: str) -> tuple[float, ...]:
        r = judge.adherence([(clip, label)])
        return (r.all, r.kind, r.pitch, r.count, r.order)

    assert report("beep:low:2 click::1") == (1, 1, 1, 1, 1)
    assert report("click::1 beep:low:2") == (0, 1, 1, 1, 0)
    assert report("beep:low:3 click::1") == (0, 1, 1, 0, 1)
    assert report("beep:mid:2 click::1") == (0, 1, 0, 1, 0)
    assert report("beep:low:2 knock::1") == (0, 0, 1, 1, 0)


def test_render_is_a_function_of_its_seed():
    soundscape = Soundscape((Group("noise", None, 2), Group("sweep_up", None, 1)))
    assert torch.equal(render(soundscape, 5), render(soundscape, 5))
    assert not torch.equal(render(soundscape, 5), render(soundscape, 6))
    assert render(soundscape, 5).shape == (4 * SAMPLES_PER_COLUMN,)


def test_captions_are_distinct_short_and_from_a_small_vocabulary():
    described: dict[str, Soundscape] = {}
    for soundscape in all_soundscapes():
        for caption in soundscape.captions():
            assert described.setdefault(caption, soundscape) == soundscape, caption
    assert max(len(caption.split()) for caption in described) <= 12
    assert len({word for caption in described for word in caption.split()}) < 80
    assert described["two low beeps after a rising sweep"].label == "sweep_up::1 beep:low:2"


def test_held_out_combinations_are_never_heard_in_training():
    train, held_out = split(0.1, seed=0)
    pairs = {frozenset(s.groups) for s in train if len(s.groups) == 2}
    held_out_pairs = {frozenset(s.groups) for s in held_out}
    groups = {g for s in all_soundscapes() for g in s.groups}
    assert len(train) + len(held_out) == len(all_soundscapes())
    assert not pairs & held_out_pairs
    assert {g for pair in pairs for g in pair} == groups
    assert len(held_out_pairs) / len(pairs | held_out_pairs) == pytest.approx(0.1, abs=0.002)


def test_written_soundscapes_sound_like_their_labels(tmp_path):
    manifest = write_soundscapes(tmp_path / "a", num_train=12, num_held_out=4, seed=3)
    again = write_soundscapes(tmp_path / "b", num_train=12, num_held_out=4, seed=3)
    assert manifest.read_text() == again.read_text()
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 12 + ["test"] * 4
    clips = [wav.read(manifest.parent / row["audio"], SAMPLE_RATE) for row in rows]
    pairs = [(clip, row["label"]) for clip, row in zip(clips, rows, strict=True)]
    assert judge.adherence(pairs).all == 1
    assert all(row["caption"] in row["captions"] for row in rows)


def test_recogniser_shares_no_code_with_the_synthesis():
    tree = ast.parse(Path(judge.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    ours = {name for name in imported if name and name.startswith("mllm_audio")}
    assert ours == {"mllm_audio.types"}


def test_messages_name_the_offending_value():
    with pytest.raises(ValueError, match="no group 'click', 'low', 1"):
        Group("click", "low", 1)
    with pytest.raises(ValueError, match=r"held_out_share is 0\.9"):
        split(0.9, seed=0)
    with pytest.raises(ValueError, match="'beep:two'"):
        judge.parse_label("click::1 beep:two")
    with pytest.raises(ValueError, match="44100 Hz"):
        judge.recognise(torch.zeros(100), 44_100)
    with pytest.raises(ValueError, match="no clips"):
        judge.adherence([])
