"""What about the pairs of a file is perhaps not meant, though they can be learned from."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.keywords import outside

if TYPE_CHECKING:
    from trimtab.text.pairs import Pair

NOTHINGS = frozenset({"None", "null", "NULL", "N/A", "undefined"})
"""What programs write for a value that isn't there, and what may be an answer all the same."""
MANY = 0.1
"""From this share on, it is worth a word that pairs are there twice."""


class DoubtfulPairsWarning(UserWarning):
    """Pairs that can be learned from, and perhaps aren't as they were meant."""


def warn_of_doubtful(pairs: Sequence[Pair], name: str) -> None:
    """Warns, with `DoubtfulPairsWarning`, of pairs that are there twice, or turned round, and of `None` as text."""
    doubts = []
    count = Counter(
        (pair.prompt, pair.positive, pair.negative, pair.positive_system, pair.negative_system) for pair in pairs
    )
    if (more := len(pairs) - len(count)) and more >= MANY * len(pairs):
        doubts.append(f"{more} of {len(pairs)} pairs are there already, and count again")
    turned = sum(
        times
        for (prompt, positive, negative, *systems), times in count.items()
        if (prompt, negative, positive, *systems[::-1]) in count
    )
    if turned:
        doubts.append(f"{turned} of {len(pairs)} pairs are there with their sides exchanged, too, and cancel out")
    empty = sum(any(words in NOTHINGS for words in (pair.prompt, pair.positive, pair.negative)) for pair in pairs)
    if empty:
        doubts.append(f"{empty} of {len(pairs)} pairs hold a text such as 'None', perhaps of an empty cell")
    escaped = sum(_is_escaped(pair) for pair in pairs)
    if escaped and escaped >= MANY * len(pairs):
        doubts.append(rf"{escaped} of {len(pairs)} pairs hold \n as two characters, and no line break")
    for doubt in doubts:
        warnings.warn(f"{name}: {doubt}", DoubtfulPairsWarning, stacklevel=outside())


def _is_escaped(pair: Pair) -> bool:
    """Whether line breaks are written out in it, as in a table that somebody typed; code has real ones as well."""
    texts = [words for words in (pair.prompt, pair.positive, pair.negative) if isinstance(words, str)]
    return any("\\n" in text for text in texts) and not any("\n" in text for text in texts)
