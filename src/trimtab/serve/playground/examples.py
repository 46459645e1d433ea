"""What a first visit proposes: messages to click on, each with a steering that shows on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 3
OWN = {
    "bullets": "Tell me about the moon.",
    "sentence": "Why is the sky blue?",
    "json": "Give me tips for sleeping well.",
}
"""The steerings that come with the package, and messages on which the default model follows them."""
ORDINARY = tuple(OWN.values())


@dataclass(frozen=True)
class Example:
    """A message, and the steering to ask it with; `""` for what is chosen."""

    steering: str
    message: str

    @property
    def words(self) -> str:
        """What its button says."""
        return f"{self.message} · with {self.steering}" if self.steering else self.message


def examples(names: Sequence[str]) -> list[Example]:
    """For somebody who may choose from these steerings; none where there are none."""
    own = [Example(name, message) for name, message in OWN.items() if name in names]
    if len(own) == len(OWN):
        return own
    return [Example(names[0], message) for message in ORDINARY] if names else []


def first(names: Sequence[str]) -> str | None:
    """The steering that is chosen on a first visit."""
    offered = examples(names)
    return offered[0].steering if offered else None
