"""The chat template's own keywords, such as `enable_thinking`: finding, checking and setting them."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from functools import lru_cache, partial
from typing import Any

from trimtab.errors import TrimtabError

CONTINUE = "continue_final_message"
"""A keyword of rendering, independent of the template: whether the assistant's last message is continued."""
GIVEN = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables that every template is called with, in addition to the special tokens."""
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def keywords_of(tokenizer: Any) -> tuple[str, ...]:
    """The keywords that the chat template uses, sorted by name; empty if there is no template."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return _keywords(template) if template else ()


@lru_cache(maxsize=16)
def _keywords(template: str) -> tuple[str, ...]:
    from jinja2 import meta, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, with which templates mark what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise TrimtabError(f"the chat template can't be read: {error}") from error
    return tuple(sorted(used - GIVEN - set(SPECIAL)))


def check_keywords(tokenizer: Any, template: Mapping[str, Any]) -> None:
    """Raises `TrimtabError` for a keyword that the chat template doesn't use, and lists those that it uses."""
    if not template:
        return
    if not isinstance(template, Mapping):
        raise TrimtabError(
            f"keywords of the template are a dictionary (such as {{'enable_thinking': False}}), not {template!r}"
        )
    known = keywords_of(tokenizer)
    for name in template:
        if name not in known:
            used = f"it uses {', '.join(known)}" if known else "it uses none"
            raise TrimtabError(f"the chat template doesn't use {name!r}, so it would have no effect; {used}")


def check_no_keywords(tokenizer: Any, options: Collection[str]) -> None:
    """Raises `TrimtabError` for generation options that are keywords of the chat template, or of rendering."""
    try:
        known = keywords_of(tokenizer) if options else ()
    except TrimtabError:  # reported where the template is used, if it is
        known = ()
    for name in options:
        if name in ("chat_template_kwargs", "add_generation_prompt", CONTINUE, *known):
            inside = "…" if name == "chat_template_kwargs" else f"{name!r}: …"
            raise TrimtabError(
                f"{name!r} isn't an option of generation, but of the chat template: template={{{inside}}}"
            )


def with_keywords(tokenizer: Any, template: Mapping[str, Any] | None) -> Any:
    """A copy of the tokenizer with these keywords as defaults for rendering; the original isn't changed.

    Raises `TrimtabError` for keywords that the chat template doesn't use, or if there is no template.
    """
    if not template:
        return tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise TrimtabError(f"this tokenizer has no chat template that could use {', '.join(map(repr, template))}")
    check_keywords(tokenizer, template)
    other = copy.copy(tokenizer)
    other.apply_chat_template = partial(tokenizer.apply_chat_template, **template)
    return other


def preset_keywords(tokenizer: Any) -> dict[str, Any]:
    """The keywords that `with_keywords` has set, if any."""
    render = getattr(tokenizer, "apply_chat_template", None)
    return dict(render.keywords) if isinstance(render, partial) else {}


def parse_keywords(texts: list[str] | None) -> dict[str, Any]:
    """From the command line: `enable_thinking=false`, whose value is parsed as JSON if it is valid, else taken as text.

    Raises `TrimtabError` for anything without a name and a value, and for a name that occurs twice.
    """
    keywords: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise TrimtabError(f"--template {text!r} can't be read; write KEYWORD=VALUE, such as enable_thinking=false")
        if name.strip() in keywords:
            raise TrimtabError(f"--template gives {name.strip()!r} twice")
        try:
            keywords[name.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            if value.strip().lower() in ("true", "false"):
                value = value.strip().lower() == "true"  # type: ignore[assignment]
            keywords[name.strip()] = value
    return keywords
