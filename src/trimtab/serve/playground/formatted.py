"""An answer's Markdown as HTML. HTML and links in it stay plain text."""

from __future__ import annotations

import html
from functools import lru_cache

from markdown_it import MarkdownIt

REMEMBERED = 1024
"""Answers whose HTML is cached: a conversation is rendered again at each token."""
ELSEWHERE = ["image", "link", "autolink", "reference"]
READER = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable(ELSEWHERE)
JSON = ('{"', "{\n", '[{"', "[\n", '["')
"""The beginnings of answers in JSON, whose whitespace is preserved."""


@lru_cache(maxsize=REMEMBERED)
def formatted(text: str) -> str:
    """The text as HTML, without any markup from the text itself."""
    if text.lstrip().startswith(JSON):
        return f"<pre><code>{html.escape(text)}</code></pre>"
    tokens = READER.parse(text)
    for token in tokens:
        if token.type == "heading_open":  # only the page's own headings are for navigation
            token.attrSet("class", "tt-heading")
        if token.type in ("heading_open", "heading_close"):
            token.tag = "p"
    return str(READER.renderer.render(tokens, READER.options, {}))
