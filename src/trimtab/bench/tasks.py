"""Defines a benchmark task: the data to learn from, the questions, and how an answer is scored."""

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
"""The arms without a steering: the question only, the question with the instruction, and with the instruction twice."""
BATCH = 64


@dataclass(frozen=True)
class TrainingData:
    """The data that methods learn from, in all the forms that a task has.

    Args:
        pairs: Contrastive pairs by their shape.
        texts: Prompts on which the behaviour is wanted, for methods that learn from texts.
        others: Prompts on which it isn't.
        contrast: A text for and a text against, for methods that take two texts.
        teacher: Keywords of `learn_distill`: the instruction and the questions.
    """

    pairs: Mapping[str, tuple[Pair, ...]]
    texts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    contrast: tuple[str, str] | None = None
    teacher: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmResult:
    """One arm: a score for each item, in the order of the items, and other measures of each (`repeated`, `perplexity`
    …).

    `answers` are the generated texts, if any; of items with two prompts, first those to all first ones.
    """

    scores: tuple[float, ...]
    beside: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()


ItemSteerings = Sequence["Steering | None"]
"""A steering for each item."""
Measure = Callable[["LM", str, Sequence[ItemSteerings], Mapping[str, Any]], list[ArmResult]]
"""`measure(lm, arm, runs, options)`: the results of each run, all in the same batches, in one of the task's arms;
`options` are for `lm.generate`.
"""


@dataclass(frozen=True)
class Task:
    """A task that is ready to run.

    Args:
        name: Its name.
        about: What a higher score means.
        unit: The unit of a score: a share from 0 to 1, or nats per token.
        items: The items' names.
        groups: The group of each item; groups are resampled as a whole in intervals and tests.
        prompted: Which of the arms `PROMPT` and `TWICE` exist.
        training_data: The data to learn from.
        reference_prompts: Prompts like the items', none of them an item, on which divergences are measured.
        prompts: Each item's prompt, in the arm without a steering; empty if nothing is generated.
        phrases: For each item, the phrase of its prompt that may be emphasized; empty if the prompts have no
            instruction.
        reference_phrases: The same for `reference_prompts`.
        measure: How an arm is scored.
        logits: Whether scoring needs the probabilities of all tokens, which not every engine provides.
    """

    name: str
    about: str
    unit: str
    items: tuple[str, ...]
    groups: tuple[str, ...]
    prompted: tuple[str, ...]
    training_data: TrainingData
    reference_prompts: tuple[Prompt, ...]
    measure: Measure
    prompts: tuple[Prompt, ...] = ()
    phrases: tuple[str, ...] = ()
    reference_phrases: tuple[str, ...] = ()
    logits: bool = False


@dataclass(frozen=True)
class Cost:
    """Tokens that are generated, and tokens that are only read."""

    generated: float = 0.0
    read: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.generated + other.generated, self.read + other.read)

    def __rmul__(self, times: float) -> Cost:
        return Cost(times * self.generated, times * self.read)


@dataclass(frozen=True)
class Outline:
    """A task before anything is run for it.

    Args:
        name: The task's name.
        kind: `instructions`, `behaviours`, `refusal`, `traits`, `more-instructions` or `more-traits`.
        available: The maximum number of items.
        arm: The cost of one arm per item, excluding the reading of its prompts.
        writing_cost: The cost of writing a pair to learn from, if the model writes it.
        pair: The number of tokens of a pair.
        answers: The number of tokens of the pair's two answers.
        prompt: The number of tokens of an item's prompt.
        make: Makes the task: `make(lm, store, items)`.
        prompts: How many times an arm reads an item's prompt. Methods that act on answers only read it once for all
            strengths.
        instruction_in_prompt: Whether the instruction is in the prompts, so that it can be emphasized.
    """

    name: str
    kind: str
    available: int
    arm: Cost
    writing_cost: Cost
    pair: float
    answers: float
    prompt: float
    make: Callable[[LM, Store, int], Task]
    prompts: int = 1
    instruction_in_prompt: bool = False
