"""Tasks from the trait cards, scored by the likelihood of the model's own answers for and against the trait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from trimtab.bench.measures import by_leads
from trimtab.bench.store import Store
from trimtab.bench.tasks import PLAIN, PROMPT, TWICE, Cost, Outline, Task, TrainingData
from trimtab.data import Trait, queries, traits
from trimtab.engines.request import AnsweredPrompt
from trimtab.errors import TrimtabError
from trimtab.making.contrasts import Answer, Contrasts, contrasts, supports_system_prompt, with_system_prompt
from trimtab.making.idea import idea_from_trait
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.lm import LM

TRAITS = ("blunt", "cheerful", "concise", "formal", "pirate", "poetic")
"""The traits that run by default; the other cards are of the kind `MORE`."""
MORE = "more-traits"
REFERENCE_PROMPTS = 6
LEAST = 5
"""The minimum number of questions with answers on both sides; with fewer, nothing can beat chance."""


def outlines(tokens: int, pairs: int) -> list[Outline]:
    """A task for each trait card, those that run by default first."""
    built = []
    for card in sorted(traits().values(), key=lambda trait: (trait.name not in TRAITS, trait.name)):
        texts = 2 * (len(card.learn) + len(card.test)) / max(1, pairs)  # all questions are answered, to find enough
        arm, written = Cost(0, 2 * tokens), texts * Cost(tokens, 2 * (tokens + 60))
        make = partial(_task, card, tokens, pairs)
        kind = "traits" if card.name in TRAITS else MORE
        sizes = 2 * (tokens + 60.0), 2.0 * tokens, 60.0
        built.append(Outline(card.name, kind, len(card.test), arm, written, *sizes, make, prompts=2))
    return built


def _task(card: Trait, tokens: int, pairs: int, lm: LM, store: Store, count: int) -> Task:
    idea = idea_from_trait(card)

    def load_contrasts(side: str, questions: Sequence[str]) -> Contrasts:
        def write() -> dict[str, Any]:
            return asdict(contrasts(lm, idea, questions, 1, tokens))

        return _contrasts(store.get_or_create("texts", card.name, side, make=write))

    learn, test = load_contrasts("learn", card.learn), load_contrasts("test", card.test)
    chosen, learn_questions = test.questions[:count], learn.questions[:pairs]
    if len(chosen) < LEAST or len(learn_questions) < LEAST:
        raise TrimtabError(
            f"the model's own answers for and against {card.name} differ on {len(chosen)} test questions and"
            f" {len(learn_questions)} to learn from; at least {LEAST} of each are needed"
        )
    supports_system = supports_system_prompt(lm)
    sides = [(_first(test.positive, q), _first(test.negative, q)) for q in chosen]
    instructed = [(q, idea.positive[n % len(idea.positive)]) for n, q in enumerate(chosen)]
    prompts = {
        PLAIN: [tuple(lm.encode(q)) for q in chosen],
        PROMPT: [tuple(lm.encode(with_system_prompt(system, q, supports_system))) for q, system in instructed],
        TWICE: [
            tuple(lm.encode(with_system_prompt(f"{system} {system}", q, supports_system))) for q, system in instructed
        ],
    }
    answers = [
        tuple({arm: AnsweredPrompt(ids[i], side.ids) for arm, ids in prompts.items()} for side in both)
        for i, both in enumerate(sides)
    ]
    return Task(
        name=card.name,
        about=f"how much more likely answers that are {card.name} are than others",
        unit="nats per token",
        items=tuple(chosen),
        groups=tuple(chosen),
        prompted=(PROMPT, TWICE),
        training_data=TrainingData(
            pairs={
                "answers": tuple(
                    Pair(_first(learn.positive, q).text, _first(learn.negative, q).text, q, "answers")
                    for q in learn_questions
                ),
                "prompts": tuple(
                    Pair(
                        q,
                        q,
                        "",
                        "prompts",
                        positive_system=idea.positive[n % len(idea.positive)],
                        negative_system=idea.negative[n % len(idea.negative)],
                    )
                    for n, q in enumerate(learn_questions)
                )
                if supports_system
                else (),
            },
            contrast=(idea.positive[0], idea.negative[0]),
            teacher={"system": idea.positive[0], "queries": card.learn, "tokens": tokens},
        ),
        reference_prompts=queries("tune")[:REFERENCE_PROMPTS],
        measure=by_leads([(positive, negative) for positive, negative in answers]),
        logits=True,
    )


def _first(answers: Sequence[Answer], question: str) -> Answer:
    return next(answer for answer in answers if answer.question == question)


def _contrasts(stored: dict[str, Any]) -> Contrasts:
    """Contrasts from JSON."""
    sides = [
        tuple(
            Answer(
                answer["question"],
                tuple(answer["own"]),
                tuple(answer["other"]),
                tuple(answer["bare"]),
                tuple(answer["ids"]),
                answer["text"],
            )
            for answer in stored[side]
        )
        for side in ("positive", "negative")
    ]
    return Contrasts(sides[0], sides[1], stored["asked"])
