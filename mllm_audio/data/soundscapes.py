"""The built-in dataset: short procedural sounds with captions, made to be learnt on a CPU.

A soundscape is one group of equal events, or two groups in sequence ("two low beeps then a rising
sweep"). Every event starts near the beginning of a 160 ms column, the duration of one tokenizer
column, and fills one or two of them, so counting events and ordering groups are countings of
columns. A clip ends with its last event's column.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mllm_audio import wav
from mllm_audio.data.events import KINDS, PITCHES, SAMPLE_RATE

SAMPLES_PER_COLUMN = 2_560  # 160 ms
MAX_COUNT = 3  # events of one group
ONSET_SECONDS = 0.024  # from the start of the column to the start of the event
NUMBER_WORDS = {1: ("a", "one"), 2: ("two", "two"), 3: ("three", "three")}
PITCH_WORDS = {"low": ("low", "deep"), "mid": ("mid", "medium"), "high": ("high", "high")}
SOLO_WORDINGS = ("{first}", "just {first}")
PAIR_WORDINGS = (
    "{first} then {second}",
    "{first} followed by {second}",
    "{second} after {first}",
    "first {first} and then {second}",
    "{first} after which {second}",
    "{second} preceded by {first}",
)


@dataclass(frozen=True)
class Group:
    """`count` equal events in a row."""

    kind: str  # a key of `KINDS`
    pitch: str | None  # a key of `PITCHES`, None for kinds without pitch
    count: int  # 1 to `MAX_COUNT`

    def __post_init__(self) -> None:
        pitches = PITCHES if self.kind in KINDS and KINDS[self.kind].pitched else (None,)
        if self.kind not in KINDS or self.pitch not in pitches or self.count not in NUMBER_WORDS:
            raise ValueError(
                f"there is no group {self.kind!r}, {self.pitch!r}, {self.count!r}; kinds are "
                f"{', '.join(KINDS)}, the pitch of this kind is one of {list(pitches)}, "
                f"and the count is 1 to {MAX_COUNT}"
            )

    @property
    def label(self) -> str:
        """Machine-readable form, `kind:pitch:count`, the pitch empty where there is none."""
        return f"{self.kind}:{self.pitch or ''}:{self.count}"

    def phrase(self, wording: int) -> str:
        """Name the group in words: wording 0 is the plain one, 1 uses synonyms."""
        name = KINDS[self.kind].names[wording][self.count > 1]
        pitch = [PITCH_WORDS[self.pitch][wording]] if self.pitch else []
        return " ".join([NUMBER_WORDS[self.count][wording], *pitch, name])


@dataclass(frozen=True)
class Soundscape:
    """One or two groups, in the order they sound."""

    groups: tuple[Group, ...]

    @property
    def label(self) -> str:
        """Machine-readable events in order, such as `beep:low:2 sweep_up::1`."""
        return " ".join(group.label for group in self.groups)

    @property
    def num_columns(self) -> int:
        """160 ms columns of the clip."""
        return sum(group.count * KINDS[group.kind].columns for group in self.groups)

    def captions(self) -> tuple[str, ...]:
        """Describe the soundscape in every wording, lower case and without punctuation."""
        templates = SOLO_WORDINGS if len(self.groups) == 1 else PAIR_WORDINGS
        captions = []
        for template, wordings in itertools.product(
            templates, itertools.product((0, 1), repeat=len(self.groups))
        ):
            phrases = [g.phrase(w) for g, w in zip(self.groups, wordings, strict=True)]
            captions.append(template.format(first=phrases[0], second=phrases[-1]))
        return tuple(dict.fromkeys(captions))  # words without a synonym give duplicates


def render(soundscape: Soundscape, seed: int) -> Tensor:
    """Synthesise one performance of `soundscape`.

    Level (+-2 dB), frequency (+-4 %) and onset (+-6 ms) vary from event to event.

    Returns:
        (S,) float32 at 16 kHz, a whole number of columns, peak at most 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    waveform = torch.zeros(soundscape.num_columns * SAMPLES_PER_COLUMN)
    column = 0
    for group in soundscape.groups:
        kind = KINDS[group.kind]
        for _ in range(group.count):
            gain, detune, delay = (torch.rand(3, generator=generator) * 2 - 1).tolist()
            event = kind.synthesize(_frequency(group.pitch) * (1 + 0.04 * detune), generator)
            event = event * 10 ** ((gain * 2 - 2) / 20) / event.abs().max()
            onset = round((ONSET_SECONDS + 0.006 * delay) * SAMPLE_RATE)
            start = column * SAMPLES_PER_COLUMN + onset
            waveform[start : start + len(event)] += 0.5 * event
            column += kind.columns
    return waveform


def all_soundscapes() -> tuple[Soundscape, ...]:
    """Every soundscape: all single groups, then all ordered pairs that differ in kind or pitch."""
    groups = _all_groups()
    solos = [Soundscape((group,)) for group in groups]
    pairs = [Soundscape(pair) for pair in itertools.product(groups, groups) if _distinct(*pair)]
    return (*solos, *pairs)


def split(
    held_out_share: float, seed: int
) -> tuple[tuple[Soundscape, ...], tuple[Soundscape, ...]]:
    """Separate training soundscapes from held-out combinations.

    A combination is two groups in either order: a held-out pair is never heard together in
    training. Single groups are all in training, and every group keeps a training partner.

    Raises:
        ValueError: if `held_out_share`, the share of the combinations, is outside (0, 0.5].
    """
    if not 0 < held_out_share <= 0.5:
        raise ValueError(
            f"held_out_share is {held_out_share} but must lie in (0, 0.5]: the model has to hear "
            "most combinations; 0.1 is a good choice"
        )
    pairs = [frozenset(p) for p in itertools.combinations(_all_groups(), 2) if _distinct(*p)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    num_partners = dict.fromkeys(_all_groups(), 0)
    for group in itertools.chain.from_iterable(pairs):
        num_partners[group] += 1
    held_out: set[frozenset[Group]] = set()
    for pair in (pairs[i] for i in order):
        enough = len(held_out) >= held_out_share * len(pairs)
        if not enough and all(num_partners[group] > 1 for group in pair):
            held_out.add(pair)
            for group in pair:
                num_partners[group] -= 1
    everything = all_soundscapes()
    return (
        tuple(s for s in everything if frozenset(s.groups) not in held_out),
        tuple(s for s in everything if frozenset(s.groups) in held_out),
    )


def write_soundscapes(
    folder: Path,
    num_train: int,
    num_held_out: int,
    *,
    seed: int = 0,
    held_out_share: float = 0.1,
    solo_share: float = 0.25,
) -> Path:
    """Write WAV files and the manifest that `mllm-audio prepare` reads.

    Args:
        folder: receives `wav/*.wav` and `manifest.jsonl`.
        num_train: clips of training soundscapes, drawn at random.
        num_held_out: clips of held-out combinations, in turn in shuffled order; split `test`.
        seed: same seed, same files.
        held_out_share: see `split`.
        solo_share: share of training clips with a single group.

    Returns:
        The path of the manifest.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = split(held_out_share, seed)
    solos = [s for s in train if len(s.groups) == 1]
    pairs = [s for s in train if len(s.groups) == 2]
    chosen = [("train", _draw(solos, pairs, solo_share, generator)) for _ in range(num_train)]
    order = torch.randperm(len(held_out), generator=generator).tolist()
    chosen += [("test", held_out[order[i % len(order)]]) for i in range(num_held_out)]

    (folder / "wav").mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    with manifest.open("w", encoding="utf-8") as file:
        bar = tqdm(chosen, desc="rendering", unit="clip", dynamic_ncols=True)
        for i, (name, soundscape) in enumerate(bar):
            audio = f"wav/{name}_{i:06d}.wav"
            # One seed per clip, apart for neighbouring dataset seeds.
            wav.write(folder / audio, render(soundscape, seed * 1_000_003 + i), SAMPLE_RATE)
            captions = soundscape.captions()
            row = {"audio": audio, "caption": captions[i % len(captions)], "captions": captions}
            file.write(json.dumps({**row, "split": name, "label": soundscape.label}) + "\n")
    return manifest


def _draw(
    solos: list[Soundscape],
    pairs: list[Soundscape],
    solo_share: float,
    generator: torch.Generator,
) -> Soundscape:
    pool = solos if torch.rand((), generator=generator) < solo_share else pairs
    return pool[int(torch.randint(len(pool), (), generator=generator))]


def _all_groups() -> list[Group]:
    return [
        Group(name, pitch, count)
        for name, kind in KINDS.items()
        for pitch in (PITCHES if kind.pitched else (None,))
        for count in range(1, MAX_COUNT + 1)
    ]


def _distinct(first: Group, second: Group) -> bool:
    """Tell whether two neighbouring groups can be told apart from one longer group."""
    return (first.kind, first.pitch) != (second.kind, second.pitch)


def _frequency(pitch: str | None) -> float:
    return PITCHES[pitch] if pitch else PITCHES["mid"]
