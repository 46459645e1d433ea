"""The page for everybody: by keyboard alone, read aloud, in light and dark, wide and narrow. Of the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="these tests need playwright: pip install playwright")
pytest.importorskip("axe_playwright_python", reason="these tests need axe: pip install axe-playwright-python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs gradio: pip install 'trimtab[serve]'"),
]
BAD = ("serious", "critical")
FOCUSED = """() => {
    const at = document.activeElement;
    const open = document.querySelectorAll("input[aria-expanded=true]").length;
    return [at.closest("[id^=tt-]")?.id ?? at.innerText.split("\\n")[0], at.tagName, open];
}"""
"""In the browser: what has the focus, and how many lists are open."""


def violations(page: Any) -> list[str]:
    """What axe finds, in light and dark, wide and narrow."""
    from axe_playwright_python.sync_playwright import Axe

    violated = []
    for dark in (False, True):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function("width => innerWidth == width", arg=width)
            page.wait_for_timeout(200)  # colours change over a while
            for violation in Axe().run(page).response["violations"]:
                if violation["impact"] in BAD:
                    nodes = [node["html"][:120] for node in violation["nodes"][:3]]
                    violated.append(f"{'dark' if dark else 'light'}, {width}: {violation['id']}: {nodes}")
    page.evaluate("document.body.classList.remove('dark')")
    page.set_viewport_size({"width": 1280, "height": 900})
    return violated


@pytest.mark.long
def test_a_first_visit_by_keyboard_and_ear(start: Callable[..., Any], open_page: Callable[..., Any]) -> None:
    """One page for all of it: starting a server and a browser takes longer than what is done there."""
    server = start("--playground", "--max-tokens", "8", TRIMTAB_API_KEY="open sesame")
    page = open_page(server.url, ready="#tt-key input")
    assert page.locator("#tt-routes details").count() == 0
    page.keyboard.type("open sesame")  # its field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector(".tt-example")
    assert "key of" in page.inner_text(".tt-head p")
    assert page.locator("#tt-names .token").all_inner_texts() == ["s0"]  # something is chosen already
    assert violations(page) == []

    # from the first thing to choose to the first message that is proposed, with the keyboard; lists close behind it
    passed: list[str] = []
    while not passed or passed[-1] != "tt-examples":
        page.keyboard.press("Tab")
        page.wait_for_timeout(250)
        name, tag, opened = page.evaluate(FOCUSED)
        passed.append(name)
        assert opened == (tag == "INPUT" and name in ("tt-names", "tt-layer-0")), passed
        assert len(passed) < 30, passed
    order = ["tt-names", "tt-strength-0", "tt-layer-0", "Emphasize a part of your message", "Chat", "API"]
    assert [name for name in dict.fromkeys(passed) if name in order] == order
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#tt-talk .tt-end').length == 2")
    page.wait_for_function("document.activeElement.closest('#tt-message') != null")  # where it goes on
    assert not page.locator("#tt-examples").is_visible()
    assert not page.locator("#tt-stop").is_visible()

    # said once, when it is whole
    page.wait_for_function("document.querySelectorAll('#tt-teller p').length == 2")
    spoken = page.locator("#tt-teller p").all_inner_texts()
    assert [line.partition(":")[0] for line in spoken] == ["Unsteered", "Steered s0 × 1"]
    assert page.get_attribute("#tt-teller", "aria-live") == "polite"
    for name in ("Emphasize a part", "Hold steering back", "Length, temperature", "The request, to copy"):
        page.get_by_role("button", name=name).click()
    page.wait_for_function("document.querySelector('#tt-curl')?.innerText.includes('curl')")
    page.click("#tt-colour input")
    page.get_by_role("option", name="colored by s0, layer 0").click()
    page.wait_for_selector("#tt-talk .tt-text span[title]")
    assert violations(page) == []
    assert page.locator("#tt-teller p").count() == 2
    for tab, there in (("Sweep", "#tt-sweep-go"), ("Learn", ".tt-note"), ("API", "#tt-routes details")):
        page.get_by_role("tab", name=tab).click()
        page.locator(there).locator("visible=true").first.wait_for()
        assert violations(page) == [], tab

    page.get_by_text("Fields of the request").first.click()  # the link to /docs would bring no key
    assert page.get_by_role("rowheader", name="steering").first.is_visible()
