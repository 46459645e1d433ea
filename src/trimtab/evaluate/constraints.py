"""Checks, in code, that an answer has the requested form.

Each check is a function `check(answer, *, cut=False)` that returns a bool. `cut` says that a token limit stopped the
answer: then only the text so far is judged, and a missing end doesn't count against it. An empty answer passes no
check.
"""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

FENCE = re.compile(r"^```[ \t]*(?:json|JSON)?[ \t]*\n?(.*)$", re.DOTALL)
TITLE = re.compile(r"<<([^<>\n]+)>>")
BULLET = re.compile(r"^[ \t]*[*+•‣–-][ \t]+.*\w")
INDENTED = re.compile(r"^(?: {2,}|\t)\s*\S")
WORD = re.compile(r"[^\W\d_]+")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|approx|[A-Z](?:\.[A-Z])*)\.(?=\s+\S)")
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)")

GERMAN_WORDS = frozenset(
    WORD.findall(
        "aber alle als am auch auf aus bei bis da damit dann das dass dem den denn der des dich die dies diese diesem "
        "diesen dieser dieses dir doch du durch ein eine einem einen einer eines er es für gegen gibt haben hat ich "
        "ihr ihre ihrem ihren ihrer im indem ist ja jede jeder jedes kann kannst kein keine können mehr mein meine "
        "mit muss nach nicht noch nur ob oder ohne sein seine sehr sich sie sind soll sollte sondern um und uns unter "
        "viel viele vom von vor war waren weil wenn werden wie wir wird wo wurde zu zum zur zwischen über"
    )
)
"""German function words: articles, pronouns, prepositions, conjunctions and auxiliaries.

Those that are common in English too (`also`, `an`, `in`, `man`, `so`, `was`) are left out.
"""

OTHER_WORDS = frozenset(
    WORD.findall(
        "a and are as at be because been but by can could do does for from has have he her his how i if into is it "
        "its my not of on or our she should some such that the their them then there these they this those to we were "
        "what when which who with would you your "
        "con dans de el est et il la las les los non para per por pour que sono un una une y"
    )
)
"""Function words of English, and a few of French, Spanish and Italian, that don't occur in German."""

PLAIN_WORDS = OTHER_WORDS | set(
    WORD.findall(
        "advice best better describe difference does explain five four give good happens help important large list "
        "main make more name needs note people purpose recommend short small someone story suggest tell things three "
        "uses were what write"
    )
)
"""Words of a query that say what to do rather than what it is about."""

GERMAN_SHARE = 0.2


class Check(Protocol):
    """Checks that an answer has some form; `cut` if a token limit stopped it."""

    def __call__(self, answer: str, *, cut: bool = False) -> bool: ...


def is_json(answer: str, *, cut: bool = False) -> bool:
    """The whole answer is one JSON object or array, alone or in one code fence, with no text around it.

    A bare number or string is valid JSON too, but nobody who asks for JSON means it. For a `cut` answer, the text so
    far must be a non-empty prefix of valid JSON.
    """
    text = answer.strip()
    if fenced := FENCE.match(text):
        text, closed, after = fenced[1].partition("```")
        if after.strip() or not (closed or cut):
            return False
        cut = cut and not closed
    text = text.strip()
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text, parse_constant=_refuse)
        return True
    except ValueError:
        return cut and _begins_json(text)


def has_title(answer: str, *, cut: bool = False) -> bool:
    """The answer has a non-empty title on one line, in double angle brackets: `<<like this>>`."""
    return any(match.strip() for match in TITLE.findall(answer))


def is_german(answer: str, *, cut: bool = False) -> bool:
    """The answer is in German, as judged by its function words.

    It needs at least three words of `GERMAN_WORDS` (or half of a shorter answer), a fifth of all words, and three times
    as many as of `OTHER_WORDS`. This checks the language, not whether the sentences make sense.
    """
    words = [word.lower() for word in WORD.findall(answer)]
    german = sum(word in GERMAN_WORDS for word in words)
    other = sum(word in OTHER_WORDS for word in words)
    return german >= min(3, (len(words) + 1) / 2) and german >= GERMAN_SHARE * len(words) and german >= 3 * other


def count_bullets(answer: str) -> int:
    """The number of lines that begin with a bullet (`*`, `+`, `-`, `–`, `•` or `‣`)."""
    return sum(bool(BULLET.match(line)) for line in answer.splitlines())


def is_bullets(answer: str, *, cut: bool = False) -> bool:
    """The answer is a list of at least two bullet points and nothing else, and contains a word.

    Each line begins with a bullet (`*`, `+`, `-`, `–`, `•` or `‣`), or is indented under one that does. For a `cut`
    answer one bullet is enough, and its last line may be an empty bullet.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    if cut and len(lines) > 1 and lines[-1].strip() in {"*", "-", "+", "•"}:
        lines.pop()
    bullets = [bool(BULLET.match(line)) for line in lines]
    if not bullets or not bullets[0] or not WORD.search(answer):
        return False
    rest = all(bullet or INDENTED.match(line) for bullet, line in zip(bullets, lines, strict=True))
    return rest and sum(bullets) >= (1 if cut else 2)


def is_sentence(answer: str, *, cut: bool = False) -> bool:
    """The answer is exactly one complete sentence; a `cut` answer never passes.

    A sentence ends in `.`, `!` or `?` before a space or the end of the text; the periods of numbers (`3.5`), initials
    and a few abbreviations don't count. An answer with a line break fails.
    """
    text = ABBREVIATION.sub(lambda match: match[0].replace(".", ""), answer.strip())
    ends = list(SENTENCE_END.finditer(text))
    return not cut and len(ends) == 1 and ends[0].end() == len(text) and "\n" not in text


def is_capitals(answer: str, *, cut: bool = False) -> bool:
    """The answer has letters, all of them uppercase."""
    return answer.isupper()


CONSTRAINTS: dict[str, Check] = {
    "json": is_json,
    "title": has_title,
    "german": is_german,
    "bullets": is_bullets,
    "sentence": is_sentence,
    "capitals": is_capitals,
}


def on_topic(query: str, answer: str) -> bool:
    """The answer uses a word of the query that has four letters or more and isn't a function word.

    Only the first five letters are compared, so that `planting` matches `plants`. This catches answers that have the
    form but are about something else; it can't tell whether the content is right.
    """
    stems = {word.lower()[:5] for word in WORD.findall(query) if len(word) > 3 and word.lower() not in PLAIN_WORDS}
    return any(word.lower()[:5] in stems for word in WORD.findall(answer))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


LITERALS = ("true", "false", "null")


def _begins_json(text: str) -> bool:
    """Whether some continuation of the text is valid JSON."""
    stack: list[str] = []
    quoted = escaped = False
    for character in text:
        if quoted:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "{[":
            stack.append("}" if character == "{" else "]")
        elif character in "}]" and (not stack or stack.pop() != character):
            return False
    if not stack:
        return False  # it ended and was not valid
    tail = "".join(reversed(stack))
    return any(_is_valid_json(ending + tail) for ending in _endings(text, quoted, escaped))


def _endings(text: str, quoted: bool, escaped: bool) -> list[str]:
    """Ways to complete the value in which the text stopped, before its brackets are closed."""
    if quoted:
        if unicode := re.search(r"\\u[0-9a-fA-F]{0,3}$", text):
            text += "0" * (6 - len(unicode[0]))
        elif escaped:
            text += "n"
        return [text + '"', text + '":0']
    bare = text.rstrip()
    endings = [bare, bare + ":0", bare + "0", bare + '"":0']
    if bare.endswith(","):
        endings += [bare[:-1]]
    if word := re.search(r"[a-z]+$", bare):
        endings += [bare[: word.start()] + literal for literal in LITERALS if literal.startswith(word[0])]
    return endings


def _is_valid_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except ValueError:
        return False
    return True
