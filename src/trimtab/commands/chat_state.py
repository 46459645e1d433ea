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
    """What an answer was steered by, as it is shown and saved: a `Steered` without its tensors."""

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

    `answer_count` counts all answers, those taken back too: with a seed each gets one of its own, so that `/retry`
    gives another sample and the whole session can be repeated. `made` holds what `/make` made, on or not.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    steered: tuple[Steered, ...] = ()
    emphasized: tuple[str, ...] = ()
    compare: bool = False
    max_tokens: int = MAX_TOKENS
    temperature: float | None = None
    seed: int | None = None
    answer_count: int = 0
    made: tuple[Steered, ...] = ()
    images: tuple[str, ...] = ()  # files that the next question is about

    @property
    def next_seed(self) -> int | None:
        """The next answer's."""
        return None if self.seed is None else self.seed + self.answer_count

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The history and the question, without the system message."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            question_message = {"role": "user", "content": _content(turn.images, turn.question)}
            messages += [question_message, {"role": "assistant", "content": turn.answer.text}]
        return [*messages, {"role": "user", "content": _content(self.images, question)}]

    def steering(self) -> Steering | None:
        """All that is on, added up; `None` where nothing is."""
        acting = [steered.acting for steered in self.steered]
        return sum(acting[1:], acting[0]) if acting else None

    def find(self, name: str) -> Steered | None:
        """The steering that is on under this name."""
        return next((steered for steered in self.steered if steered.name == name), None)

    def put(self, steered: Steered) -> Conversation:
        """With this steering on, in place of the one that has its name."""
        if self.find(steered.name) is None:
            return replace(self, steered=(*self.steered, steered))
        return replace(self, steered=tuple(steered if other.name == steered.name else other for other in self.steered))

    def find_made(self, name: str) -> Steered | None:
        """What `/make` made under this name."""
        return next((steered for steered in self.made if steered.name == name), None)

    def with_made(self, steered: Steered) -> Conversation:
        """With this steering among those that were made, in place of the one that has its name, and on."""
        return replace(self.put(steered), made=(*(other for other in self.made if other.name != steered.name), steered))

    def in_file(self, name: str, file: Path) -> Conversation:
        """With what was made under this name in a file."""
        put = [
            tuple(
                replace(steered, file=str(file)) if steered.name == name and not steered.file else steered
                for steered in some
            )
            for some in (self.steered, self.made)
        ]
        return replace(self, steered=put[0], made=put[1])

    def without(self, name: str) -> Conversation:
        """With the steering of this name off."""
        return replace(self, steered=tuple(steered for steered in self.steered if steered.name != name))

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
        return replace(self, turns=(*self.turns, turn), answer_count=self.answer_count + 1, images=())

    def label(self) -> str:
        """What is on, in a few characters: `shout:2 rude:-0.5@9`."""
        return " ".join(_label(steered) for steered in self.steered)


def _content(images: tuple[str, ...], text: str) -> Any:
    return beside(images, text) if images else text


def _label(steered: Steered) -> str:
    layers = "" if steered.layers is None else f"@{','.join(map(str, steered.layers))}"
    return f"{steered.name}:{steered.strength:g}{layers}"


def on_record(steered: Steered) -> On:
    """A steering that is on, without its tensors."""
    from trimtab.files.steering_file import steering_digest

    return On(steered.name, steered.file, steered.strength, steered.layers_on, steering_digest(steered.steering))


def name_for(file: Path, steered: Sequence[Steered]) -> str:
    """The name of a file's steering: the file's, or its whole path where another file has that name already."""
    taken = any(steered.name == file.stem and steered.file != str(file) for steered in steered)
    return str(file) if taken else file.stem
