"""What a benchmark task is: what is learned from, the questions, and how an answer is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.bench.store import Store

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering
    from trimtab.text.chat import Prompt
    from trimtab.text.pairs import Pair

PLAIN, PROMPT, TWICE = "unsteered", "prompt", "said twice"
"""The arms without a steering: nothing said but the question, what words can do, and the same words twice."""
BATCH = 64


@dataclass(frozen=True)
class Lessons:
    """What methods learn from, in all the forms that a task has.

    Args:
        pairs: Contrastive pairs by their shape.
        texts: Prompts on which the behaviour belongs, for methods that learn from texts.
        others: Prompts on which it doesn't.
        contrast: A text for and a text against, for methods that take two texts.
        teacher: Keywords of `learn_distill`: the instruction and the questions.
    """

    pairs: Mapping[str, tuple[Pair, ...]]
    texts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    contrast: tuple[str, str] | None = None
    teacher: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One arm: a score for each item, in the items' order, and what else was seen of each (`repeated`, `perplexity` …).

    `answers` are what was said, where something is.
    """

    scores: tuple[float, ...]
    beside: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()


Run = Sequence["Steering | None"]
"""A steering for each item."""
Measure = Callable[["LM", str, Sequence[Run], Mapping[str, Any]], list[Measured]]
"""`measure(lm, arm, runs, options)`: what comes of each run, all in the same batches, in one of the task's arms;
`options` are for `lm.generate`."""


@dataclass(frozen=True)
class Task:
    """A task that is ready to run.

    Args:
        name: Its name.
        about: What a higher score means.
        unit: What a score is: a share from 0 to 1, or nats per token.
        items: The items' names.
        groups: Which items belong together in intervals and tests.
        prompted: Which of the arms `PROMPT` and `TWICE` there are.
        lessons: What is learned from.
        reference_prompts: Prompts like the items', none of them an item, on which divergences are measured.
        prompts: What each item asks, in the arm without a steering; empty where nothing is generated.
        phrases: For each item the phrase of its prompt that may be emphasized; none where nothing is said there.
        reference_phrases: The same for `reference_prompts`.
        measure: How an arm is scored.
        logits: Whether that takes probabilities of all tokens, which not every engine gives.
    """

    name: str
    about: str
    unit: str
    items: tuple[str, ...]
    groups: tuple[str, ...]
    prompted: tuple[str, ...]
    lessons: Lessons
    reference_prompts: tuple[Prompt, ...]
    measure: Measure
    prompts: tuple[Prompt, ...] = ()
    phrases: tuple[str, ...] = ()
    reference_phrases: tuple[str, ...] = ()
    logits: bool = False


@dataclass(frozen=True)
class Cost:
    """Tokens that are generated, and tokens that are only read."""

    made: float = 0.0
    read: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.made + other.made, self.read + other.read)

    def __rmul__(self, times: float) -> Cost:
        return Cost(times * self.made, times * self.read)


@dataclass(frozen=True)
class Outline:
    """A task before anything is run for it.

    Args:
        name: The task's name.
        kind: `instructions`, `behaviours`, `refusal` or `traits`.
        available: How many items there are at most.
        arm: What one arm costs, an item, beside reading its prompts.
        written: What a pair to learn from costs to write, where the model writes it.
        pair: The tokens of a pair.
        answers: Those of them that are its two answers.
        prompt: The tokens of an item's prompt.
        make: Gives the task: `make(lm, store, items)`.
        prompts: So many times an arm reads an item's prompt. Methods that act on answers alone read it once for all.
        said: Whether the instruction is in the prompts, so that it can be emphasized.
    """

    name: str
    kind: str
    available: int
    arm: Cost
    written: Cost
    pair: float
    answers: float
    prompt: float
    make: Callable[[LM, Store, int], Task]
    prompts: int = 1
    said: bool = False
