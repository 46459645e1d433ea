"""Small data sets that are included in the package and written for it: base queries, instructions and traits.

The queries are plain requests of many kinds (questions, how-tos, short writing tasks, lists, explanations) that don't
mention the form of the answer. The instructions do only that and are appended to queries, each in several phrasings:
`instructions` are the few that the demo measures, `instruction_types` the 25 types of IFEval. The traits are
personality traits such as blunt or cheerful, each a card with system prompts and questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.data.find_trait import find_trait
from trimtab.data.read import read_json
from trimtab.data.recognise import Recognised, recognise
from trimtab.data.trait_cards import Trait, WordCheck, read_trait, trait, traits
from trimtab.data.types import (
    COMMON_LANGUAGES,
    LANGUAGES,
    InstructionType,
    instruction_type,
    instruction_types,
    length_phrasings,
)
from trimtab.text.pairs import Pair

__all__ = [
    "COMMON_LANGUAGES",
    "LANGUAGES",
    "SPLITS",
    "Instruction",
    "InstructionType",
    "Recognised",
    "Trait",
    "WordCheck",
    "find_trait",
    "instruction_pairs",
    "instruction_type",
    "instruction_types",
    "instructions",
    "length_phrasings",
    "prompts",
    "queries",
    "read_trait",
    "recognise",
    "trait",
    "traits",
]

SPLITS = ("learn", "tune", "test")


@dataclass(frozen=True)
class Instruction:
    """An instruction about the form of an answer: phrasings to learn from, and others to test with."""

    name: str
    learn: tuple[str, ...]
    test: tuple[str, ...]


def queries(split: str | None = None, *, more: bool = False) -> tuple[str, ...]:
    """The base queries of one of `SPLITS`, or of all of them. No query is in two splits.

    There are 112; `more` adds half as many after those of each split. Raises `KeyError` for an unknown split.
    """
    stored = read_json("queries.json")
    texts: list[str] = []
    for name in SPLITS if split is None else (split,):
        texts += stored[name] + (stored["more"][name] if more else [])
    return tuple(texts)


def instructions() -> dict[str, Instruction]:
    """The instructions by name."""
    stored = read_json("instructions.json")
    return {name: Instruction(name, tuple(entry["learn"]), tuple(entry["test"])) for name, entry in stored.items()}


def prompts(base: Sequence[str], phrasings: Sequence[str]) -> list[str]:
    """Each base query followed by a phrasing of the instruction; the phrasings alternate."""
    return [f"{query} {phrasings[i % len(phrasings)]}" for i, query in enumerate(base)]


def instruction_pairs(base: Sequence[str], phrasings: Sequence[str]) -> list[Pair]:
    """Pairs of prompts with and without the instruction, for `learn_instruct`."""
    with_it = prompts(base, phrasings)
    return [Pair(positive, negative, shape="prompts") for positive, negative in zip(with_it, base, strict=True)]
