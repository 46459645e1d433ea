"""Warns about pairs in a file that can be learned from but look like mistakes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.keywords import caller_stacklevel

if TYPE_CHECKING:
    from trimtab.text.pairs import Pair

NOTHINGS = frozenset({"None", "null", "NULL", "N/A", "undefined"})
"""Texts that programs write for missing values, but that may be real answers."""
WARNING_SHARE = 0.1
"""The minimum share of duplicate pairs, or of pairs with escaped line breaks, for a warning."""


class DoubtfulPairsWarning(UserWarning):
    """Pairs that can be learned from, but may not be as intended."""


def warn_of_doubtful(pairs: Sequence[Pair], name: str) -> None:
    """Warns, with `DoubtfulPairsWarning`, of pairs that look like mistakes.

    These are duplicates, pairs that also occur with their sides exchanged, texts such as `None`, and escaped line
    breaks.
    """
    doubts = []
    count = Counter(
        (pair.prompt, pair.positive, pair.negative, pair.positive_system, pair.negative_system) for pair in pairs
    )
    if (duplicates := len(pairs) - len(count)) and duplicates >= WARNING_SHARE * len(pairs):
        doubts.append(f"{duplicates} of {len(pairs)} pairs are duplicates, and count again")
    swapped = sum(
        times
        for (prompt, positive, negative, *systems), times in count.items()
        if (prompt, negative, positive, *systems[::-1]) in count
    )
    if swapped:
        doubts.append(f"{swapped} of {len(pairs)} pairs also occur with their sides swapped, and cancel out")
    empty = sum(any(words in NOTHINGS for words in (pair.prompt, pair.positive, pair.negative)) for pair in pairs)
    if empty:
        doubts.append(f"{empty} of {len(pairs)} pairs contain a text such as 'None', perhaps from an empty cell")
    escaped = sum(_is_escaped(pair) for pair in pairs)
    if escaped and escaped >= WARNING_SHARE * len(pairs):
        doubts.append(rf"{escaped} of {len(pairs)} pairs contain \n as two characters instead of a line break")
    for doubt in doubts:
        warnings.warn(f"{name}: {doubt}", DoubtfulPairsWarning, stacklevel=caller_stacklevel())


def _is_escaped(pair: Pair) -> bool:
    """Whether it has line breaks written as `\\n`, as when typed into a table, and no real ones; code has both."""
    texts = [words for words in (pair.prompt, pair.positive, pair.negative) if isinstance(words, str)]
    return any("\\n" in text for text in texts) and not any("\n" in text for text in texts)
