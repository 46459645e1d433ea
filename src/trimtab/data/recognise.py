"""Recognize the type of an instruction: by an exact phrasing, or by a similar one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from trimtab.data.read import read_json
from trimtab.data.types import (
    ALIASES,
    LANGUAGES,
    InstructionType,
    Parameter,
    Value,
    instruction_type,
    instruction_types,
)

LIKENESS = 0.7
"""The minimum similarity of a sentence to a phrasing of a type: the `difflib` ratio of their words, or the share of
words that they have in common in any order."""

NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: i for i, word in enumerate(NUMBER_WORDS, 1)}
RELATIONS = {
    "at least": "at least",
    "no fewer than": "at least",
    "no less than": "at least",
    "less than": "less than",
    "fewer than": "less than",
}
PATTERNS = {
    "number": rf"\d+|{'|'.join(NUMBERS)}",
    "relation": "|".join(RELATIONS),
    "language": "|".join(name.lower() for name in LANGUAGES),
    "letter": "[^\\W\\d_]",
    "text": ".+?",
}
QUOTED = re.compile(r"[\"“”«»]([^\"“”«»]+)[\"“”«»]")
POSTSCRIPT = re.compile(r"P\.(?:P\.)?S\.?")
PLACEHOLDER = "_"


@dataclass(frozen=True)
class Recognised:
    """The type of a sentence, the values of its parameters, and the similarity of the nearest phrasing (1: exact)."""

    type: InstructionType
    values: dict[str, Value] = field(default_factory=dict)
    likeness: float = 1.0

    @property
    def exact(self) -> bool:
        return self.likeness == 1.0


def recognise(sentence: str) -> Recognised | None:
    """The type of the sentence; `None` if no phrasing is similar, or the value of a parameter is missing."""
    for name, (kind, values) in ALIASES.items():
        phrasings = read_json("instructions.json")[name]["learn"]
        if _normalize(sentence).casefold() in (_normalize(phrasing).casefold() for phrasing in phrasings):
            return Recognised(instruction_type(kind), dict(values))
    types = instruction_types().values()
    exact = [match for kind in types if (match := _match_exactly(kind, sentence))]
    if exact:
        # "Write 3 sections" also matches phrasings with a text parameter; take the one with the fewest of these
        return min(exact, key=lambda candidate: sum(p.kind == "text" for p in candidate.type.parameters))
    ranked = sorted(
        ((_likeness(sentence, template), kind.name, kind) for kind in types for template in kind.learn + kind.test),
        key=lambda candidate: (-candidate[0], candidate[1]),
    )
    likeness, _, nearest = ranked[0]
    values = _values(nearest, sentence)
    if likeness < LIKENESS or len(values) < len(nearest.parameters):
        return None
    return Recognised(nearest, values, min(likeness, 0.999))


def _match_exactly(kind: InstructionType, sentence: str) -> Recognised | None:
    by_name = {p.name: p for p in kind.parameters}
    for template in kind.learn + kind.test:
        if match := re.fullmatch(_pattern(template, by_name), _normalize(sentence), re.IGNORECASE):
            return Recognised(kind, {name: _value(by_name[name], text) for name, text in match.groupdict().items()})
    return None


def _pattern(template: str, by_name: dict[str, Parameter]) -> str:
    pieces, seen = [], set()
    for literal, name in _pieces(template):
        pieces.append(re.escape(literal).replace('"', '["“”]?'))
        if name and name in seen:
            pieces.append(f"(?P={name})")
        elif name:
            seen.add(name)
            pieces.append(f"(?P<{name}>{PATTERNS[by_name[name].kind]})")
    return "".join(pieces)


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """The template's literal parts, each with the name of the placeholder after it."""
    parts = re.split(r"\{(\w+)\}", _normalize(template))
    for i in range(0, len(parts), 2):
        yield parts[i], parts[i + 1] if i + 1 < len(parts) else None


def _normalize(text: str) -> str:
    """The text without final punctuation (`.` or `!`) and repeated spaces."""
    text = " ".join(text.split())
    return text if POSTSCRIPT.search(text[-6:]) else text.rstrip(".!")


def _value(parameter: Parameter, text: str) -> Value:
    text = text.strip()
    if parameter.kind == "number":
        return NUMBERS[text.lower()] if text.lower() in NUMBERS else int(text)
    if parameter.kind == "relation":
        return RELATIONS[text.lower()]
    if parameter.kind == "language":
        return next(name for name in LANGUAGES if name.lower() == text.lower())
    return text.strip('"“”«»')


def _likeness(sentence: str, template: str) -> float:
    mine, theirs = _words(sentence), _words(re.sub(r"\{\w+\}", PLACEHOLDER, template))
    in_order = SequenceMatcher(None, mine, theirs, autojunk=False).ratio()
    common = sum((Counter(mine) & Counter(theirs)).values())
    return max(in_order, 2 * common / max(1, len(mine) + len(theirs)))


def _words(text: str) -> list[str]:
    """The lower-case words, with a placeholder for each number, relation, language and quotation."""
    text = QUOTED.sub(PLACEHOLDER, text)
    for kind in ("relation", "number", "language"):
        text = re.sub(rf"\b(?:{PATTERNS[kind]})\b", PLACEHOLDER, text, flags=re.IGNORECASE)
    return re.findall(r"\w+|[<>*#]+", text.lower())


def _values(kind: InstructionType, sentence: str) -> dict[str, Value]:
    """The values of the type's parameters, taken from the sentence in order; those without a candidate are missing."""
    by_kind: dict[str, list[str]] = {
        name: [
            m[0] for m in re.finditer(rf"\b(?:{PATTERNS[name]})\b", QUOTED.sub(PLACEHOLDER, sentence), re.IGNORECASE)
        ]
        for name in ("number", "relation", "language")
    }
    by_kind["text"] = QUOTED.findall(sentence) or POSTSCRIPT.findall(sentence)
    by_kind["letter"] = [text for text in by_kind["text"] if len(text) == 1]
    values: dict[str, Value] = {}
    for parameter in kind.parameters:
        if by_kind[parameter.kind]:
            values[parameter.name] = _value(parameter, by_kind[parameter.kind].pop(0))
    return values
