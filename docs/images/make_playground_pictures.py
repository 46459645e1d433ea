"""Take docs/images/playground-*.png from the page of a running server, with the steerings that come with trimtab.

trimtab serve --max-tokens 90
python docs/images/make_playground_pictures.py http://localhost:8000/ docs/images

It drives the Chromium that is there; on Debian: apt-get install chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ASK = "Give me tips for sleeping well."
PATIENCE = 600_000  # milliseconds


def take(address: str, folder: Path) -> None:
    """A chat, and a sweep."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 760})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.wait_for_selector(".tt-example")
        _chat(page)
        page.screenshot(path=folder / "playground-chat.png")
        page.set_viewport_size({"width": 1240, "height": 1060})
        _sweep(page)
        page.screenshot(path=folder / "playground-sweep.png")
        browser.close()


def _chat(page: Any) -> None:
    page.fill("#tt-message textarea", ASK)
    page.press("#tt-message textarea", "Enter")
    page.wait_for_function("document.querySelectorAll('#tt-talk .tt-end').length == 2")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def _sweep(page: Any) -> None:
    page.get_by_role("tab", name="Sweep").click()
    page.locator("#tt-strengths").locator("textarea, input").fill("0, 0.5, 1, 1.5")
    page.fill("#tt-sweep-prompt textarea", ASK)
    page.click("#tt-sweep-go")
    page.wait_for_function("document.querySelectorAll('#tt-grid .tt-end').length == 4")
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
