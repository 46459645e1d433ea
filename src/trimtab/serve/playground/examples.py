"""Suggestions for a first visit: messages to click on, each with a steering whose effect is easy to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 3
OWN = {
    "bullets": "Tell me about the moon.",
    "sentence": "Why is the sky blue?",
    "json": "Give me tips for sleeping well.",
}
"""The steerings that are included in the package, and messages on which the default model follows them."""
ORDINARY = tuple(OWN.values())


@dataclass(frozen=True)
class Example:
    """A message and the steering for it; `""` for the chosen ones."""

    steering: str
    message: str

    @property
    def words(self) -> str:
        """The label of its button."""
        return f"{self.message} · with {self.steering}" if self.steering else self.message


def examples(names: Sequence[str]) -> list[Example]:
    """The examples for a user who may choose from these steerings; none if there are none."""
    own = [Example(name, message) for name, message in OWN.items() if name in names]
    if len(own) == len(OWN):
        return own
    return [Example(names[0], message) for message in ORDINARY] if names else []


def default_steering(names: Sequence[str]) -> str | None:
    """The steering that is chosen on a first visit."""
    offered = examples(names)
    return offered[0].steering if offered else None
