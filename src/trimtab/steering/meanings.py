"""Meanings of generated tokens: part of the thinking, of the answer, after a text, or outside tool calls.

They are determined during generation. The meaning of a token depends on the text up to and including it, never on
later text, since the token is processed, and steered, before that exists.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError

THINKING, ANSWER, AFTER, AT, OUTSIDE_TOOLS = "thinking", "answer", "after", "at", "outside-tools"
KINDS = (THINKING, ANSWER, AFTER, AT, OUTSIDE_TOOLS)
LONGEST = 256
"""The maximum length of a text or marker, in characters."""
MOST = 16
"""The maximum number of texts of one meaning."""


@dataclass(frozen=True, order=True)
class Meaning:
    """One of `KINDS`, with its texts.

    `after` and `at` have one text. `thinking` and `answer` have the marker that opens thinking and the one that closes
    it. `outside-tools` has a flat sequence of pairs of markers, where an empty second one means "to the end of the
    answer". If these have no texts, the model's own markers are used.
    """

    kind: str
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TrimtabError(
                f"there are no positions {self.kind!r}; the kinds found by meaning are {', '.join(KINDS)}"
            )
        if not all(isinstance(text, str) and len(text) <= LONGEST for text in self.texts) or len(self.texts) > MOST:
            raise TrimtabError(
                f"{self.kind} takes at most {MOST} texts of at most {LONGEST} characters, got {self.texts!r}"
            )
        if self.kind in (AFTER, AT) and (len(self.texts) != 1 or not self.texts[0]):
            raise TrimtabError(f"{self.kind} needs one text that isn't empty: {self.kind}:TEXT")
        if self.kind in (THINKING, ANSWER) and self.texts and (len(self.texts) != 2 or not all(self.texts)):
            raise TrimtabError(f"{self.kind} needs both markers, {self.kind}:OPEN:CLOSE, or none")
        if self.kind == OUTSIDE_TOOLS and (len(self.texts) % 2 or not all(self.texts[::2])):
            raise TrimtabError(f"{self.kind} needs markers in pairs, {self.kind}:OPEN:CLOSE, or none")
