"""The textual form of positions, as on the command line and in requests: parsing and formatting.

    rule   = name, or name:argument:…      one of the words below
    factor = rule | ~factor | (any)        not; parentheses
    all    = factor & factor …
    any    = all | all …

A text argument is written without quotes and ends at the next ` | ` or ` & ` (with spaces around it) or at the end, or
it is a JSON string in double quotes. Use quotes for a text with a `)` inside parentheses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from trimtab.errors import TrimtabError
from trimtab.steering.meanings import AFTER, ANSWER, AT, KINDS, OUTSIDE_TOOLS, THINKING, Meaning
from trimtab.steering.positions import NAMED, Combined, Positions

NUMBERED: dict[str, Callable[..., Positions]] = {
    "opening": Positions.opening,
    "first": Positions.first_generated,
    "window": Positions.window,
    "span": Positions.span,
}
FORMS = (
    *NAMED, "opening:K", "first:K", "window:A:B", "span:A:B", "tokens:A,B",
    THINKING, ANSWER, f"{AFTER}:TEXT", f"{AT}:TEXT", OUTSIDE_TOOLS,
)  # fmt: skip
PLAIN = re.compile(r"[^\s\"()&|~:]+")
COMMA = r"\s*,(?!\s*-?\d+\s*(?:[,|&)]|$))"
"""A comma between the rules of a list. A comma before a lone number belongs to `tokens`."""
DEPTH = 16
"""The maximum nesting depth."""


def parse(text: str) -> Positions:
    """Parse positions. Raises `TrimtabError`, with the known forms, if the text can't be parsed."""
    (positions,) = _parse(text, _Parser(text))
    return positions


def parse_list(text: str) -> list[Positions]:
    """Parse several positions, separated by commas. Quote a text that contains a comma. Raises as `parse` does."""
    return _parse(text, _Parser(text, comma=COMMA))


def _parse(text: str, reader: _Parser) -> list[Positions]:
    rules: list[Positions] = []
    try:
        while not rules or reader.take(","):
            rules.append(reader.any_of())
        if reader.remaining or (len(rules) > 1 and not reader.comma):
            raise ValueError(f"{reader.remaining!r} is left over")
        return rules
    except TrimtabError as error:
        raise TrimtabError(f"positions {text!r}: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise TrimtabError(
            f"positions {text!r} are not known; use {', '.join(FORMS)}, or combine several with |, & and ~"
        ) from None


def format_rule(rule: Meaning | Combined) -> str:
    """The text of this rule, which `parse` reads."""
    if isinstance(rule, Meaning):
        return ":".join((rule.kind, *map(_quoted, rule.texts)))
    if rule.operator == "not":
        return f"~{_inner(rule.parts[0])}"
    return {"any": " | ", "all": " & "}[rule.operator].join(map(_inner, rule.parts))


def _inner(positions: Positions) -> str:
    text = str(positions)
    joined = isinstance(positions.rule, Combined) and positions.rule.operator != "not"
    return f"({text})" if joined or (positions.rule is None and " | " in text) else text


def _quoted(text: str) -> str:
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


class _Parser:
    """A parser that reads a text from left to right. `comma` is the pattern of a comma between rules, if allowed."""

    def __init__(self, text: str, comma: str = "") -> None:
        self.remaining = text.strip()
        self.comma = comma
        self.depth = 0
        self.bracketed = False

    def any_of(self) -> Positions:
        positions = self.all_of()
        while self.take("|"):
            positions = positions | self.all_of()
        return positions

    def all_of(self) -> Positions:
        positions = self.factor()
        while self.take("&"):
            positions = positions & self.factor()
        return positions

    def factor(self) -> Positions:
        self.depth += 1
        if self.depth > DEPTH:
            raise TrimtabError(f"they are nested more than {DEPTH} levels deep")
        if self.take("~"):
            positions = ~self.factor()
        elif self.take("("):
            outside, self.bracketed = self.bracketed, True
            positions, self.bracketed = self.any_of(), outside
            if not self.take(")"):
                raise ValueError("a bracket isn't closed")
        else:
            positions = self.rule()
        self.depth -= 1
        return positions

    def rule(self) -> Positions:
        name = re.match(r"[a-z][a-z-]*|", self.remaining)[0]  # type: ignore[index]
        self.remaining = self.remaining[len(name) :]
        texts: list[str] = []
        while self.remaining.startswith(":"):
            self.remaining = self.remaining[1:]
            texts.append(self._text(whole=name in (AFTER, AT)))
        self.remaining = self.remaining.lstrip()
        return _rule(name, texts)

    def _text(self, whole: bool) -> str:
        if self.remaining.startswith('"'):
            text, stop = json.JSONDecoder().raw_decode(self.remaining)
        else:
            ends = [r"\s+[|&]\s", r"\s*$", self.comma, "" if whole else ":", r"\s*[)]" if self.bracketed else ""]
            stop = re.search("|".join(filter(None, ends)), self.remaining).start()  # type: ignore[union-attr]
            text = self.remaining[:stop]
        self.remaining = self.remaining[stop:]
        return str(text)

    def take(self, sign: str) -> bool:
        if not self.remaining.startswith(sign):
            return False
        self.remaining = self.remaining[len(sign) :].lstrip()
        return True


def _rule(name: str, texts: Sequence[str]) -> Positions:
    if name in KINDS:
        return Positions(rule=Meaning(name, tuple(texts)))
    if name == "tokens":
        (listed,) = texts
        return Positions.tokens([int(number) for number in listed.split(",")])
    return NUMBERED[name](*map(int, texts)) if texts else NAMED[name]
