"""A conversation with two sides, one unsteered and one steered. Each side continues from its own answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.serve.playground.request_group import RequestGroup, Side
from trimtab.text.chat import Message


@dataclass
class Turn:
    """A message, its emphasized phrases, and both answers."""

    text: str
    phrases: tuple[str, ...] = ()
    plain: Side = field(default_factory=Side)
    steered: Side = field(default_factory=Side)


@dataclass
class Conversation:
    """The whole conversation. `running` is what is being answered; `number` counts the messages sent.

    `moves` is the number of the latest known move of a slider. `names` are the steerings to choose from; `None` until
    the page knows them.
    """

    turns: list[Turn] = field(default_factory=list)
    running: RequestGroup | None = None
    number: int = 0
    moves: int = 0
    names: tuple[str, ...] | None = None

    def history(self, *, steered: bool, before: int | None = None) -> list[Message]:
        """The messages of one side, up to a turn."""
        messages: list[Message] = []
        for turn in self.turns[:before]:
            side = turn.steered if steered else turn.plain
            messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": side.text}]
        return messages

    def begin(self, group: RequestGroup) -> int:
        """Start a new run, and cancel the one in progress. Returns a number that identifies the new run."""
        self.stop()
        self.running = group
        self.number += 1
        return self.number

    def stop(self) -> None:
        """Cancel what is being answered."""
        if self.running is not None:
            self.running.stop()
            self.running = None
