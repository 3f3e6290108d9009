"""A headless Chromium for the tests of the page; they are skipped where there is none.

And what they all do with it.
"""

from __future__ import annotations

import os
import shutil
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from page_server import RATE

# Notes what the page gives to the sound card, piece by piece: time and samples.
LISTEN = """
window.played = [];
window.stopped = 0;
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (at) {
  const samples = Array.from(this.buffer.getChannelData(0), (v) => Math.round(v * 32768));
  window.played.push({ at, rate: this.buffer.sampleRate, samples });
  return start.call(this, at);
};
const stop = AudioBufferSourceNode.prototype.stop;
AudioBufferSourceNode.prototype.stop = function () { window.stopped += 1; return stop.call(this); };
"""

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


def missing(what: str) -> None:
    """Skip the test, or fail it where a browser must be there (MLLM_AUDIO_REQUIRE_BROWSER=1)."""
    if os.environ.get("MLLM_AUDIO_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{what} is missing, and MLLM_AUDIO_REQUIRE_BROWSER=1")
    pytest.skip(f"{what} is missing")


@contextmanager
def launched_browser() -> Iterator:
    """Give a playwright `Browser`: the system's Chromium, or CHROMIUM if that names another."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("playwright")
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        missing("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def at(chromium, server, allowed=(), **options):
    """Open the page in a fresh profile; fail on errors of its scripts other than those allowed."""
    profile = chromium.new_context(**options)
    page = profile.new_page()
    page.set_default_timeout(15_000)
    page.problems, page.traffic = [], []
    page.on("request", lambda request: page.traffic.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda said: page.problems.append(said.text) if said.type == "error" else 0)
    page.add_init_script(LISTEN)
    page.goto(server.url)
    try:
        yield page
        assert [said for said in page.problems if not any(a in said for a in allowed)] == []
    finally:
        profile.close()


def send(page, prompt):
    page.wait_for_selector("#send:enabled")
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")


def until(page, condition):
    """Wait until an expression is true; the CSP forbids what `wait_for_function` does."""
    end = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def wait_for(page, state, number=1):
    page.wait_for_selector(f"article:nth-of-type({number})[data-state={state}]")


def parts(page):
    """Return the texts of the last answer, and a dot for each of its sounds, in order."""
    script = """(all) => [...all.children].slice(1).map((part) =>
        part.matches("figure") ? "." : part.textContent)"""
    return page.eval_on_selector("article:last-of-type .answer", script)


def download(page, k):
    with page.expect_download() as caught:
        page.click(f".answer .sound >> nth={k} >> .download")
    with wave.open(str(caught.value.path())) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return caught.value.suggested_filename, file.readframes(file.getnframes())
