"""Trait cards: ways for a model to be, each with what it takes to learn the trait and to see whether it shows.

After *Persona Vectors* (Chen et al., arXiv 2507.21509, section 2): opposite system prompts bring a trait about, and it
is read where the model answers questions under them. The cards are written for this package, one JSON file each.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trimtab.data.read import json_files, read_json
from trimtab.errors import TrimtabError
from trimtab.text.read import read_text

TEXTS = ("words", "positive", "negative", "learn", "test")
"""The keys of a card that hold lists of texts."""
KEYS = ("name", "description", *TEXTS, "check")
PERSONA_KEYS = ("instruction", "questions", "eval_prompt")
"""The keys of the persona vectors code's files."""
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class WordCheck:
    """A lexical sign of a trait: an answer shows it if it has any of these words or phrases.

    They count as whole words, whatever their case. An answer without them may show the trait nevertheless.
    """

    any: tuple[str, ...]

    def __call__(self, answer: str, *, cut: bool = False) -> bool:
        """Whether the answer shows the sign. Where a token limit `cut` it, what is there decides."""
        words = "|".join(map(re.escape, self.any))
        return re.search(rf"(?<!\w)(?:{words})(?!\w)", answer.replace("’", "'"), re.IGNORECASE) is not None


@dataclass(frozen=True)
class Trait:
    """A trait card.

    Args:
        name: What the trait is called: lower case, with hyphens between words.
        description: What the model is like, and what its opposite is, in one sentence.
        words: What somebody may type to mean it, the name among them, in lower case.
        positive: System prompts that bring the trait about.
        negative: System prompts that bring about its opposite, or its plain absence.
        learn: Questions on which the trait can show, to learn from.
        test: Others, to see whether what was learned holds.
        check: A lexical sign of the trait, where there is an honest one.
    """

    name: str
    description: str
    words: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    learn: tuple[str, ...]
    test: tuple[str, ...]
    check: WordCheck | None = None


@cache
def traits() -> Mapping[str, Trait]:
    """The traits that come with the package by name, in order of their names."""
    cards = [_trait(read_json(file), file) for file in json_files("traits")]
    return MappingProxyType({card.name: card for card in cards})


def trait(name: str) -> Trait:
    """The trait of that name. Raises `TrimtabError` when there is none; it suggests traits that may be meant."""
    if name in traits():
        return traits()[name]
    meant = {word: card.name for card in traits().values() for word in (*card.words, card.name)}
    near = dict.fromkeys(meant[word] for word in difflib.get_close_matches(name.strip().lower(), meant, n=3))
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise TrimtabError(
        f"there is no trait {name!r}{hint} Traits: {', '.join(traits())}; `read_trait` reads a card of your own"
    )


def read_trait(path: str | Path) -> Trait:
    """A trait card of one's own, from a JSON file.

    Args:
        path: The file: one object with the keys of `Trait`. `check` may be left out or null. Or the persona vectors
            code's `trait_data_extract/NAME.json`: `instruction`, a list of `pos` and `neg`, and `questions`, of which
            every second one is for testing; its `eval_prompt` is for a judge, and isn't used.

    Raises:
        TrimtabError: There is no such file, or it holds no such card; the error names the file, the key and what is
            wrong with it.
    """
    text = read_text(Path(path))
    try:
        stored = json.loads(text, object_pairs_hook=_once)
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{path}: not JSON: {error}; a trait card is one JSON object") from None
    if isinstance(stored, dict) and "instruction" in stored:
        stored = _from_persona_vectors(stored, Path(path))
    return _trait(stored, str(path))


def _from_persona_vectors(stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """A card of what the persona vectors code has of a trait; there, too, the trait is named before each instruction.

    Raises `TrimtabError` for keys or values of another shape.
    """
    if unknown := [key for key in stored if key not in PERSONA_KEYS]:
        raise TrimtabError(f"{path}: a card of persona vectors has no key {unknown[0]!r}; {', '.join(PERSONA_KEYS)}")
    name = path.stem.lower().replace("_", "-").replace(" ", "-")
    sides: dict[str, list[str]] = {"pos": [], "neg": []}
    instructions = stored["instruction"]
    for n, both in enumerate(instructions if isinstance(instructions, list) else [instructions], 1):
        if not isinstance(both, dict) or set(both) != set(sides) or not all(map(_is_text, both.values())):
            raise TrimtabError(f"{path}: instruction {n} is an object of two texts, pos and neg, got {both!r}")
        for side, called in (("pos", name.replace("-", " ")), ("neg", "helpful")):
            article = "an" if called[0] in "aeiou" else "a"
            sides[side].append(f"You are {article} {called} assistant. {both[side]}")
    questions = _texts(stored.get("questions"), f"{path}: 'questions'")
    return {
        "name": name,
        "description": f"What {path.name} of persona vectors calls {name}.",
        "words": [name.replace("-", " ")],
        "positive": sides["pos"],
        "negative": sides["neg"],
        "learn": list(questions[::2]),
        "test": list(questions[1::2]),
    }


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these items, in which no key is twice; `json` would keep the last and drop the others."""
    keys = [key for key, _ in items]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise TrimtabError(f"{twice[0]!r} is there twice; keep one")
    return dict(items)


def _trait(stored: Any, where: str) -> Trait:
    if not isinstance(stored, dict):
        raise TrimtabError(f"{where}: a trait card is one object, got {type(stored).__name__}")
    if missing := [key for key in KEYS if key not in stored and key != "check"]:
        raise TrimtabError(f"{where}: the card has no {missing[0]!r}; its keys are {', '.join(KEYS)}")
    if unknown := [key for key in stored if key not in KEYS]:
        raise TrimtabError(f"{where}: a card has no key {unknown[0]!r}; its keys are {', '.join(KEYS)}")
    for key in ("name", "description"):
        if not _is_text(stored[key]):
            raise TrimtabError(f"{where}: {key!r} is a text that isn't empty, got {stored[key]!r}")
    if not NAME.fullmatch(stored["name"]):
        raise TrimtabError(
            f"{where}: a trait's name is lower-case letters and digits, with hyphens between words, such as"
            f" 'long-winded', got {stored['name']!r}"
        )
    texts = {key: _texts(stored[key], f"{where}: {key!r}") for key in TEXTS}
    if both := [question for question in texts["test"] if question in texts["learn"]]:
        raise TrimtabError(f"{where}: {both[0]!r} is in 'learn' and in 'test'; test with questions not learned from")
    if both := [prompt for prompt in texts["negative"] if prompt in texts["positive"]]:
        raise TrimtabError(f"{where}: {both[0]!r} is in 'positive' and in 'negative'; the sides must differ")
    if upper := [word for word in texts["words"] if word != word.lower()]:
        raise TrimtabError(f"{where}: 'words' are in lower case, got {upper[0]!r}")
    return Trait(stored["name"], stored["description"], **texts, check=_check(stored.get("check"), where))


def _texts(texts: Any, where: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
        raise TrimtabError(f"{where} is a list of texts, none of them empty, got {texts!r}")
    if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
        raise TrimtabError(f"{where} has {twice[0]!r} twice; keep one")
    return tuple(texts)


def _check(check: Any, where: str) -> WordCheck | None:
    if check is None:
        return None
    if not isinstance(check, dict) or set(check) != {"any"}:
        raise TrimtabError(f"{where}: 'check' is null or {{\"any\": [words]}}, got {check!r}")
    return WordCheck(_texts(check["any"], f"{where}: 'any' of 'check'"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
