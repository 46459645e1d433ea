"""A conversation and what steers it, as plain data: each command gives a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.text.images import beside

if TYPE_CHECKING:
    from trimtab.engines.answer import Dose
    from trimtab.steering import Steering

MAX_TOKENS = 256


@dataclass(frozen=True)
class Steered:
    """A steering that is on, under its name: where it is from, how strong, and at which of its layers (`None`: all).

    `file` is empty for one that `/make` made and no file has yet.
    """

    name: str
    file: str
    steering: Steering
    strength: float = 1.0
    layers: tuple[int, ...] | None = None

    @property
    def acting(self) -> Steering:
        """What of it acts, as strong as it is to be."""
        return self.strength * (self.steering if self.layers is None else self.steering.only(self.layers))

    @property
    def layers_on(self) -> tuple[int, ...]:
        """The layers at which it acts."""
        return self.steering.layers if self.layers is None else self.layers


@dataclass(frozen=True)
class On:
    """What an answer was steered by, as it is told and saved: a `Steered` without its tensors."""

    name: str
    file: str
    strength: float
    layers: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Said:
    """One answer. `finish_reason` is `"stop"`, `"length"` or `"interrupted"`; `doses` is `None` if none is measured."""

    text: str
    finish_reason: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    edits: tuple[str, ...] = ()
    doses: tuple[Dose, ...] | None = ()

    @property
    def dose(self) -> float | None:
        """The largest dose of any site."""
        return None if self.doses is None else max((dose.ratio for dose in self.doses), default=0.0)


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and under which settings it was given; with `/compare` the unsteered answer as well."""

    question: str
    answer: Said
    system: str | None = None
    on: tuple[On, ...] = ()
    emphasized: tuple[str, ...] = ()
    seed: int | None = None
    unsteered: Said | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What was said, and the settings of the next answer.

    `asked` counts all answers, those taken back too: with a seed each gets one of its own, so that `/retry` gives
    another sample and the whole session can be repeated. `made` holds what `/make` made, on or not.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    steered: tuple[Steered, ...] = ()
    emphasized: tuple[str, ...] = ()
    compare: bool = False
    max_tokens: int = MAX_TOKENS
    temperature: float | None = None
    seed: int | None = None
    asked: int = 0
    made: tuple[Steered, ...] = ()
    images: tuple[str, ...] = ()  # files that the next question is about

    @property
    def next_seed(self) -> int | None:
        """The next answer's."""
        return None if self.seed is None else self.seed + self.asked

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The history and the question, without the system message."""
        found: list[dict[str, Any]] = []
        for turn in self.turns:
            asked = {"role": "user", "content": _content(turn.images, turn.question)}
            found += [asked, {"role": "assistant", "content": turn.answer.text}]
        return [*found, {"role": "user", "content": _content(self.images, question)}]

    def steering(self) -> Steering | None:
        """All that is on, added up; `None` where nothing is."""
        acting = [one.acting for one in self.steered]
        return sum(acting[1:], acting[0]) if acting else None

    def find(self, name: str) -> Steered | None:
        """The steering that is on under this name."""
        return next((one for one in self.steered if one.name == name), None)

    def put(self, steered: Steered) -> Conversation:
        """With this steering on, in place of the one that has its name."""
        if self.find(steered.name) is None:
            return replace(self, steered=(*self.steered, steered))
        return replace(self, steered=tuple(steered if one.name == steered.name else one for one in self.steered))

    def find_made(self, name: str) -> Steered | None:
        """What `/make` made under this name."""
        return next((one for one in self.made if one.name == name), None)

    def with_made(self, steered: Steered) -> Conversation:
        """With this steering among those that were made, in place of the one that has its name, and on."""
        return replace(self.put(steered), made=(*(one for one in self.made if one.name != steered.name), steered))

    def in_file(self, name: str, file: Path) -> Conversation:
        """With what was made under this name in a file."""
        put = [
            tuple(replace(one, file=str(file)) if one.name == name and not one.file else one for one in some)
            for some in (self.steered, self.made)
        ]
        return replace(self, steered=put[0], made=put[1])

    def without(self, name: str) -> Conversation:
        """With the steering of this name off."""
        return replace(self, steered=tuple(one for one in self.steered if one.name != name))

    def undone(self) -> Conversation:
        """Without its last turn. Raises `TrimtabError` if it has none."""
        self.last()
        return replace(self, turns=self.turns[:-1])

    def last(self) -> Turn:
        """Its last turn. Raises `TrimtabError` if it has none."""
        if not self.turns:
            raise TrimtabError("there is no question yet; type one")
        return self.turns[-1]

    def answered(self, turn: Turn) -> Conversation:
        """With one more turn."""
        return replace(self, turns=(*self.turns, turn), asked=self.asked + 1, images=())

    def label(self) -> str:
        """What is on, in a few characters: `shout:2 rude:-0.5@9`."""
        return " ".join(_label(one) for one in self.steered)


def _content(images: tuple[str, ...], text: str) -> Any:
    return beside(images, text) if images else text


def _label(one: Steered) -> str:
    layers = "" if one.layers is None else f"@{','.join(map(str, one.layers))}"
    return f"{one.name}:{one.strength:g}{layers}"


def told(one: Steered) -> On:
    """A steering that is on, without its tensors."""
    from trimtab.files.steering_file import steering_digest

    return On(one.name, one.file, one.strength, one.layers_on, steering_digest(one.steering))


def name_for(file: Path, steered: Sequence[Steered]) -> str:
    """The name of a file's steering: the file's, or its whole path where another file has that name already."""
    taken = any(one.name == file.stem and one.file != str(file) for one in steered)
    return str(file) if taken else file.stem
