"""The test as a rater meets it: the next clip, its sound, an answer. Nothing here names a system.

What a rater gets is a caption, an opaque id and a sound. All sounds are played in one format, since
container, sample rate, channels and metadata would tell systems apart.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mllm_audio import wav
from mllm_audio.listening.plan import ListeningTest, clips_of, rater_name
from mllm_audio.listening.store import QUESTIONS, SCORES, RatingStore

PLAYED_RATE = 48_000  # Hz, of all clips: at least that of the systems, so that nothing is lost


class Panel:
    """Raters' questions and answers on one test; threads may share it."""

    def __init__(
        self, test: ListeningTest, store: RatingStore, raters: Collection[str] = ()
    ) -> None:
        """Register `test` in `store`; `raters`, if any, are the only names let in.

        Raises:
            ValueError: if `store` holds another test, or a name is none.
        """
        self._test, self._store = test, store
        self._raters = {rater_name(rater) for rater in raters}
        self._clips = store.register(test)
        self._ids = {stimulus: clip for clip, stimulus in self._clips.items()}

    def next_clip(self, typed_name: str) -> dict[str, Any]:
        """Give the first clip that a rater has not answered in full, and how many are done.

        Raises:
            ValueError: if the name is none, or not of this test.
        """
        clips, rater = self._clips_of(typed_name)
        answers = self._store.answers(rater)
        left = [clip for clip in clips if any((clip, q) not in answers for q in QUESTIONS)]
        progress = {"rater": rater, "total": len(clips), "done": len(clips) - len(left)}
        if not left:
            return {**progress, "clip": None}
        clip = left[0]
        given = {q: answers[clip, q] for q in QUESTIONS if (clip, q) in answers}
        caption = self._clips[clip].caption
        return {**progress, "clip": {"id": clip, "caption": caption, "answers": given}}

    def rate(self, typed_name: str, clip: str, question: str, score: int, plays: int) -> None:
        """Store an answer; the same one again changes nothing.

        Raises:
            ValueError: if the clip is not the rater's, was not heard, or the answer is none.
        """
        clips, rater = self._clips_of(typed_name)
        if clip not in clips:
            raise ValueError("this clip is not among yours; load the page again")
        if question not in QUESTIONS or score not in SCORES:
            raise ValueError(f"found {question}={score}, expected {QUESTIONS} in {SCORES}")
        if not 1 <= plays <= 1000:
            raise ValueError("listen to the clip to its end first")
        self._store.rate(rater, clip, question, score, plays)

    def sound(self, clip: str) -> bytes | None:
        """Give a clip as mono 16 bit WAV at `PLAYED_RATE`, or None if there is no such id.

        Raises:
            ValueError: if its file is gone or broken by now.
        """
        stimulus = self._clips.get(clip)
        if stimulus is None:
            return None
        return encode_wav(self._test.folders[stimulus.system] / stimulus.audio)

    def _clips_of(self, typed_name: str) -> tuple[list[str], str]:
        """List the ids of a rater's clips, and the name in its one form."""
        rater = rater_name(typed_name)
        if self._raters and rater not in self._raters:
            raise ValueError(f"{rater!r} is not a rater of this test; ask who runs it")
        stimuli = clips_of(rater, self._test.stimuli, self._test.seed, self._test.clips_per_rater)
        return [self._ids[stimulus] for stimulus in stimuli], rater


def encode_wav(path: Path) -> bytes:
    """Read a sound file as the bytes of a mono 16 bit WAV file at `PLAYED_RATE`.

    As `wav.write` does, a peak above 1 scales the whole down to 1.
    """
    waveform = wav.read(path, PLAYED_RATE).waveform  # (S,)
    waveform = waveform / waveform.abs().max().clamp_min(1.0)
    samples = (waveform * 32767).round().short().numpy().astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(PLAYED_RATE)
        writer.writeframes(samples.tobytes())
    return file.getvalue()
