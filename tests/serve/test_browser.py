"""The page as a person has it: a real server of the default model, and a real browser without a window."""

from __future__ import annotations

import html
import json
import re
import signal
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve.conftest import PATIENCE

pytest.importorskip("playwright.sync_api", reason="these tests need playwright: pip install playwright")

# The server needs gradio, in its own process: whether it's there is seen without the seconds of importing it.
NO_PAGE = find_spec("gradio") is None
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(NO_PAGE, reason="the page needs gradio: pip install 'trimtab[serve]'"),
]
LATE_ENDS = """{
    const ask = window.fetch.bind(window);
    window.fetch = async (...given) => {
        const response = await ask(...given);
        if (!response.url.includes("/queue/data")) return response;
        const late = new TransformStream({
            async transform(chunk, out) {
                const at = new TextDecoder().decode(chunk).indexOf('data: {"msg":"close_stream"');
                if (at > 0) out.enqueue(chunk.slice(0, at));
                if (at >= 0) await new Promise((resolve) => setTimeout(resolve, 1000));
                window.lateEnds = (window.lateEnds || 0) + (at >= 0);
                out.enqueue(at > 0 ? chunk.slice(at) : chunk);
            },
        });
        return new Response(response.body.pipeThrough(late), response);
    };
}"""
"""The end of the stream of answers reaches the page a second late, as it may where the browser is busy."""
LATE_MOVE = """{
    const ask = window.fetch.bind(window);
    let sent = 0;
    let rest;
    const others = new Promise((resolve) => { rest = resolve; });
    window.fetch = async (input, init) => {
        if (!String(input.url ?? input).includes("/queue/join")) return ask(input, init);
        const { fn_index: number } = JSON.parse(init.body);
        const events = window.gradio_config.dependencies.find(({ id }) => id === number).targets;
        if (!events.some(([, name]) => name === "input")) return ask(input, init);
        const move = ++sent;
        if (move === 1) await others;
        const response = await ask(input, init);
        if (move === 5) rest();
        if (move === 1) window.lateMove = true;
        return response;
    };
}"""
"""The first of five moves of a slider reaches the server after the others, as any may where it is busy."""
LATE_ARRIVAL = """{
    const ask = window.fetch.bind(window);
    let first = true;
    window.fetch = async (input, init) => {
        const late = first && String(input.url ?? input).includes("/queue/join");
        if (late) {
            first = false;
            await new Promise((resolve) => setTimeout(resolve, 3000));
            setTimeout(() => { window.lateArrival = true; }, 2000);  // and the server's answer to it is there
        }
        return ask(input, init);
    };
}"""
"""What the page asks for when it opens is asked three seconds late."""
ASK = "What makes a good friend?"
TOKENS = 16
TOPICS = ["Name three rivers.", "What is a friend?", "How do I boil an egg?", "Tell me about the moon.", "Why read?"]


@pytest.fixture(scope="module")
def bullets(lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a steering towards bullet points."""
    from trimtab import learn_instruct, save
    from trimtab.text.pairs import Pair

    folder = tmp_path_factory.mktemp("known")
    pairs = [Pair(f"{topic} Answer as a list of bullet points.", topic, "", "prompts") for topic in TOPICS]
    save(learn_instruct(lm, pairs), folder / "bullets.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], bullets: Path) -> Any:
    arguments = ("--playground", "--learn", "--max-tokens", str(TOKENS), "--dtype", "float32")
    return start(*arguments, model=None, known=bullets)


@pytest.fixture
def page(open_page: Callable[..., Any], server: Any) -> Any:
    return open_page(server.url)


def shown(text: str) -> str:
    """What an answer says where it is formatted."""
    from trimtab.serve.playground.formatted import formatted

    return html.unescape(re.sub("<[^>]+>", "", formatted(text)))


def choose(page: Any, name: str) -> None:
    """Take this one, unless it is the one that a first visit has."""
    page.wait_for_selector("#tt-names .token")
    if page.locator("#tt-names .token", has_text=name).count() == 0:
        page.click("#tt-names input")
        page.get_by_role("option", name=name).click()
        page.keyboard.press("Escape")
    page.wait_for_function("name => document.body.innerText.includes(name + ': strength')", arg=name)


def say(page: Any, text: str) -> None:
    """Type it and press Enter; wait for both answers."""
    before = page.locator(".tt-turn").count()
    page.fill("#tt-message textarea", text)
    page.press("#tt-message textarea", "Enter")
    page.wait_for_function("n => document.querySelectorAll('#tt-talk .tt-end').length >= n", arg=2 * before + 2)


def words(page: Any, side: str) -> str:
    """What a side said last."""
    return str(page.locator(f"#tt-talk .{side} .tt-text").last.text_content())


def until(page: Any, side: str, expected: str) -> None:
    page.wait_for_function(
        "([side, text]) => [...document.querySelectorAll(`#tt-talk .${side} .tt-text`)].at(-1)?.textContent == text",
        arg=[side, expected],
    )


class TestChat:
    @pytest.mark.smoke
    def test_both_answers_the_slider_and_the_colours(self, page: Any, lm: Any, bullets: Path) -> None:
        from trimtab import load

        steering = load(bullets / "bullets.safetensors")
        choose(page, "bullets")
        say(page, ASK)
        prompt = [{"role": "user", "content": ASK}]
        expected = {
            strength: lm.generate(prompt, strength * steering, max_new_tokens=TOKENS)[0].text
            for strength in (0, 0.5, 1)
        }
        assert words(page, "tt-plain") == shown(expected[0])
        assert words(page, "tt-steered") == shown(expected[1]) != shown(expected[0])
        assert page.input_value("#tt-message textarea") == ""
        assert page.evaluate("document.activeElement.closest('#tt-message') != null")
        # with the keyboard: five steps to the left are half the strength
        assert expected[0.5] not in (expected[0], expected[1])
        page.focus("#tt-strength-0 input[type=range]")
        for _ in range(5):
            page.keyboard.press("ArrowLeft")
        until(page, "tt-steered", shown(expected[0.5]))
        assert words(page, "tt-plain") == shown(expected[0])
        assert "bullets × 0.5" in page.locator(".tt-steered h3").last.inner_text()
        # colours
        page.click("#tt-colour input")
        layer = steering.layers[0]
        page.get_by_role("option", name=f"colored by bullets, layer {layer}").click()
        page.wait_for_selector("#tt-talk .tt-steered .tt-text span[title]")
        assert words(page, "tt-steered") == expected[0.5]
        assert "Cosine" in page.locator(".tt-key").inner_text()
        # the request, to copy
        page.get_by_text("The request, to copy").click()
        page.wait_for_function("document.querySelector('#tt-curl')?.innerText.includes('\"strength\": 0.5')")
        assert f"curl {page.url}v1/chat/completions" in page.inner_text("#tt-curl")
        page.wait_for_function("document.querySelector('#tt-python')?.innerText.includes('extra_body')")

    @pytest.mark.long
    def test_emphasis_and_what_rejection_did(self, page: Any, lm: Any) -> None:
        text = "Name a fruit. Answer in capital letters."
        page.get_by_role("button", name="Emphasize a part of your message").click()
        page.fill("#tt-message textarea", text)
        page.fill("#tt-emphasis textarea", "in purple letters")
        page.wait_for_selector(".tt-missing")
        assert "'in purple letters' isn't in the prompt" in page.inner_text(".tt-missing")
        # it isn't sent, and the message stays
        page.press("#tt-message textarea", "Enter")
        page.wait_for_selector(".tt-error[role=alert]")
        assert "isn't in the prompt" in page.inner_text(".tt-error[role=alert]")
        assert page.input_value("#tt-message textarea") == text
        assert page.locator(".tt-turn").count() == 0
        page.fill("#tt-emphasis textarea", "")
        start = text.index("in capital letters")
        page.evaluate(f"document.querySelector('#tt-message textarea').setSelectionRange({start}, {len(text) - 1})")
        page.click("#tt-marking")
        page.wait_for_function("document.querySelector('#tt-emphasis textarea')?.value == 'in capital letters'")
        page.wait_for_function("document.querySelector('.tt-marks')?.innerText.includes('found, ')")
        say(page, text)
        assert page.locator(".tt-error").count() == 0
        (answer,) = lm.generate(
            [[{"role": "user", "content": text}]], emphasize=["in capital letters"], max_new_tokens=TOKENS
        )
        assert words(page, "tt-steered") == shown(answer.text)
        changed = sum(step.replaced is not None for step in answer.trace.steps)
        assert f"{changed} changed" in page.locator(".tt-steered .tt-end").inner_text()
        assert page.inner_text(".tt-you mark") == "in capital letters"
        page.click("#tt-colour input")
        page.get_by_role("option", name="colored by where steering was held back").click()
        page.wait_for_selector("#tt-talk .tt-steered .tt-text span")
        opened = sum(step.open for step in answer.trace.steps)
        assert page.locator("#tt-talk .tt-steered .tt-text span").count() == opened > 0

    @pytest.mark.long
    def test_errors_are_words(self, page: Any) -> None:
        page.press("#tt-message textarea", "Enter")
        page.wait_for_selector(".tt-error[role=alert]")
        assert "Type a message first" in page.inner_text(".tt-error")
        say(page, ASK)  # and it goes on
        assert page.locator(".tt-error").count() == 0
        page.get_by_role("tab", name="Learn").click()
        page.fill("#tt-name textarea, #tt-name input", "broken")
        page.fill("#tt-pairs textarea", '{"positive": "yes"}')
        page.click("#tt-learn")
        page.wait_for_selector(".tt-error[role=alert]")
        assert "Pairs:1: not a pair" in page.inner_text(".tt-error")

    @pytest.mark.long
    def test_what_is_asked_while_the_last_answer_ends_is_answered(
        self, open_page: Callable[..., Any], server: Any
    ) -> None:
        page = open_page(server.url, script=LATE_ENDS)
        for _ in range(4):
            page.press("#tt-message textarea", "Enter")
            page.wait_for_selector(".tt-error[role=alert]")
            page.wait_for_timeout(200)  # the server has ended the stream, and the page doesn't know
            page.click("#tt-clear")
            page.wait_for_selector(".tt-error[role=alert]", state="detached")
        assert page.evaluate("window.lateEnds") > 0
        say(page, ASK)

    @pytest.mark.long
    def test_a_move_that_arrives_late_is_passed_over(
        self, open_page: Callable[..., Any], server: Any, lm: Any, bullets: Path
    ) -> None:
        from trimtab import load

        page = open_page(server.url, script=LATE_MOVE)
        choose(page, "bullets")
        say(page, ASK)
        page.focus("#tt-strength-0 input[type=range]")
        for _ in range(5):
            page.keyboard.press("ArrowLeft")
        page.wait_for_function("window.lateMove")
        (answer,) = lm.generate(
            [{"role": "user", "content": ASK}], 0.5 * load(bullets / "bullets.safetensors"), max_new_tokens=TOKENS
        )
        until(page, "tt-steered", answer.text)
        assert "bullets × 0.5" in page.locator(".tt-steered h3").last.inner_text()

    @pytest.mark.long
    def test_it_can_be_stopped_and_closing_the_page_frees_the_model(self, page: Any, server: Any) -> None:
        page.fill("#tt-message textarea", "Tell me a long story.")
        page.keyboard.press("Enter")
        page.wait_for_selector(".tt-caret")
        page.context.close()
        until = time.monotonic() + 60
        while time.monotonic() < until and metric(server, "trimtab_running") + metric(server, "trimtab_queued"):
            time.sleep(0.2)
        assert metric(server, "trimtab_running") == metric(server, "trimtab_queued") == 0


@pytest.mark.long
class TestSweep:
    def test_a_grid_of_answers(self, page: Any, lm: Any, bullets: Path) -> None:
        from trimtab import load

        page.get_by_role("tab", name="Sweep").click()
        page.fill("#tt-strengths textarea, #tt-strengths input", "0, 1")
        page.fill("#tt-sweep-prompt textarea", ASK)
        page.click("#tt-sweep-go")
        page.wait_for_function("document.querySelectorAll('#tt-grid .tt-end').length == 2")
        steering = load(bullets / "bullets.safetensors")
        prompt = [{"role": "user", "content": ASK}]
        expected = [lm.generate(prompt, s * steering, max_new_tokens=TOKENS)[0].text for s in (0, 1)]
        assert page.locator("#tt-grid .tt-text").all_text_contents() == list(map(shown, expected))
        assert page.locator("#tt-grid h3").all_inner_texts() == ["strength 0", "strength 1"]


@pytest.mark.long
class TestLearning:
    def test_from_a_dropped_file_and_a_typed_pair(self, page: Any, lm: Any, tmp_path: Path) -> None:
        from trimtab import load

        page.get_by_role("tab", name="Learn").click()
        rows = [{"prompt": t, "positive": "I'd love to!", "negative": "I hate that."} for t in TOPICS]
        transfer = page.evaluate_handle(
            """text => { const data = new DataTransfer();
                data.items.add(new File([text], "kind words.jsonl")); return data; }""",
            "\n".join(map(json.dumps, rows)),
        )
        page.dispatch_event("#tt-pairs textarea", "drop", {"dataTransfer": transfer})
        page.wait_for_function("document.querySelector('#tt-pairs textarea')?.value.includes('hate')")
        page.get_by_role("button", name="Add a pair by typing").click()
        page.fill("#tt-pair-prompt textarea", "Help?")
        page.fill("#tt-pair-positive textarea", "Gladly!")
        page.fill("#tt-pair-negative textarea", "Never.")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#tt-pairs textarea')?.value.includes('Gladly')")
        assert page.locator("#tt-name").locator("textarea, input").input_value() == "kind-words"
        page.click("#tt-learn")
        page.wait_for_selector(".tt-save")
        with page.expect_download() as coming:
            page.click(".tt-save")
        assert coming.value.suggested_filename == "kind-words.safetensors"
        coming.value.save_as(tmp_path / "kind.safetensors")
        steering = load(tmp_path / "kind.safetensors")
        assert steering.card.options is not None
        # it is chosen, and steers
        page.wait_for_function("document.body.innerText.includes('kind-words: strength')")
        page.get_by_role("tab", name="Chat").click()
        say(page, ASK)
        (answer,) = lm.generate([{"role": "user", "content": ASK}], steering, max_new_tokens=TOKENS)
        assert words(page, "tt-steered") == shown(answer.text)


@pytest.mark.long
class TestMaking:
    def test_a_persona_and_its_opposite_on_the_way(self, page: Any, server: Any) -> None:
        """Making takes minutes: here it begins, and ends when the page is closed."""
        page.get_by_role("tab", name="Learn").click()
        page.fill("#tt-make-name input, #tt-make-name textarea", "poet")
        page.fill("#tt-unlike input, #tt-unlike textarea", "an office clerk")
        page.click("#tt-make")
        page.wait_for_selector(".tt-error[role=alert]")
        assert "Also say whom the model should be like" in page.inner_text(".tt-error[role=alert]")
        page.fill("#tt-like input, #tt-like textarea", "a tired poet")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#tt-made')?.innerText.includes('1 of 4: answering')")
        assert page.locator(".tt-error[role=alert]").count() == 0
        page.context.close()
        answer = httpx.post(
            f"{server.url}v1/chat/completions",
            json={"model": "trimtab", "messages": [{"role": "user", "content": ASK}], "max_tokens": 2},
            timeout=PATIENCE / 1000,
        )
        assert answer.status_code == 200  # the model is free again


@pytest.mark.long
class TestNarrow:
    def test_a_telephone(self, open_page: Callable[..., Any], server: Any) -> None:
        page = open_page(server.url, 390, 844)
        choose(page, "bullets")
        say(page, ASK)
        for tab in ("Chat", "Sweep", "Learn"):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        page.get_by_role("tab", name="Chat").click()
        page.wait_for_selector("#tt-talk .tt-steered")
        plain, steered = (page.locator(f"#tt-talk .{side}").last.bounding_box() for side in ("tt-plain", "tt-steered"))
        assert steered["y"] >= plain["y"] + plain["height"]  # one below the other
        assert plain["width"] > 300
        message, names = (page.locator(part).bounding_box() for part in ("#tt-message", "#tt-names"))
        assert names["y"] + names["height"] <= message["y"]  # what is chosen first comes first
        page.set_viewport_size({"width": 1280, "height": 900})
        page.wait_for_function("innerWidth == 1280")
        plain, steered = (page.locator(f"#tt-talk .{side}").last.bounding_box() for side in ("tt-plain", "tt-steered"))
        assert steered["x"] >= plain["x"] + plain["width"]  # side by side
        assert steered["y"] == plain["y"]
        message, names = (page.locator(part).bounding_box() for part in ("#tt-message", "#tt-names"))
        assert names["x"] + names["width"] <= message["x"]  # and beside it


@pytest.mark.long
class TestKeys:
    def test_a_server_with_keys_asks_for_one(self, start: Callable[..., Any], open_page: Callable[..., Any]) -> None:
        server = start("--playground", TRIMTAB_API_KEY="open sesame")
        page = open_page(server.url, ready="#tt-key input")
        # nothing of what is behind the key: neither in the source nor to choose from
        assert '"s1"' not in page.content()
        page.click("#tt-names input")
        assert page.get_by_role("option").count() == 0
        page.keyboard.press("Escape")
        page.fill("#tt-key input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector(".tt-error")
        assert "Enter your API key" in page.inner_text(".tt-welcome")
        assert "isn't known" in page.inner_text(".tt-error")
        page.fill("#tt-key input", "open sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector(".tt-head p")
        page.wait_for_selector(".tt-welcome li")
        choose(page, "s1")
        say(page, "The sea")
        assert "s1 × 1" in page.locator(".tt-steered h3").inner_text()
        # the server ends although the page is open
        assert server.stop(signal.SIGTERM) == 0

    def test_what_was_asked_without_a_key_replaces_nothing(
        self, start: Callable[..., Any], open_page: Callable[..., Any]
    ) -> None:
        server = start("--playground", TRIMTAB_API_KEY="open sesame")
        page = open_page(server.url, ready="#tt-key input", script=LATE_ARRIVAL)
        page.fill("#tt-key input", "open sesame")
        page.keyboard.press("Enter")
        page.wait_for_function("window.lateArrival")
        page.wait_for_selector(".tt-head p")
        choose(page, "s1")


def metric(server: Any, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    return float(match[1]) if match else 0.0
