"""The material that a steering is made from: answers for and against, and prompts to answer at the end."""

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
class TrainedCandidate:
    """A trained candidate, which takes longer: its name, how it is learned, and the strengths to try.

    `learn` is called with the answers, the positions, the seed of their order, a callback for messages, and one for
    each step. An exception from the latter aborts the training. Without `only_additions` it can't act at all tokens,
    as the control vectors of llama.cpp do.
    """

    name: str
    learn: Callable[[Contrasts, Positions, int, Say | None, Progress | None], Steering]
    strengths: tuple[float, ...]
    only_additions: bool = True


@dataclass(frozen=True)
class FinalPrompt:
    """A prompt that is answered at the end: its name, itself, and a version that produces the wanted answer."""

    question: str
    bare: Prompt
    prompted: Prompt | None = None


@dataclass(frozen=True)
class Material:
    """Everything that a steering is made from.

    Args:
        name: Its name.
        source: Where it comes from, for the card.
        learn: Returns the answers to learn from. Its argument is called with the progress, if the model has to write
            them.
        test: Returns the answers for the verdict, to other questions.
        held_out_questions: Questions among those to learn from that are used for choosing between candidates instead.
        writes: Whether the model writes the answers.
        prompted: Whether a prompt produces the wanted answers, so that a steering can be compared with it.
        trained_candidates: The trained candidates, if any, besides mean differences.
        final_prompts: The prompts that are answered at the end.
        signs: Words that reliably indicate the behaviour in an answer, if there are any.
        options: Further entries for the card.
        data: A digest of the data, for the card; empty if the model wrote it.
    """

    name: str
    source: str
    learn: Callable[[Progress | None], Contrasts]
    test: Callable[[Progress | None], Contrasts]
    held_out_questions: frozenset[str]
    writes: bool
    prompted: bool
    trained_candidates: tuple[TrainedCandidate, ...]
    final_prompts: tuple[FinalPrompt, ...]
    signs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
