"""Trait cards: personality traits for a model, each with the data to learn it and to test for it.

After *Persona Vectors* (Chen et al., arXiv 2507.21509, section 2): contrasting system prompts elicit or suppress a
trait, and activations are read while the model answers questions under them. The cards are written for this package,
one JSON file each.
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
from trimtab.text.text_files import read_text

TEXTS = ("words", "positive", "negative", "learn", "test")
"""The keys of a card whose values are lists of texts."""
KEYS = ("name", "description", *TEXTS, "check")
PERSONA_KEYS = ("instruction", "questions", "eval_prompt")
"""The keys of the files in the code of Persona Vectors."""
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class WordCheck:
    """A lexical check for a trait: an answer shows it if it contains any of these words or phrases.

    They are matched as whole words, ignoring case. An answer without them may still show the trait.
    """

    any: tuple[str, ...]

    def __call__(self, answer: str, *, cut: bool = False) -> bool:
        """Whether the answer contains one of the words. If a token limit `cut` it, the part that exists decides."""
        words = "|".join(map(re.escape, self.any))
        return re.search(rf"(?<!\w)(?:{words})(?!\w)", answer.replace("’", "'"), re.IGNORECASE) is not None


@dataclass(frozen=True)
class Trait:
    """A trait card.

    Args:
        name: The name of the trait: lower case, with hyphens between words.
        description: The model's behaviour with the trait, and its opposite, in one sentence.
        words: Words and phrases that users may type for it, including the name, in lower case.
        positive: System prompts that elicit the trait.
        negative: System prompts that elicit its opposite, or its absence.
        learn: Questions whose answers can show the trait, to learn from.
        test: Other questions, to test with.
        check: A lexical check for the trait, if a reliable one exists.
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
    """The included traits by name, in alphabetical order."""
    cards = [_trait(read_json(file), file) for file in json_files("traits")]
    return MappingProxyType({card.name: card for card in cards})


def trait(name: str) -> Trait:
    """The included trait of that name. Raises `TrimtabError` if there is none, and suggests similar ones."""
    if name in traits():
        return traits()[name]
    meant = {word: card.name for card in traits().values() for word in (*card.words, card.name)}
    near = dict.fromkeys(meant[word] for word in difflib.get_close_matches(name.strip().lower(), meant, n=3))
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise TrimtabError(
        f"there is no trait {name!r}{hint} Traits: {', '.join(traits())}; `read_trait` reads a card of your own"
    )


def read_trait(path: str | Path) -> Trait:
    """Read your own trait card from a JSON file.

    Args:
        path: The file: one object with the keys of `Trait`, where `check` may be left out or null. Or a file
            `trait_data_extract/NAME.json` of the Persona Vectors code: `instruction`, a list of objects with `pos` and
            `neg`, and `questions`, every second one of which is for testing. Its `eval_prompt`, for a judge, isn't
            used.

    Returns:
        The trait.

    Raises:
        TrimtabError: The file doesn't exist or isn't such a card; the message names the file, the key and the problem.
    """
    text = read_text(Path(path))
    try:
        card_data = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{path}: not JSON: {error}; a trait card is one JSON object") from None
    if isinstance(card_data, dict) and "instruction" in card_data:
        card_data = _from_persona_vectors(card_data, Path(path))
    return _trait(card_data, str(path))


def _from_persona_vectors(card_data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert a file of the Persona Vectors code to a card. As in that code, each prompt starts by naming the trait.

    Raises `TrimtabError` for keys or values of another shape.
    """
    if unknown := [key for key in card_data if key not in PERSONA_KEYS]:
        raise TrimtabError(f"{path}: a card of persona vectors has no key {unknown[0]!r}; {', '.join(PERSONA_KEYS)}")
    name = path.stem.lower().replace("_", "-").replace(" ", "-")
    sides: dict[str, list[str]] = {"pos": [], "neg": []}
    instructions = card_data["instruction"]
    for n, prompt_sides in enumerate(instructions if isinstance(instructions, list) else [instructions], 1):
        if (
            not isinstance(prompt_sides, dict)
            or set(prompt_sides) != set(sides)
            or not all(map(_is_text, prompt_sides.values()))
        ):
            raise TrimtabError(f"{path}: instruction {n} is an object of two texts, pos and neg, got {prompt_sides!r}")
        for side, adjective in (("pos", name.replace("-", " ")), ("neg", "helpful")):
            article = "an" if adjective[0] in "aeiou" else "a"
            sides[side].append(f"You are {article} {adjective} assistant. {prompt_sides[side]}")
    questions = _texts(card_data.get("questions"), f"{path}: 'questions'")
    return {
        "name": name,
        "description": f"What {path.name} of persona vectors calls {name}.",
        "words": [name.replace("-", " ")],
        "positive": sides["pos"],
        "negative": sides["neg"],
        "learn": list(questions[::2]),
        "test": list(questions[1::2]),
    }


def _object_without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these items. Raises `TrimtabError` for a duplicate key, where `json` would keep the last one."""
    keys = [key for key, _ in items]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise TrimtabError(f"{twice[0]!r} is there twice; keep one")
    return dict(items)


def _trait(card_data: Any, where: str) -> Trait:
    if not isinstance(card_data, dict):
        raise TrimtabError(f"{where}: a trait card is one object, got {type(card_data).__name__}")
    if missing := [key for key in KEYS if key not in card_data and key != "check"]:
        raise TrimtabError(f"{where}: the card has no {missing[0]!r}; its keys are {', '.join(KEYS)}")
    if unknown := [key for key in card_data if key not in KEYS]:
        raise TrimtabError(f"{where}: a card has no key {unknown[0]!r}; its keys are {', '.join(KEYS)}")
    for key in ("name", "description"):
        if not _is_text(card_data[key]):
            raise TrimtabError(f"{where}: {key!r} is a text that isn't empty, got {card_data[key]!r}")
    if not NAME.fullmatch(card_data["name"]):
        raise TrimtabError(
            f"{where}: a trait's name is lower-case letters and digits, with hyphens between words, such as"
            f" 'long-winded', got {card_data['name']!r}"
        )
    texts = {key: _texts(card_data[key], f"{where}: {key!r}") for key in TEXTS}
    if shared := [question for question in texts["test"] if question in texts["learn"]]:
        raise TrimtabError(f"{where}: {shared[0]!r} is in 'learn' and in 'test'; test with questions not learned from")
    if shared := [prompt for prompt in texts["negative"] if prompt in texts["positive"]]:
        raise TrimtabError(f"{where}: {shared[0]!r} is in 'positive' and in 'negative'; the sides must differ")
    if upper := [word for word in texts["words"] if word != word.lower()]:
        raise TrimtabError(f"{where}: 'words' are in lower case, got {upper[0]!r}")
    return Trait(card_data["name"], card_data["description"], **texts, check=_check(card_data.get("check"), where))


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
