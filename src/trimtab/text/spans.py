"""Phrases of a prompt to token positions.

The prompt is rendered to text, the phrase is looked up there, and the tokenizer's offsets say which tokens contain a
character of it. Token sequences are never searched for the phrase's tokens, since at its edges a phrase may be merged
with the adjacent text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import class_keywords
from trimtab.text.chat import (
    Message,
    Prompt,
    Template,
    checked_messages,
    encode,
    has_template,
    plain_tokens,
    render_messages,
)

Span = tuple[int, int]
CONTEXT = 40
MARK = "trimtab\u2060marks\u2060this"


@class_keywords
@dataclass(frozen=True)
class Phrase:
    """A text that occurs in the prompt: its occurrence number `occurrence` (from 0), or all of them."""

    text: str
    occurrence: int | None = None


@class_keywords
@dataclass(frozen=True)
class Pattern:
    """A regular expression, searched over the whole rendered prompt: one of its matches, or all of them."""

    regex: str
    occurrence: int | None = None


@class_keywords
@dataclass(frozen=True)
class Part:
    """The whole content of a chat message: message number `index` (from 0) among those of `role`; -1 is the last."""

    role: str = "system"
    index: int = -1


Emphasis = str | Phrase | Pattern | Part


@dataclass(frozen=True)
class Rendered:
    """A prompt as text, its token ids, and the characters `(start, stop)` of each token."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]


def render(
    tokenizer: Any,
    prompt: Prompt,
    *,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
) -> Rendered:
    """The prompt as rendered by `trimtab.text.chat.encode`, with its text and offsets.

    Raises `UnsupportedError` for a tokenizer without offsets, and whatever `encode` raises.
    """
    ids = encode(tokenizer, prompt, system=system, chat=chat, template=template)
    _check_fast(tokenizer)
    messages = _messages(tokenizer, prompt, system, chat)
    if messages is None:
        assert isinstance(prompt, str)
        text = prompt
        encoding = plain_tokens(tokenizer, text, return_offsets_mapping=True)
    else:
        text = render_messages(tokenizer, messages, template)
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    if list(encoding["input_ids"]) != ids:
        raise UnsupportedError(
            "the chat template's tokens differ from those of its text, so phrases can't be located in it"
        )
    return Rendered(text, tuple(ids), tuple((int(a), int(b)) for a, b in encoding["offset_mapping"]))


def find_spans(
    tokenizer: Any,
    prompt: Prompt,
    emphasis: Emphasis | Sequence[Emphasis],
    *,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
) -> tuple[Span, ...]:
    """The token positions `(start, stop)` of phrases in the rendered prompt, in order, with overlapping ones merged.

    A string is a `Phrase`, with all its occurrences. Raises `TrimtabError` for a phrase that isn't in the prompt
    (showing the closest match), an occurrence that doesn't exist, a malformed pattern, or a message that doesn't exist.
    """
    rendered = render(tokenizer, prompt, system=system, chat=chat, template=template)
    return _spans(tokenizer, rendered, emphasis, _messages(tokenizer, prompt, system, chat), template)


def find_spans_in_rendered(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    emphasis: Emphasis | Sequence[Emphasis],
    *,
    messages: Sequence[Message] | None = None,
    template: Template | None = None,
) -> tuple[Span, ...]:
    """`find_spans` in a prompt that another program has rendered: its text, and the token ids that the program made of
    it.

    With the `messages` that were rendered, a `Part` can be looked up. Raises `TrimtabError` as `find_spans` does, and
    if the text has other tokens, or the messages render to another text, than in that program.
    """
    _check_fast(tokenizer)
    for special in (False, True):
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        if list(encoding["input_ids"]) == list(ids):
            break
    else:
        raise TrimtabError("the prompt's tokens differ from those of its text, so phrases can't be located in it")
    phrases = [emphasis] if isinstance(emphasis, (str, Phrase, Pattern, Part)) else list(emphasis)
    if messages is not None and any(isinstance(mark, Part) for mark in phrases):
        messages = checked_messages(messages)
        if render_messages(tokenizer, messages, template) != text:
            raise TrimtabError("these messages render differently here than there; name a phrase of the message")
    offsets = tuple((int(a), int(b)) for a, b in encoding["offset_mapping"])
    known = None if messages is None else list(messages)
    return _spans(tokenizer, Rendered(text, tuple(ids), offsets), phrases, known, template)


def find_spans_with_images(
    tokenizer: Any, prompt: Sequence[Message], emphasis: Any, *, system: str | None, template: Template | None
) -> tuple[list[int], tuple[Span, ...]]:
    """For messages with images: the token ids of the chat template's text, and the positions of phrases in them.

    Raises as `find_spans` does.
    """
    _check_fast(tokenizer)
    messages: list[Message] = [
        {**message, "content": _without_pixels(message["content"])} for message in checked_messages(prompt, system)
    ]
    text = render_messages(tokenizer, messages, template)
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = list(encoding["input_ids"]), tuple((int(a), int(b)) for a, b in encoding["offset_mapping"])
    return ids, _spans(tokenizer, Rendered(text, tuple(ids), offsets), emphasis, messages, template)


def _without_pixels(content: Any) -> Any:
    """A message's content as the chat template needs it, with placeholders for the images."""
    if isinstance(content, str):
        return content
    return [part if part.get("type") == "text" else {"type": "image"} for part in content]


def _spans(
    tokenizer: Any,
    rendered: Rendered,
    emphasis: Emphasis | Sequence[Emphasis],
    messages: list[Message] | None,
    template: Template | None,
) -> tuple[Span, ...]:
    if not isinstance(emphasis, (str, Phrase, Pattern, Part, Sequence)):
        raise TrimtabError(f"expected a phrase of the prompt, or several, got {emphasis!r}")
    phrases = [emphasis] if isinstance(emphasis, (str, Phrase, Pattern, Part)) else list(emphasis)
    if not phrases:
        raise TrimtabError("there is no phrase to emphasize; give at least one")
    characters: list[Span] = []
    for phrase in phrases:
        if isinstance(phrase, Part):
            characters.append(_part(tokenizer, rendered, messages, phrase, template))
        else:
            characters += _find_phrase(rendered.text, phrase)
    return _join([_tokens(rendered, start, stop) for start, stop in characters])


def _check_fast(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError("this tokenizer can't map tokens to characters; load its fast version")


def _find_phrase(text: str, phrase: str | Phrase | Pattern) -> list[Span]:
    if isinstance(phrase, str):
        phrase = Phrase(phrase)
    if isinstance(phrase, Phrase):
        if not isinstance(phrase.text, str) or not phrase.text.strip():
            raise TrimtabError(f"a phrase to emphasize is a text that isn't empty, got {phrase.text!r}")
        what, places = repr(phrase.text), [m.span() for m in re.finditer(re.escape(phrase.text), text)]
        if not places:
            raise TrimtabError(f"the phrase {what} isn't in the prompt; {_closest(text, phrase.text)}")
    else:
        what = f"pattern {phrase.regex!r}"
        try:
            places = [m.span() for m in re.finditer(phrase.regex, text) if m.end() > m.start()]
        except re.error as error:
            raise TrimtabError(f"{what} isn't a regular expression: {error}") from None
        if not places:
            raise TrimtabError(f"the {what} matches nothing in the prompt, which is {_shorten(text)!r}")
    if phrase.occurrence is None:
        return places
    if not 0 <= phrase.occurrence < len(places):
        count = f"{len(places)} time{'s' * (len(places) > 1)}"
        raise TrimtabError(f"{what} occurs {count} in the prompt; there is no occurrence {phrase.occurrence} (from 0)")
    return [places[phrase.occurrence]]


def _tokens(rendered: Rendered, start: int, stop: int) -> Span:
    """The tokens that contain a character of `start` to `stop`."""
    inside = [i for i, (a, b) in enumerate(rendered.offsets) if a < stop and b > start]
    if not inside:
        raise TrimtabError(f"no token contains {rendered.text[start:stop]!r}; emphasize more of the prompt")
    return inside[0], inside[-1] + 1


def _join(spans: list[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _part(
    tokenizer: Any, rendered: Rendered, messages: list[Message] | None, part: Part, template: Template | None
) -> Span:
    """The characters of a message's content, located by rendering a mark in its place."""
    if messages is None:
        raise TrimtabError(f"the prompt is plain text and has no {part.role} message; name a phrase of it")
    numbers = [i for i, message in enumerate(messages) if message["role"] == part.role]
    try:
        number = numbers[part.index]
    except IndexError:
        roles = ", ".join(message["role"] for message in messages)
        raise TrimtabError(f"there is no {part.role} message number {part.index}; the messages are {roles}") from None
    if not isinstance(messages[number]["content"], str):
        raise TrimtabError(f"the {part.role} message has parts; name a phrase of it")
    marked = [{**m, "content": MARK} if i == number else m for i, m in enumerate(messages)]
    start = render_messages(tokenizer, marked, template).find(MARK)
    for content in (messages[number]["content"], messages[number]["content"].strip()):
        if content and start >= 0 and rendered.text[start : start + len(content)] == content:
            return start, start + len(content)
    raise TrimtabError(f"the chat template changes the {part.role} message's content; name a phrase of it")


def _messages(tokenizer: Any, prompt: Prompt, system: str | None, chat: bool | None) -> list[Message] | None:
    """The messages to render, as assembled by `encode`; `None` for plain text."""
    if isinstance(prompt, str):
        if not (has_template(tokenizer) if chat is None else chat):
            return None
        prompt = [{"role": "user", "content": prompt}]
    opening: list[Mapping[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, *prompt]


def _closest(text: str, phrase: str) -> str:
    """The part of the text that is most similar to the phrase, with its context."""
    match = SequenceMatcher(None, text.lower(), phrase.lower(), autojunk=False).find_longest_match()
    if not match.size:
        return f"nothing similar is in {_shorten(text)!r}"
    start = max(0, match.a - match.b)
    stop = min(len(text), start + len(phrase))
    before, after = text[max(0, start - CONTEXT) : start], text[stop : stop + CONTEXT]
    return f"the closest is {text[start:stop]!r}, in {before + '»' + text[start:stop] + '«' + after!r}"


def _shorten(text: str) -> str:
    return text if len(text) <= 4 * CONTEXT else f"{text[: 2 * CONTEXT]} … {text[-2 * CONTEXT :]}"
