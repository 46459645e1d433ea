"""What the page says: answers as Markdown, which never is markup of the page's; examples; the API's reference."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Callable
from typing import Any

import pytest

from trimtab.serve.app import openapi
from trimtab.serve.playground.examples import OWN, SHOWN, default_steering, examples
from trimtab.serve.playground.formatted import formatted
from trimtab.serve.refusals import PASSING, Refusal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("* a\n* **b**", "<ul>\n<li>a</li>\n<li><strong>b</strong></li>\n</ul>\n"),
        ("1. a\n2. b", "<ol>\n<li>a</li>\n<li>b</li>\n</ol>\n"),
        ("one\ntwo", "<p>one<br>\ntwo</p>\n"),
        ("# Sea\n\nwide", '<p class="tt-heading">Sea</p>\n<p>wide</p>\n'),
        ('{"a":\n    1}', "<pre><code>{&quot;a&quot;:\n    1}</code></pre>"),
        ("```json\n{}\n```", '<pre><code class="language-json">{}\n</code></pre>\n'),
        ("", ""),
    ],
)
def test_markdown(text: str, expected: str) -> None:
    assert formatted(text).replace("<br />", "<br>") == expected


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a <img src=x onerror=alert(1)> b",
        "![x](http://evil.example/x.png)",
        "[click](javascript:alert(1))",
        "<http://evil.example>",
        "[a]: http://evil.example\n\n[a]",
        '# <b onclick="x">head</b>',
        "```<script>\nx\n```",
        "| <i>a</i> |\n| --- |\n| [b](http://x) |",
        "&lt;script&gt; &#60;script&#62;",
        '{"<script>": 1}',
    ],
)
def test_nothing_in_an_answer_is_markup_or_leads_elsewhere(text: str) -> None:
    """Only Markdown's own elements are there, with no attribute but a class; and what was written can still be read."""
    shown = formatted(text)
    for name, attributes in re.findall(r"<([a-z0-9]+)([^<>]*?)/?>", shown):
        assert name in {"p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}
        assert re.fullmatch(r'(?: class="[^"<>]*")? ?', attributes), attributes
    assert not re.search("<(script|img|a|i|b)\\b", shown)
    said = html.unescape(re.sub("<[^>]+>", "", shown))
    for word in re.findall(r"evil\.example|alert", text):
        assert word in said


def test_examples_are_of_what_may_be_chosen() -> None:
    packaged = sorted(OWN)
    assert [example.steering for example in examples(packaged)] == list(OWN)
    assert default_steering(packaged) == "bullets"
    assert {example.steering for example in examples(["mine", "other"])} == {"mine"}
    assert len(examples(["mine"])) == len(examples(packaged)) == SHOWN
    assert examples([]) == []
    assert default_steering([]) is None


def test_the_reference_has_every_route_and_field() -> None:
    from trimtab.serve.reference import reference

    shown, document = reference(), openapi()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"{method.upper()} {html.escape(path)}</code>" in shown
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest"):
        for field in document["components"]["schemas"][name]["properties"]:
            assert f"<code>{field}</code>" in shown, field


def test_docs_explains_everything_and_loads_nothing(make_service: Callable[..., Any], client_of: Any) -> None:
    client = client_of(make_service(learn=True, upload=True))
    response, document = client.get("/docs"), client.get("/openapi.json").json()
    shown = response.text
    for path, operations in document["paths"].items():
        for method in operations:
            assert shown.count(f"<code>{method.upper()} {html.escape(path)}</code>") >= 2  # in the list, and below
    for name, schema in document["components"]["schemas"].items():
        section = shown.partition(f"<h3 id='{name}'>")[2].partition("<h3 ")[0]
        assert all(f"<code>{field}</code>" in section for field in schema.get("properties", ())), name
    assert set(re.findall("href='#([^']*)'", shown)) <= set(re.findall("id='([^']*)'", shown))
    assert set(re.findall("href='(.)", shown)) == {"#"}
    assert not re.search(r"<(script|link|img|iframe|object|embed)|\ssrc=|@import|url\(|style='", shown)
    (style,) = re.findall("<style>(.*?)</style>", shown)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = response.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", f"style-src 'sha256-{digest}'", "frame-ancestors 'none'"} <= set(rules)


@pytest.mark.parametrize("status", PASSING)
def test_what_may_pass_says_when_to_try_again(status: int) -> None:
    """Whoever refuses for now without a better guess leaves this one; 503 and 429 are made in no other way."""
    assert int(Refusal(status, "busy").response.headers["Retry-After"]) > 0
    assert Refusal(status, "busy", retry=7).response.headers["Retry-After"] == "7"
    assert "Retry-After" not in Refusal(400, "no").response.headers


def test_the_default_models_steerings_come_with_the_package(tiny_lm: Any) -> None:
    from trimtab.data.distilled import path_of
    from trimtab.serve.packaged import NAMES, packaged_library

    assert set(NAMES) == set(OWN)
    assert all(path_of(name).is_file() for name in NAMES)
    assert packaged_library(tiny_lm).names == []  # they were learned on another one
