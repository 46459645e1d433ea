"""Emphasis in requests: phrases are located in the tokens of the prompt, and their keys are scaled.

A request specifies it with `extra_args={"emphasize": [...]}`, or over HTTP with the field `emphasize`: a list of
phrases, `{"text", "occurrence"}`, or `{"role", "index"}` for a whole message. All requests share one content, which is
sent to the workers once; the positions of each request's phrases are sent separately.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Positions, ScaleScores, Steering, emphasis
from trimtab.text.chat import Message, Template
from trimtab.text.spans import Emphasis, Part, Phrase, Span, find_spans_in_rendered

EMPHASIZED = "emphasize"
MAX_PHRASES = 16
"""The maximum number of phrases per request."""
PHRASE, PART = {"text", "occurrence"}, {"role", "index"}
METHOD = "directer"

_tokenizing = threading.Lock()


@dataclass(frozen=True)
class EmphasisRequest:
    """Phrases and whole messages of a prompt; messages can only be named if `messages` is known."""

    marks: tuple[Emphasis, ...]
    messages: Sequence[Message] | None = None
    template: Template | None = None


def parse_emphasis(wanted: Any, messages: Any = None, template: Template | None = None) -> EmphasisRequest:
    """The emphasis that a request asks for. Raises `TrimtabError` if it can't be parsed."""
    if isinstance(wanted, EmphasisRequest):
        return wanted
    items = [wanted] if isinstance(wanted, (str, Mapping)) else wanted
    if not isinstance(items, Sequence) or not 0 < len(items) <= MAX_PHRASES:
        raise TrimtabError(f"{EMPHASIZED} takes a list of 1 to {MAX_PHRASES} phrases, got {str(wanted)[:80]!r}")
    known = list(messages) if isinstance(messages, (list, tuple)) else None
    return EmphasisRequest(tuple(_parse_target(item) for item in items), known, template)


def _parse_target(item: Any) -> Emphasis:
    if isinstance(item, str):
        return Phrase(item)
    if isinstance(item, Mapping) and isinstance(item.get("text"), str) and set(item) <= PHRASE:
        number = item.get("occurrence")
        if number is None or _is_whole(number):
            return Phrase(item["text"], number)
    if isinstance(item, Mapping) and isinstance(item.get("role"), str) and set(item) <= PART:
        number = item.get("index", -1)
        if _is_whole(number):
            return Part(item["role"], number)
    raise TrimtabError(
        f'{EMPHASIZED} takes phrases, {{"text", "occurrence"}} or {{"role", "index"}}, got {str(item)[:80]!r}'
    )


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


@lru_cache
def content(layers: int) -> Steering:
    """The emphasis in a model with this many layers, at all tokens; requests restrict it to their spans."""
    return emphasis(ScaleScores(), [(0, 1)], range(layers), METHOD).at(Positions.all())


def emphasis_of_spans(spans: Sequence[Span], layers: int) -> Steering:
    """The emphasis of these spans."""
    return emphasis(ScaleScores(), spans, range(layers), METHOD)


def find(engine: Any, prompt: Any, wanted: EmphasisRequest) -> tuple[Span, ...]:
    """The token spans of the marks in a prompt, as rendered by vLLM's front end.

    Takes as long as tokenizing the prompt. Raises `TrimtabError` if a mark can't be located.
    """
    fields = prompt if isinstance(prompt, Mapping) else {}
    text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if not isinstance(text, str) or ids is None or fields.get("type", "token") != "token":
        raise UnsupportedError(f"{EMPHASIZED}: phrases can only be found in text prompts, not in token ids or images")
    with _tokenizing:
        return find_spans_in_rendered(
            _tokenizer(engine), text, ids, wanted.marks, messages=wanted.messages, template=wanted.template
        )


def _tokenizer(engine: Any) -> Any:
    """A copy of the tokenizer: a tokenizer raises if vLLM's threads modify it while it is in use."""
    try:
        return engine._trimtab_tokenizer
    except AttributeError:
        engine._trimtab_tokenizer = copy.deepcopy(engine.get_tokenizer())
        return engine._trimtab_tokenizer
