"""`mllm-audio chat`: a conversation in the terminal, text as it comes, sound to files."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mllm_audio import wav
from mllm_audio.config import nearest
from mllm_audio.data.messages import AudioPart, Message, TextPart
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.interleaved import join
from mllm_audio.generation.text import TextConfig
from mllm_audio.generation.voice import Voice
from mllm_audio.types import AudioChunk, TextDelta

COMMANDS = ("/audio", "/reset", "/quit")
HELP = (
    "type a message; /audio PATH [TEXT] sends a recording, /reset begins anew, Ctrl-C stops a "
    "reply, /quit or Ctrl-D ends"
)
RECORDING = re.compile(r"""/audio\s+(?:"([^"]+)"|'([^']+)'|(\S+))\s*(.*)""", re.DOTALL)
PLAYERS = {  # name of a program, and what makes it play a file and end
    "aplay": ["-q"],
    "paplay": [],
    "afplay": [],
    "ffplay": ["-nodisp", "-autoexit", "-loglevel", "quiet"],
}


def find_player() -> list[str]:
    """Find a program that plays sound files: the words to type before the file's name.

    Raises:
        ValueError: if there is none.
    """
    for name, options in PLAYERS.items():
        if path := shutil.which(name):
            return [path, *options]
    raise ValueError(f"--play found none of {', '.join(PLAYERS)}; install one, or leave --play out")


def run_chat(
    run: Path,
    out: Path,
    *,
    base: str | None = None,
    system: str | None = None,
    guidance_scale: float | None = None,
    play: bool = False,
    seed: int = 0,
    temperature: float | None = None,
    **text: Any,
) -> None:
    """Chat with the voice in a folder; arguments that are None stay at their defaults.

    Args:
        run: a checkpoint or adapter folder.
        out: for the sound files.
        base: where an adapter's base model is now, if it moved.
        system: first message.
        guidance_scale: of the sound.
        play: whether each sound is played.
        seed: of the first reply.
        temperature: of the text; 0 takes the likeliest.
        text: more settings of `TextConfig`.
    """
    player = find_player() if play else None
    settings = {key: value for key, value in text.items() if value is not None}
    if temperature == 0:
        settings["do_sample"] = False
    elif temperature is not None:
        settings["temperature"] = temperature
    text_config = TextConfig(**settings)
    voice = Voice.load(run, base)
    voice.check_has_text()
    config = voice.defaults
    if guidance_scale is not None:
        config = replace(config, guidance_scale=guidance_scale, guidance_weight=None)
    Chat(voice, out, config, text_config, seed, system, player).run()


@dataclass
class Chat:
    """A conversation with a voice on standard input and output."""

    voice: Voice
    out: Path  # folder of the sound files
    config: GenerationConfig
    text: TextConfig
    seed: int = 0  # of the first reply; the next has seed + 1
    system: str | None = None  # first message
    player: list[str] | None = None  # words to type before a file's name to hear it
    history: list[Message] = field(init=False)
    num_turns: int = field(init=False, default=0)
    number: int = field(init=False, default=0)  # of the turn in the names of files
    is_line_open: bool = field(init=False, default=False)  # text stands on it

    def __post_init__(self) -> None:
        """Make the folder, and begin the history."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file, expected a folder; type another")
        self.out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self.out):  # before the conversation, not in it
            self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        # What is no text in the terminal's encoding is replaced, as on standard input.
        system = (self.system or "").encode(errors="replace").decode()
        self.history = [Message("system", (TextPart(system),))] if system else []

    def run(self) -> None:
        """Answer line after line, until the input ends or says so."""
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  lines can be edited and recalled
            print(HELP)
        while True:
            try:
                line = input("> " if is_terminal else "").strip()
                if line == "/quit":
                    return
                self.take(line)
            except EOFError:
                return
            except KeyboardInterrupt:  # not in a reply
                if not is_terminal:
                    raise
                print()
            except BrokenPipeError:  # nobody reads any more
                raise
            except (ValueError, OSError, RuntimeError) as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    def take(self, line: str) -> None:
        """Obey a command or answer a message.

        Raises:
            ValueError: if it cannot be understood, heard or replied to.
        """
        word = line.split(maxsplit=1)[0] if line else ""
        if word == "/reset":
            self.reset()
        elif word == "/audio":
            self.answer(self._recording(line))
        elif word.startswith("/"):
            raise ValueError(f"unknown command {word!r}; {nearest(word, COMMANDS)}")
        elif line:
            self.answer([TextPart(line)])

    def _recording(self, line: str) -> list[TextPart | AudioPart]:
        """Read the sound file of `/audio PATH [TEXT]`."""
        match = RECORDING.fullmatch(line)
        if match is None:
            raise ValueError("found no path, expected  /audio PATH [TEXT]")
        *paths, text = match.groups()
        path = Path(next(path for path in paths if path)).expanduser()
        parts: list[TextPart | AudioPart] = [AudioPart(self.voice.hear(path))]
        return [*parts, TextPart(text)] if text else parts

    def answer(self, parts: list[TextPart | AudioPart]) -> None:
        """Reply to a message, and keep both unless nothing is said."""
        messages = [*self.history, Message("user", tuple(parts))]
        seed = self.seed + self.num_turns
        events = self.voice.generate_interleaved(messages, self.config, self.text, seed=seed)
        self.num_turns += 1
        self.number += 1
        said: list[TextDelta | AudioChunk] = []
        try:
            for event in events:
                said.append(event)
                self._show(event)
        except KeyboardInterrupt:
            self._note("stopped")
        finally:
            self._end_line()
        reply = join(said)
        if any(isinstance(part, AudioPart) or part.text.strip() for part in reply):
            self.history = [*messages, Message("assistant", reply)]
        else:
            self._note("no reply; your message is forgotten")

    def _show(self, event: TextDelta | AudioChunk) -> None:
        """Print text; write sound to a file, and play it."""
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
            self.is_line_open = not event.text.endswith("\n")
            return
        path = self._new_file(event.span)
        wav.write(path, event.waveform, event.sample_rate)
        self._note(f"audio {len(event.waveform) / event.sample_rate:.2f} s: {path}")
        if self.player is not None:
            done = subprocess.run(
                [*self.player, str(path)], stdin=subprocess.DEVNULL, capture_output=True
            )
            if done.returncode:
                self._note(f"{self.player[0]} cannot play it: exit code {done.returncode}")

    def _new_file(self, span: int) -> Path:
        """Name a file that no other chat has written, and make it."""
        while True:
            path = self.out / f"turn-{self.number:03}-span-{span + 1}.wav"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                self.number += 1
            else:
                return path

    def _note(self, text: str) -> None:
        """Print a remark on a line of its own."""
        self._end_line()
        print(f"[{text}]", flush=True)

    def _end_line(self) -> None:
        if self.is_line_open:
            print(flush=True)
        self.is_line_open = False
