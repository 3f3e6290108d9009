"""The script that takes the README's picture of the page."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from browser import launched_browser
from page_server import Fail, Script, serving


@pytest.fixture(scope="module", autouse=True)
def chromium():
    with launched_browser():
        pass  # the script starts its own


def take_picture(*arguments):
    script = Path(__file__).parents[1] / "scripts" / "page_screenshot.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


def test_picture_of_an_answer_is_taken(tmp_path):
    out = tmp_path / "page.png"
    with serving(Script(key="s3cret")) as server:
        done = take_picture(server.url, "two tones", out, "--seed", 5, "--api-key", "s3cret")
        assert (done.returncode, done.stderr) == (0, "")
        ((path, body, _),) = server.script.requests
    assert (path, body["seed"]) == ("/v1/chat/completions", 5)
    width, height = struct.unpack(">II", out.read_bytes()[16:24])
    assert width == 1200 and height >= 760


def test_picture_without_an_answer_is_an_error(tmp_path):
    with serving(Script(reply=(Fail("the engine has stopped"),))) as server:
        done = take_picture(server.url, "two tones", tmp_path / "page.png")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("has no answer, it says: the engine has stopped")
