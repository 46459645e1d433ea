"""What a steering is made from, whoever wrote it: answers for and against, and prompts to hear it at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.making.contrasts import Contrasts, Progress
from trimtab.steering import Positions, Steering

if TYPE_CHECKING:
    from trimtab.text.chat import Prompt

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A candidate that is trained, which takes longest: its name, how it is learned, and at which strengths tried.

    `learn` is given the answers, where it is to act, the seed of their order, the callback for how it stands, and the
    one for each step. What the last one raises ends it.
    """

    name: str
    learn: Callable[[Contrasts, Positions, int, Say | None, Progress | None], Steering]
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class Heard:
    """A prompt that is answered at the end: what to call it, itself, and with what brings the wanted answer about."""

    question: str
    bare: Prompt
    prompted: Prompt | None = None


@dataclass(frozen=True)
class Material:
    """All that a steering is made from.

    Args:
        name: Its name.
        source: Where it comes from, for the card.
        learn: Gives the answers to learn from. Called with how far it is, where the model has to write them.
        test: Gives those for the verdict, to other questions.
        aside: Questions among those to learn from that choose between candidates instead.
        writes: Whether the model writes the answers.
        prompted: Whether a prompt brings the wanted answers about, by whose effect a steering is measured.
        trained: What is tried beside mean differences.
        heard: What is answered at the end.
        signs: Words that tell what is wanted in an answer, if any honestly do.
        options: Further entries for the card.
        data: A digest of the data, for the card; empty where the model wrote it.
    """

    name: str
    source: str
    learn: Callable[[Progress | None], Contrasts]
    test: Callable[[Progress | None], Contrasts]
    aside: frozenset[str]
    writes: bool
    prompted: bool
    trained: Trained | None
    heard: tuple[Heard, ...]
    signs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
