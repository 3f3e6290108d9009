"""The chat in the terminal: what is printed, saved and remembered, and what a mistake costs."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import soundfile
import torch
from conftest import sine_manifest
from test_interleaved import CONFIG, build_voice, script, spell, start

from mllm_audio.chat import Chat, find_player
from mllm_audio.cli import main
from mllm_audio.data.messages import AudioPart, TextPart
from mllm_audio.generation.decode import GenerationConfig
from mllm_audio.generation.text import TextConfig


@pytest.fixture
def voice(base):
    """A voice on a tiny random GPT-2."""
    return build_voice(base("gpt2"))


@pytest.fixture
def talk(voice, tmp_path, monkeypatch, capsys):
    """Type lines to a chat; return it, what it printed, and its errors."""

    def run(*lines, out=tmp_path / "out", **options):
        text = options.pop("text", TextConfig())
        chat = Chat(voice, out, CONFIG, text, **options)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.run()
        return chat, *capsys.readouterr()

    return run


def test_text_and_sound_appear_in_order_and_are_remembered(voice, talk, tmp_path):
    script(voice, "sure", start(voice), " beep")
    chat, out, err = talk("say two", system="be kind")
    path = tmp_path / "out/turn-001-span-1.wav"
    assert out == f" sure\n[audio 0.32 s: {path}]\n beep\n"
    assert err == ""
    waveform, sample_rate = soundfile.read(path)
    assert (len(waveform), sample_rate) == (5120, 16000)
    assert [message.role for message in chat.history] == ["system", "user", "assistant"]
    text, audio, more = chat.history[-1].parts
    assert (text, more) == (TextPart(" sure"), TextPart(" beep"))
    assert audio.audio.shape == (8, 128)


def test_the_next_turn_hears_the_conversation_so_far(voice, talk):
    script(voice, "sure", start(voice))
    prompts, step = [], voice.model.step

    def recorded(embeds, *rest):
        prompts.append(embeds.shape[1])
        return step(embeds, *rest)

    voice.model.step = recorded
    chat, out, _ = talk("say two", "again", "/reset", "again")
    first, second, alone = (length for length in prompts if length > 1)
    said = len(spell(voice, "sure")) + 10 + 1  # text, span, end id
    assert second == first + said + alone
    assert out.count("[no reply; your message is forgotten]") == 2
    assert chat.history == []


def test_files_of_an_earlier_chat_are_never_overwritten(voice, talk, tmp_path):
    for _ in range(2):
        script(voice, start(voice), "a", start(voice))
        talk("say two")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    names = [f"turn-00{turn}-span-{span}.wav" for turn in (1, 2) for span in (1, 2)]
    assert sorted(contents) == names
    assert contents[names[0]] == contents[names[2]]  # the same seed
    script(voice, start(voice), voice.text_tokenizer.eos_token_id, start(voice))
    _, out, _ = talk("say two", "again")
    assert re.findall(r"turn-\d+-span-\d", out) == ["turn-003-span-1", "turn-004-span-1"]
    assert all((tmp_path / "out" / n).read_bytes() == old for n, old in contents.items())


def test_turns_have_seeds_of_their_own(voice, talk, tmp_path):
    script(voice, start(voice))
    talk("say two", seed=1)
    script(voice, voice.text_tokenizer.eos_token_id, start(voice))
    talk("say two", "say two", seed=1)  # nothing is said first
    first, second = sorted((tmp_path / "out").iterdir())
    assert first.read_bytes() != second.read_bytes()
    script(voice, start(voice))
    talk("say two", seed=2)
    assert second.read_bytes() == (tmp_path / "out/turn-003-span-1.wav").read_bytes()


def test_an_interrupted_reply_is_remembered_as_far_as_it_was_said(voice, talk):
    wanted = iter([*spell(voice, "a low"), KeyboardInterrupt])
    plain = voice.model.text_logits

    def text_logits(hidden):
        token = next(wanted, voice.text_tokenizer.eos_token_id)
        if token is KeyboardInterrupt:
            raise token
        logits = plain(hidden)
        logits[:, token] += 1000.0
        return logits

    voice.model.text_logits = text_logits
    chat, out, err = talk("say two", "again")
    assert out == " a low\n[stopped]\n[no reply; your message is forgotten]\n"
    assert err == ""
    assert [message.parts for message in chat.history] == [
        (TextPart("say two"),),
        (TextPart(" a low"),),
    ]


def test_a_mistake_is_one_line_and_the_chat_goes_on(voice, talk, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"not a sound")
    sine_manifest(tmp_path, 1, seconds=0.7)
    lines = {
        "/adio x.wav": "unknown command '/adio'; did you mean '/audio'?",
        "/audio": "found no path, expected /audio PATH [TEXT]",
        "/audio gone.wav": "gone.wav is not a file; check the path",
        f"/audio {broken}": "is not readable sound",
        f"/audio {tmp_path / '0.wav'} hear": "0.wav lasts 0.70 s, this model hears at most 0.64 s",
        "say <|audio_start|>": "holds the special token <|audio_start|>",
        "say" + " two" * 200: "max_position_embeddings=128; shorten the text",
    }
    script(voice, "fine")
    chat, out, err = talk(*lines, "", "say two")
    assert out == " fine\n"
    assert [line.startswith("error: ") for line in err.splitlines()] == [True] * len(lines)
    for line, message in zip(err.splitlines(), lines.values(), strict=True):
        assert message in line
    assert len(chat.history) == 2


@pytest.mark.parametrize("quote", ["'", '"', ""])
def test_a_recording_is_sent_with_its_text(voice, talk, tmp_path, quote):
    folder = tmp_path / ("a folder" if quote else "folder")
    sine_manifest(folder, 1, seconds=0.4)
    script(voice, "a low beep")
    chat, out, err = talk(f"/audio {quote}{folder / '0.wav'}{quote} what's this", "/quit", "more")
    assert (out, err) == (" a low beep\n", "")
    audio, text = chat.history[0].parts
    assert torch.equal(audio.audio, voice.hear(folder / "0.wav"))
    assert audio.audio.shape == (12, 128)
    assert text == TextPart("what's this")
    script(voice, "a")
    chat, _, _ = talk(f"/audio {quote}{folder / '0.wav'}{quote}")
    assert [type(part) for part in chat.history[0].parts] == [AudioPart]


def player(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_sounds_are_played_by_the_first_player_found(voice, talk, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ValueError, match="--play found none of aplay, paplay, afplay, ffplay"):
        find_player()
    player(tmp_path / "bin", "ffplay", "exit 1")
    player(tmp_path / "bin", "paplay", f'echo "$@" >> {tmp_path / "played"}')
    script(voice, start(voice), "a", start(voice))
    _, out, _ = talk("say two", player=find_player())
    played = (tmp_path / "played").read_text().splitlines()
    assert played == [str(tmp_path / f"out/turn-001-span-{n}.wav") for n in (1, 2)]
    player(tmp_path / "bin", "aplay", "exit 3")
    script(voice, start(voice), " beep")
    chat, out, _ = talk("say two", player=find_player())
    assert "aplay cannot play it: exit code 3]\n beep\n" in out
    assert len(chat.history) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved voice that opens a span wherever it may: Phi's text head has a bias."""
    from conftest import write_base

    voice = build_voice(write_base(tmp_path_factory.mktemp("phi"), "phi"))
    with torch.no_grad():
        voice.model.backbone.lm_head.bias[start(voice)] = 1000.0
    path = tmp_path_factory.mktemp("voice")
    replace(voice, defaults=GenerationConfig(num_inference_steps=20, seconds=0.64)).save(path)
    return path


def command(folder, *arguments):
    return [sys.executable, "-m", "mllm_audio", "chat", str(folder), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}


def test_the_command_reads_a_pipe(folder, tmp_path):
    options = ["--temperature", 0, "--max-new-tokens", 2, "--guidance-scale", 1, "--seed", 3]
    done = subprocess.run(
        command(folder, "--out", tmp_path / "out", "--system", "be kind", *options),
        input=b"say two\n\xff\xfe\n/audio gone.wav\nagain",
        capture_output=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0] == f"[audio 0.64 s: {tmp_path / 'out/turn-001-span-1.wav'}]"
    audio = [line for line in lines if line.startswith("[audio 0.64 s: ")]
    assert len(audio) == len(list((tmp_path / "out").iterdir()))
    assert {re.findall(r"turn-\d+", line)[-1] for line in audio} == {
        f"turn-{turn:03}" for turn in (1, 2, 3)
    }
    assert done.stderr.decode() == "error: gone.wav is not a file; check the path\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", __file__], "is a file, expected a folder"),
        (["--top-p", "2"], "text.top_p=2.0, expected (0, 1]"),
        (["--temperature", "-1"], "text.temperature=-1.0, expected (0, 100]"),
        (["--play"], "--play found none of aplay"),
    ],
)
def test_the_commands_mistakes_are_one_line(
    folder, arguments, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command(folder, *arguments)[2:])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_in_a_terminal_ctrl_c_stops_a_reply_and_ctrl_d_ends_the_chat(folder, tmp_path):
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        command(folder, "--out", tmp_path / "out"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=ENVIRONMENT,
        cwd=tmp_path,
        # A test run in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    printed = b""

    def wait_for(text, seconds=120.0):
        nonlocal printed
        deadline = time.monotonic() + seconds
        while text not in printed:
            if not select.select([keyboard], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(printed)
            printed += os.read(keyboard, 4096)
        printed = printed.split(text, 1)[1]

    def interrupt_prompt():
        """Until there is a new one: a signal just before the prompt waits is seen at the next."""
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                return wait_for(b"> ", 1)
        raise AssertionError(printed)

    try:
        wait_for(b"> ")
        interrupt_prompt()
        os.write(keyboard, b"say two\n")
        wait_for(b"turn-001-span-1.wav]")
        process.send_signal(signal.SIGINT)
        wait_for(b"[stopped]")
        wait_for(b"> ")
        os.write(keyboard, b"/foo\n")
        wait_for(b"error: unknown command '/foo'")
        wait_for(b"> ")
        os.write(keyboard, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(keyboard)
        os.close(terminal)
    assert b"Traceback" not in printed
