"""Ask a running server's page for something and save a picture of the answer.

python scripts/page_screenshot.py http://127.0.0.1:8000 "two beeps, please" docs/page.png --seed 1
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTH = 1200  # pixels
BUSY = ".play:has-text('Pause'), .time:has-text('plays next')"
ENDED = "article[data-state=done], article[data-state=failed], #problem:not([hidden])"


def screenshot(page: Page, url: str, prompt: str, out: str, options: argparse.Namespace) -> None:
    """Send a prompt, wait until the answer has come and been played, and save the page.

    Raises:
        ValueError: with what the page says, if there is no answer.
    """
    page.set_default_timeout(1000 * options.timeout)
    page.goto(url)
    if options.api_key:
        page.fill("#key", options.api_key)
        page.press("#key", "Tab")
    page.wait_for_selector("#send:enabled")
    if options.caption:
        page.check("#mode-caption", force=True)
    if options.seed is not None:
        page.fill("#seed", str(options.seed))
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_selector(ENDED)
    if page.locator("article[data-state=done]").count() == 0:
        said = page.locator("article .note, #problem:not([hidden])").all_inner_texts()
        raise ValueError(f"the page at {url} has no answer, it says: {' '.join(said)}")
    page.wait_for_selector(BUSY, state="detached")
    page.locator("#send").blur()
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": WIDTH, "height": height})  # the box stays below the answer
    page.wait_for_timeout(200)  # in which the page draws itself again
    page.screenshot(path=out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="of the server")
    parser.add_argument("prompt", help="what is sent")
    parser.add_argument("out", help="PNG file that is written")
    parser.add_argument("--seed", type=int, help="of the answer; default: the page chooses")
    parser.add_argument("--caption", action="store_true", help="ask for the sound of a caption")
    parser.add_argument("--api-key", help="of the server")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--height", type=int, default=760, help="of the window, in pixels")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for an answer")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Take the picture; return the exit status."""
    from playwright.sync_api import Error, sync_playwright

    options = parse(arguments)
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if executable is None:
        print("found no chromium; install it, or set CHROMIUM to one", file=sys.stderr)
        return 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": WIDTH, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        try:
            screenshot(page, options.url, options.prompt, options.out, options)
        except (ValueError, Error) as error:
            print(str(error).splitlines()[0], file=sys.stderr)
            return 1
        finally:
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
