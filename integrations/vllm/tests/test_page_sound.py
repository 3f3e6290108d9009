"""The page in headless Chromium: sound that is played, drawn, saved, attached and recorded."""

import base64
import re
import struct
import threading
import wave
from array import array
from io import BytesIO
from itertools import pairwise

import pytest
from browser import at, download, launched_browser, send, until, wait_for
from page_server import FIRST, RATE, SECOND, Samples, Script, Wait, serving, tone

# Gives the row and column of the spectrogram of view k with the most light, as shares of its size.
BRIGHTEST = """
(k) => {
  const canvas = document.querySelectorAll(".answer .spectrogram")[k];
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  const light = (x, y) => [0, 1, 2].reduce((sum, c) => sum + data[4 * (y * width + x) + c], 0);
  const rows = Array.from({ length: height }, (_, y) =>
    Array.from({ length: width }, (_, x) => light(x, y)).reduce((a, b) => a + b, 0) / width);
  const columns = Array.from({ length: width }, (_, x) =>
    Array.from({ length: height }, (_, y) => light(x, y)).reduce((a, b) => a + b, 0) / height);
  const top = rows.indexOf(Math.max(...rows));
  return { height: 1 - (top + 0.5) / height, rows, columns };
}
"""


@pytest.fixture(scope="module")
def chromium():
    with launched_browser() as browser:
        yield browser


def samples_of(pcm):
    return list(array("h", pcm))


def test_sound_plays_without_a_gap_and_as_it_was_sent(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        send(page, "two tones")
        wait_for(page, "done")
        until(
            page,
            f"played.flatMap((p) => p.samples).length === {len(FIRST) // 2 + len(SECOND) // 2}",
        )
        played = page.evaluate("played")
        assert len(played) > 4  # piece by piece, not when all is there
        assert {piece["rate"] for piece in played} == {RATE}
        for piece, following in pairwise(played):
            end = piece["at"] + len(piece["samples"]) / RATE
            assert following["at"] == pytest.approx(end, abs=1e-9)
        assert [v for piece in played for v in piece["samples"]] == samples_of(FIRST + SECOND)
        assert "gaps\nnone" in page.inner_text("article dl")


def test_gaps_are_counted_and_told(chromium):
    held = threading.Event()
    reply = (Samples(FIRST[:16000]), Wait(held), Samples(SECOND))
    # A caption, because the server opens a span of sound per step of a conversation.
    with serving(Script(sound=reply)) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        page.check("#mode-caption", force=True)
        send(page, "a tone with a hole")
        until(page, "played.length > 0")
        page.wait_for_selector(".time:has-text('waiting')")
        held.set()
        wait_for(page, "done")
        told = re.search(r"gaps\n1, (\d\.\d\d) s in all", page.inner_text("article dl"))
        first, last = page.evaluate("[played.at(0), played.at(-1)]")
        assert told and 0 < float(told[1]) < 15
        total = last["at"] + len(last["samples"]) / RATE - first["at"]
        silent = total - (16000 + len(SECOND)) / 2 / RATE
        assert float(told[1]) == pytest.approx(silent, abs=0.006)


@pytest.mark.parametrize(("k", "label"), [(0, "1 kHz"), (1, "4 kHz")])
def test_spectrogram_has_the_energy_where_its_axis_says(chromium, k, label):
    with serving(Script()) as server, at(chromium, server) as page:
        send(page, "two tones")
        wait_for(page, "done")
        bright = page.evaluate(BRIGHTEST, k)
        tick = page.eval_on_selector_all(
            f".answer .sound:nth-of-type({k + 1}) .hertz span",
            "(all, label) => all.find((tick) => tick.textContent === label).style.bottom",
            label,
        )
        assert bright["height"] == pytest.approx(float(tick.rstrip("%")) / 100, abs=0.012)
        loud, other = max(bright["rows"]), sorted(bright["rows"])[len(bright["rows"]) // 2]
        assert loud > 4 * other


def test_spectrogram_and_waveform_show_when_the_sound_is(chromium):
    silence = bytes(len(FIRST))
    reply = (Samples(silence + FIRST),)
    with serving(Script(reply=reply)) as server, at(chromium, server) as page:
        send(page, "late")
        wait_for(page, "done")
        columns = page.evaluate(BRIGHTEST, 0)["columns"]
        onset = next(i for i, value in enumerate(columns) if value > 2 * columns[0])
        assert onset / len(columns) == pytest.approx(0.5, abs=0.03)  # half a window of 45 ms early
        high = page.evaluate("""() => {
          const canvas = document.querySelector(".answer .waveform");
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          const inked = (share) => {
            const x = Math.round(share * width);
            const rows = Array.from({ length: height }, (_, y) => data[4 * (y * width + x) + 3]);
            return rows.filter((alpha) => alpha > 128).length / height;
          };
          return [inked(0.25), inked(0.75)];
        }""")
        assert high[0] < 0.06 and high[1] > 0.85


def test_downloaded_wav_is_what_was_sent(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.fill("#seed", "7")
        send(page, "Two tones!")
        wait_for(page, "done")
        assert download(page, 0) == ("two-tones-seed7-1.wav", FIRST)
        assert download(page, 1) == ("two-tones-seed7-2.wav", SECOND)


def wav(seconds):
    target = BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(tone(700, seconds))
    return target.getvalue()


def test_a_file_is_heard_by_the_model(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        files = [
            {"name": name, "mimeType": "audio/wav", "buffer": wav(seconds)}
            for name, seconds in (("keep.wav", 0.5), ("drop.wav", 0.2))
        ]
        page.set_input_files("#file", files)
        page.wait_for_selector("#attachments li:nth-child(2)")
        assert page.inner_text("#attachments li >> nth=0").startswith("keep.wav · 0.50 s")
        page.click("[aria-label='Remove drop.wav']")
        send(page, "what is this?")
        wait_for(page, "done")
        text, sound = server.script.requests[0][1]["messages"][0]["content"]
        assert text == {"type": "text", "text": "what is this?"}
        assert (sound["type"], sound["input_audio"]["format"]) == ("input_audio", "wav")
        sent = base64.b64decode(sound["input_audio"]["data"])
        assert struct.unpack("<I", sent[40:44])[0] == len(sent) - 44
        assert sent[:44] == wav(0.5)[:44]
        assert samples_of(sent[44:]) == pytest.approx(samples_of(tone(700, 0.5)), abs=1)
        assert page.locator(".question .sound").count() == 1
        assert page.locator("#attachments li").count() == 0


def test_a_file_that_is_no_sound_is_refused(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        file = {"name": "cat.wav", "mimeType": "audio/wav", "buffer": b"miaow" * 99}
        page.set_input_files("#file", [file])
        page.wait_for_selector("#problem:has-text('cat.wav is not a sound')")
        assert page.locator("#attachments li").count() == 0


def test_a_recording_is_sent(chromium):
    with serving(Script()) as server, at(chromium, server) as page:
        page.wait_for_selector("#send:enabled")
        page.click("#record")
        page.wait_for_selector("#record:has-text('Stop recording')")
        page.wait_for_timeout(500)
        page.click("#record")
        page.wait_for_selector("#attachments li:has-text('recording')")
        page.focus("#prompt")
        page.keyboard.press("Enter")  # without a word
        wait_for(page, "done")
        (sound,) = server.script.requests[0][1]["messages"][0]["content"]
        with wave.open(BytesIO(base64.b64decode(sound["input_audio"]["data"]))) as file:
            assert file.getframerate() == RATE
            assert 0.2 < file.getnframes() / RATE < 3
            assert any(file.readframes(file.getnframes()))


def test_replay_seek_and_pause_from_the_keyboard(chromium):
    with serving(Script(reply=(Samples(FIRST),))) as server, at(chromium, server) as page:
        page.uncheck("#live")
        send(page, "x")
        wait_for(page, "done")
        assert page.evaluate("played.length") == 0  # it was told not to
        page.focus(".answer .screen")
        page.keyboard.press("ArrowRight")
        step = float(page.get_attribute(".answer .screen", "aria-valuenow"))
        assert step == pytest.approx(0.05, abs=0.001)
        page.keyboard.press("Space")
        until(page, "played.length === 1")
        assert page.evaluate("played[0].samples") == samples_of(FIRST)[800:]
        page.wait_for_selector(".answer .play:has-text('Pause')")
        page.click(".answer .play")
        page.wait_for_selector(".answer .play:has-text('Play')")
        assert page.evaluate("stopped") == 1
        page.click(".answer .play")
        until(page, "played.length === 2")
        page.wait_for_selector(".answer .play:has-text('Play')")  # at its end
