"""What a generated token is part of: the thinking, the answer, what follows a text, all but tool calls.

Which tokens these are is known as they are generated. A token counts by the text up to and with it, never by what comes
later, since it is read, and steered, before there is any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError

THINKING, ANSWER, AFTER, AT, OUTSIDE_TOOLS = "thinking", "answer", "after", "at", "outside-tools"
KINDS = (THINKING, ANSWER, AFTER, AT, OUTSIDE_TOOLS)
LONGEST = 256
"""Characters of a text or marker at most."""
MOST = 16
"""Texts of one meaning at most."""


@dataclass(frozen=True, order=True)
class Meaning:
    """One of `KINDS`, and the texts that it is about.

    `after` and `at` have one text. `thinking` and `answer` have the marker that opens thinking and the one that closes
    it, `outside-tools` has pairs of markers one after the other, where an empty second one means "to the end of the
    answer"; without any they are the model's own.
    """

    kind: str
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TrimtabError(f"there are no positions {self.kind!r}; by meaning there are {', '.join(KINDS)}")
        if not all(isinstance(text, str) and len(text) <= LONGEST for text in self.texts) or len(self.texts) > MOST:
            raise TrimtabError(
                f"{self.kind} is about texts of at most {LONGEST} characters, {MOST} of them, got {self.texts!r}"
            )
        if self.kind in (AFTER, AT) and (len(self.texts) != 1 or not self.texts[0]):
            raise TrimtabError(f"{self.kind} needs one text that isn't empty: {self.kind}:TEXT")
        if self.kind in (THINKING, ANSWER) and self.texts and (len(self.texts) != 2 or not all(self.texts)):
            raise TrimtabError(f"{self.kind} needs both markers, {self.kind}:OPEN:CLOSE, or none")
        if self.kind == OUTSIDE_TOOLS and (len(self.texts) % 2 or not all(self.texts[::2])):
            raise TrimtabError(f"{self.kind} needs markers in pairs, {self.kind}:OPEN:CLOSE, or none")
