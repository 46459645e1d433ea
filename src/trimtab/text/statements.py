"""Pairs up labelled statements, each true or false and in its own row.

Representation Engineering (Zou et al., 2310.01405) uses this format for facts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel

TRUE, FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")


class PairingWarning(UserWarning):
    """Single statements were put together into pairs."""


@dataclass(frozen=True)
class Statement:
    """A text (or an answer that is messages), whether it is labelled true, and its prompt and system prompts
    (`prompts`).

    `prompts` is the same for both statements of a pair.
    """

    text: Any
    label: bool
    prompts: tuple[Any, ...] = ()


def label_of(value: Any) -> bool:
    """A label as a boolean. Raises `TrimtabError` for anything but true and false, 1 and 0."""
    text = str(value).strip().lower()
    if text not in (*TRUE, *FALSE):
        raise TrimtabError(f"the label {value!r} is neither true nor false (or 1 nor 0)")
    return text in TRUE


def pair_up(statements: Sequence[Statement], name: str) -> list[tuple[Statement, Statement]]:
    """True statements, each with a false one that has the same prompts: the first with the first, and so on.

    Warns with `PairingWarning`, saying how they were paired and how many are left over. Raises `TrimtabError` if there
    are no pairs.
    """
    groups: dict[tuple[Any, ...], tuple[list[Statement], list[Statement]]] = {}
    for statement in statements:
        groups.setdefault(statement.prompts, ([], []))[0 if statement.label else 1].append(statement)
    pairs = [pair for true, false in groups.values() for pair in zip(true, false, strict=False)]
    count = sum(statement.label for statement in statements)
    if not pairs:
        alike = " of the same prompt" if len(groups) > 1 else ""
        raise TrimtabError(
            f"{name}: {count} statements are true and {len(statements) - count} false; a pair is one of each{alike}"
        )
    how = "in the order they come" if len(groups) == 1 else "in the order they come, under the same prompt"
    spare = len(statements) - 2 * len(pairs)
    left = f"; {spare} without a partner {'is' if spare == 1 else 'are'} left out" if spare else ""
    made = f"{len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'} made of {len(statements)} labelled statements"
    warnings.warn(
        f"{name}: {made}, a true one and a false one each, {how}{left}",
        PairingWarning,
        stacklevel=caller_stacklevel(),
    )
    return pairs
