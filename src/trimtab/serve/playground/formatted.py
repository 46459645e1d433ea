"""An answer as a reader expects it: Markdown as HTML. What is HTML in it already, or leads elsewhere, stays text."""

from __future__ import annotations

import html
from functools import lru_cache

from markdown_it import MarkdownIt

REMEMBERED = 1024
"""Answers whose HTML is kept: a conversation is drawn anew at each token."""
ELSEWHERE = ["image", "link", "autolink", "reference"]
READER = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable(ELSEWHERE)
JSON = ('{"', "{\n", '[{"', "[\n", '["')
"""How an answer begins that is JSON, whose line breaks and blanks are shown as they are."""


@lru_cache(maxsize=REMEMBERED)
def formatted(text: str) -> str:
    """The text as HTML, in which nothing that the text says is markup of its own."""
    if text.lstrip().startswith(JSON):
        return f"<pre><code>{html.escape(text)}</code></pre>"
    tokens = READER.parse(text)
    for token in tokens:
        if token.type == "heading_open":  # the page has headings of its own, for those who find their way by them
            token.attrSet("class", "tt-heading")
        if token.type in ("heading_open", "heading_close"):
            token.tag = "p"
    return str(READER.renderer.render(tokens, READER.options, {}))
