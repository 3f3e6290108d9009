"""A headless Chromium for the tests of the page; they are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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
