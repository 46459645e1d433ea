"""Small data sets that come with the package, written for it: base queries, and instructions to put after them.

The queries are plain requests of many kinds (questions, how-tos, short writing tasks, lists, explanations) that
say nothing about the form of the answer. The instructions say just that, each in several phrasings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from trimtab.text.pairs import Pair

SPLITS = ("learn", "tune", "test")


@dataclass(frozen=True)
class Instruction:
    """An instruction about the form of an answer: phrasings to learn from, and others to test with."""

    name: str
    learn: tuple[str, ...]
    test: tuple[str, ...]


def queries(split: str | None = None) -> tuple[str, ...]:
    """The base queries of one of `SPLITS`, or all of them; no query is in two splits.

    Raises `KeyError` for any other split.
    """
    stored = _read("queries.json")
    return tuple(query for name in (SPLITS if split is None else (split,)) for query in stored[name])


def instructions() -> dict[str, Instruction]:
    """The instructions by name."""
    stored = _read("instructions.json")
    return {name: Instruction(name, tuple(one["learn"]), tuple(one["test"])) for name, one in stored.items()}


def prompts(base: Sequence[str], phrasings: Sequence[str]) -> list[str]:
    """Each base query with a phrasing of the instruction after it; the phrasings take turns."""
    return [f"{query} {phrasings[i % len(phrasings)]}" for i, query in enumerate(base)]


def instruction_pairs(base: Sequence[str], phrasings: Sequence[str]) -> list[Pair]:
    """Pairs of prompts with and without the instruction, as `learn_instruct` takes them."""
    with_it = prompts(base, phrasings)
    return [Pair(positive, negative, shape="prompts") for positive, negative in zip(with_it, base, strict=True)]


@cache
def _read(name: str) -> Any:
    return json.loads(files(__name__).joinpath(name).read_text(encoding="utf-8"))
