"""A conversation and its steering as immutable data: each command returns a new conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.text.images import image_content

if TYPE_CHECKING:
    from trimtab.engines.answer import Dose
    from trimtab.steering import Steering

MAX_TOKENS = 256


@dataclass(frozen=True)
class NamedSteering:
    """A steering that is on, under its name: its file, its strength, and the layers at which it acts (`None`: all).

    `file` is empty for a steering that `/make` made and that hasn't been saved.
    """

    name: str
    file: str
    steering: Steering
    strength: float = 1.0
    layers: tuple[int, ...] | None = None

    @property
    def effective_steering(self) -> Steering:
        """The steering restricted to its layers and multiplied by its strength."""
        return self.strength * (self.steering if self.layers is None else self.steering.only(self.layers))

    @property
    def layers_on(self) -> tuple[int, ...]:
        """The layers at which it acts."""
        return self.steering.layers if self.layers is None else self.layers


@dataclass(frozen=True)
class SteeringRecord:
    """A record of a steering behind an answer, for display and for files: a `NamedSteering` without its tensors."""

    name: str
    file: str
    strength: float
    layers: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class ChatAnswer:
    """One answer. `finish_reason` is `"stop"`, `"length"` or `"interrupted"`; `doses` is `None` if not measured."""

    text: str
    finish_reason: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    edits: tuple[str, ...] = ()
    doses: tuple[Dose, ...] | None = ()

    @property
    def dose(self) -> float | None:
        """The largest dose of any site; `None` if doses weren't measured."""
        return None if self.doses is None else max((dose.ratio for dose in self.doses), default=0.0)


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and the settings; with `/compare` also the unsteered answer."""

    question: str
    answer: ChatAnswer
    system: str | None = None
    steerings: tuple[SteeringRecord, ...] = ()
    emphasized: tuple[str, ...] = ()
    seed: int | None = None
    unsteered: ChatAnswer | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The history, and the settings for the next answer.

    `answer_count` counts all answers, including undone ones: with a seed, each answer gets its own, so that `/retry`
    gives another sample and the whole session can be repeated. `made_steerings` holds what `/make` made, on or not.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    active_steerings: tuple[NamedSteering, ...] = ()
    emphasized: tuple[str, ...] = ()
    compare: bool = False
    max_tokens: int = MAX_TOKENS
    temperature: float | None = None
    seed: int | None = None
    answer_count: int = 0
    made_steerings: tuple[NamedSteering, ...] = ()
    images: tuple[str, ...] = ()  # image files for the next question

    @property
    def next_seed(self) -> int | None:
        """The seed of the next answer."""
        return None if self.seed is None else self.seed + self.answer_count

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The history and the question, without the system message."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            question_message = {"role": "user", "content": _content(turn.images, turn.question)}
            messages += [question_message, {"role": "assistant", "content": turn.answer.text}]
        return [*messages, {"role": "user", "content": _content(self.images, question)}]

    def steering(self) -> Steering | None:
        """The sum of all steerings that are on; `None` if there are none."""
        acting = [steered.effective_steering for steered in self.active_steerings]
        return sum(acting[1:], acting[0]) if acting else None

    def find(self, name: str) -> NamedSteering | None:
        """The steering that is on under this name."""
        return next((steered for steered in self.active_steerings if steered.name == name), None)

    def with_steering(self, steered: NamedSteering) -> Conversation:
        """The conversation with this steering on; it replaces one of the same name."""
        if self.find(steered.name) is None:
            return replace(self, active_steerings=(*self.active_steerings, steered))
        return replace(
            self,
            active_steerings=tuple(steered if other.name == steered.name else other for other in self.active_steerings),
        )

    def find_made(self, name: str) -> NamedSteering | None:
        """The steering that `/make` made under this name."""
        return next((steered for steered in self.made_steerings if steered.name == name), None)

    def with_made(self, steered: NamedSteering) -> Conversation:
        """The conversation with this steering on and recorded as made; it replaces one of the same name."""
        return replace(
            self.with_steering(steered),
            made_steerings=(*(other for other in self.made_steerings if other.name != steered.name), steered),
        )

    def with_saved_file(self, name: str, file: Path) -> Conversation:
        """The conversation with the made steering of this name recorded as saved in a file."""
        updated = [
            tuple(
                replace(steered, file=str(file)) if steered.name == name and not steered.file else steered
                for steered in group
            )
            for group in (self.active_steerings, self.made_steerings)
        ]
        return replace(self, active_steerings=updated[0], made_steerings=updated[1])

    def without_steering(self, name: str) -> Conversation:
        """The conversation with the steering of this name off."""
        return replace(
            self, active_steerings=tuple(steered for steered in self.active_steerings if steered.name != name)
        )

    def without_last_turn(self) -> Conversation:
        """The conversation without its last turn. Raises `TrimtabError` if there is none."""
        self.last()
        return replace(self, turns=self.turns[:-1])

    def last(self) -> Turn:
        """The last turn. Raises `TrimtabError` if there is none."""
        if not self.turns:
            raise TrimtabError("there is no question yet; type one")
        return self.turns[-1]

    def with_turn(self, turn: Turn) -> Conversation:
        """The conversation with one more turn."""
        return replace(self, turns=(*self.turns, turn), answer_count=self.answer_count + 1, images=())

    def label(self) -> str:
        """The steerings that are on, as a short label: `shout:2 rude:-0.5@9`."""
        return " ".join(_label(steered) for steered in self.active_steerings)


def _content(images: tuple[str, ...], text: str) -> Any:
    return image_content(images, text) if images else text


def _label(steered: NamedSteering) -> str:
    layers = "" if steered.layers is None else f"@{','.join(map(str, steered.layers))}"
    return f"{steered.name}:{steered.strength:g}{layers}"


def steering_record(steered: NamedSteering) -> SteeringRecord:
    """The record of a steering that is on, without its tensors."""
    from trimtab.files.steering_file import steering_digest

    return SteeringRecord(
        steered.name, steered.file, steered.strength, steered.layers_on, steering_digest(steered.steering)
    )


def name_for(file: Path, steered: Sequence[NamedSteering]) -> str:
    """The name of a file's steering: the file's stem, or the whole path if another file has that name."""
    taken = any(steered.name == file.stem and steered.file != str(file) for steered in steered)
    return str(file) if taken else file.stem
