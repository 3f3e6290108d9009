"""Plan a listening test: systems paired by caption, and what each rater hears in which order."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_audio import wav
from mllm_audio.files import file_sha256
from mllm_audio.listening.speech import mentions_speech, read_speech_file


@dataclass(frozen=True, kw_only=True)
class Stimulus:
    """A sound of one system, as it is rated."""

    system: str
    caption: str
    take: int  # 0, 1, ...: which of several sounds of the system with this caption
    audio: str  # path as the system's captions.jsonl writes it
    sha256: str  # of the sound file
    speech: bool  # whether its caption counts as mentioning speech

    @property
    def prompt(self) -> tuple[str, int]:
        """What pairs it with the sounds of other systems."""
        return self.caption, self.take

    @property
    def key(self) -> tuple[str, str, int]:
        """What names it within a test."""
        return self.system, self.caption, self.take


@dataclass(frozen=True, kw_only=True)
class ListeningTest:
    """Everything that the raters' clips and their order follow from."""

    stimuli: tuple[Stimulus, ...]  # every system's, those of one system together
    folders: dict[str, Path]  # of each system, which `Stimulus.audio` is relative to
    seed: int = 0  # of the random orders
    clips_per_rater: int | None = None  # at most; None is all

    def __str__(self) -> str:
        prompts = {stimulus.prompt: stimulus.speech for stimulus in self.stimuli}
        return (
            f"{len(self.folders)} systems ({', '.join(self.folders)}), {len(prompts)} prompts "
            f"({sum(prompts.values())} with speech), {len(self.stimuli)} clips"
        )


def parse_systems(arguments: Sequence[str]) -> dict[str, Path]:
    """Read `DIR` or `NAME=DIR` of each system; a folder's own name is its default name.

    Raises:
        ValueError: if a name is empty or comes twice, or a folder is missing.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or Path(argument).is_dir():
            name, folder = Path(argument).resolve().name, argument
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder or argument} is not a folder; type the folders that "
                "`mllm-audio generate` wrote, or NAME=DIR"
            )
        if not name.strip():
            raise ValueError(f"{argument} has no name before =; type NAME=DIR")
        if name in folders:
            raise ValueError(f"two systems are called {name!r}; name them with NAME=DIR")
        folders[name] = Path(folder)
    return folders


def read_stimuli(
    system: str, folder: Path, rows: Iterable[tuple[str, str]]
) -> tuple[Stimulus, ...]:
    """Make the stimuli of one system, reading every sound once.

    Args:
        system: its name.
        folder: that its files are relative to.
        rows: (audio, caption) of each; equal captions are takes, in this order.

    Raises:
        ValueError: naming the file, if one is missing, broken or empty.
    """
    takes: Counter[str] = Counter()
    stimuli = []
    for audio, caption in rows:
        path = folder / audio
        wav.read(path, wav.info(path).sample_rate)  # a broken file is found before raters come
        stimuli.append(
            Stimulus(
                system=system,
                caption=caption,
                take=takes[caption],
                audio=audio,
                sha256=file_sha256(path),
                speech=mentions_speech(caption),
            )
        )
        takes[caption] += 1
    return tuple(stimuli)


def pair(systems: Sequence[Sequence[Stimulus]], allow_missing: bool) -> tuple[Stimulus, ...]:
    """Keep the prompts that all systems have.

    Raises:
        ValueError: if a system lacks a prompt and `allow_missing` is off, listing what is missing;
            or if no prompt is common to all.
    """
    prompts = [{stimulus.prompt for stimulus in stimuli} for stimuli in systems]
    common, every = set.intersection(*prompts), set.union(*prompts)
    if not common:
        raise ValueError(
            "no caption is common to all systems; generate them from the same captions"
        )
    if every != common and not allow_missing:
        missing = [
            f"{stimuli[0].system} lacks {caption!r}" + (f" (sound {take + 1})" if take else "")
            for stimuli, have in zip(systems, prompts, strict=True)
            for caption, take in sorted(every - have)
        ]
        more = f", and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{len(every - common)} of {len(every)} prompts are not in all systems: "
            f"{', '.join(missing[:5])}{more}; generate them, or type --allow-missing to leave "
            "these prompts out"
        )
    return tuple(s for stimuli in systems for s in stimuli if s.prompt in common)


def split_by_file(stimuli: Sequence[Stimulus], path: Path) -> tuple[Stimulus, ...]:
    """Mark as speech the prompts in a list instead of those that the words choose.

    Args:
        stimuli: of a test; the first one's system names the files in the list.
        path: of the list, see `read_speech_file`.
    """
    prompts = {s.audio: s.prompt for s in stimuli if s.system == stimuli[0].system}
    listed = read_speech_file(path, {*prompts, *(s.caption for s in stimuli)})
    by_name = {prompts[name] for name in listed if name in prompts}
    return tuple(replace(s, speech=s.caption in listed or s.prompt in by_name) for s in stimuli)


def clips_of(
    rater: str, stimuli: Sequence[Stimulus], seed: int, clips_per_rater: int | None = None
) -> list[Stimulus]:
    """List what a rater hears, in order: a pure function of the arguments.

    Prompts are drawn first, each with all its systems, so that a rater compares systems on the same
    prompts; then their clips are shuffled.
    """

    def draw(*values: object) -> bytes:
        return hashlib.sha256(repr((seed, rater, *values)).encode()).digest()

    by_prompt = sorted(stimuli, key=lambda s: (draw(s.prompt), draw(s.prompt, s.system)))
    chosen = by_prompt[:clips_per_rater]
    return sorted(chosen, key=lambda s: draw("order", s.prompt, s.system))


def rater_name(typed: str) -> str:
    """Bring a rater's name to one form: "Ann " and "ann" are one person.

    Raises:
        ValueError: if it is empty, longer than 40 characters, or has other characters than
            letters, digits, space, dot, hyphen and underscore.
    """
    name = " ".join(unicodedata.normalize("NFKC", typed).casefold().split())
    if not re.fullmatch(r"[\w .-]{1,40}", name):
        raise ValueError(
            f"found {typed[:50]!r} as a rater's name, expected 1 to 40 letters, digits, spaces, "
            "dots or hyphens"
        )
    return name
