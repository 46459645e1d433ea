"""A measure of repetition in a text."""

from __future__ import annotations

import re

EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf\u2b50\u2b55]")
UNIT = re.compile(rf"[^\W_]+|{EMOJI.pattern}")

REPEATED_LIMIT = 0.3
"""A text with a `repeated_share` above this counts as repetitive."""


def repeated_share(answer: str, n: int = 4) -> float:
    """The share of the answer's `n`-grams of words, numbers and emojis that occurred in it before, 0 … 1.

    0 for an answer without repetition or with fewer than `n` words; it approaches 1 for a text that repeats itself.
    """
    words = [word.lower() for word in UNIT.findall(answer)]
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
