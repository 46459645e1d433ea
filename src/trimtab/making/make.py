"""One sentence in, a measured steering out.

The model answers questions under system prompts for and against the idea. Answers that show the difference are learned
from: by their mean difference (persona vectors, Chen et al., arXiv 2507.21509) and by distilling (`learn_distill`).
Questions that were held out choose between them, and others again say what the chosen one is worth.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from trimtab.data import WordCheck
from trimtab.evaluate.controls import random_like
from trimtab.evaluate.fluency import perplexities
from trimtab.learn.given import check_lm
from trimtab.making.candidates import Candidate, candidates
from trimtab.making.contrasts import BATCH, Contrasts, check_enough, contrasts, hears_system, under
from trimtab.making.effect import effect, prompted, share_of
from trimtab.making.idea import Idea, idea_from_sentence
from trimtab.making.verdict import Verdict
from trimtab.steering import Steering
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation
    from trimtab.lm import LM

HELD_OUT = 4
"""One in so many of the questions to learn from chooses between candidates instead."""
LEAST_TESTED = 4
"""A verdict needs answers on both sides to so many of the test questions."""
RANDOM = 3
PROMPTS = 2
TOKENS = 64
STAGES = ("answering for and against", "learning", "answering the test questions", "measuring")

Stage = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and how much there is."""


@dataclass(frozen=True)
class Example:
    """One of the test questions, and what the model says to it."""

    question: str
    unsteered: str
    prompted: str
    steered: str


@dataclass(frozen=True)
class Made:
    """The steering that was chosen, what it is worth, and what it says."""

    idea: Idea
    steering: Steering
    verdict: Verdict
    name: str
    candidates: tuple[Candidate, ...]
    examples: tuple[Example, ...]


def make(
    lm: LM,
    idea: str | Idea,
    *,
    tokens: int = TOKENS,
    distill: bool = True,
    seed: int = 0,
    stage: Stage | None = None,
    say: Callable[[str], None] | None = None,
) -> Made:
    """Make a steering from an idea, and say what it is worth.

    Args:
        lm: The model; on the transformers engine.
        idea: A sentence, such as "be blunt, not flattering", or an `Idea`.
        tokens: The most tokens of an answer.
        distill: Whether to distill too, which holds more and takes longest.
        seed: Of the order of answers and of the random directions.
        stage: Told what is being done, one of `STAGES`, at its beginning and as it goes on. What it raises ends it all.
        say: Told in words how it stands.

    Returns:
        The steering at strength 1, its card with the verdict. Look at `verdict.holds` before you use it.

    Raises:
        TrimtabError: The model's answers for and against the idea hardly differ, or it runs on another engine.
    """
    check_lm(lm, "training")
    wanted = idea_from_sentence(idea) if isinstance(idea, str) else idea

    def at(what: str) -> Callable[[int, int], None] | None:
        if stage is None:
            return None
        stage(what, 0, 1)  # it begins: how much there is isn't known yet
        return lambda done, total: stage(what, done, total)

    answering, learning, testing, measuring = STAGES

    found = contrasts(lm, wanted, wanted.learn, PROMPTS, tokens, at(answering))
    check_enough(found, wanted)
    if say is not None:
        say(f"{len(found.positive) + len(found.negative)} of {found.asked} answers show the difference")
    aside = wanted.learn[HELD_OUT // 2 :: HELD_OUT]
    learned = found.on([one for one in wanted.learn if one not in aside])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doses: strengths are what is tried here
        ranked = candidates(
            lm, wanted, learned, found.on(aside), distill=distill, seed=seed, progress=at(learning), say=say
        )
        chosen = ranked[0]
        asked = contrasts(lm, wanted, wanted.test, PROMPTS, tokens, at(testing))
        verdict, examples = _judged(lm, wanted, chosen.steering, asked, tokens, seed, at(measuring))
    card = replace(
        chosen.steering.card,
        options={**chosen.steering.card.options, "idea": wanted.name, "source": wanted.source, "chosen": chosen.name},
        measured={**chosen.steering.card.measured, **verdict.as_measured()},
    )
    steering = Steering(chosen.steering.edits, card)
    return Made(wanted, steering, verdict, chosen.name, tuple(ranked), tuple(examples))


def _judged(
    lm: LM,
    idea: Idea,
    steering: Steering,
    asked: Contrasts,
    tokens: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Verdict, list[Example]]:
    check_enough(asked, idea, LEAST_TESTED)
    total = RANDOM + 3
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    base, told = effect(lm, None, asked), prompted(lm, asked)
    step()
    share = share_of(base, effect(lm, steering, asked), told)
    step()
    random = []
    for n in range(RANDOM):
        random.append(share_of(base, effect(lm, random_like(steering, seed + n), asked), told).estimate)
        step()
    heard = hears_system(lm)
    prompts = [under(idea.positive[n % len(idea.positive)], q, heard) for n, q in enumerate(idea.test)]
    plain = lm.generate(list(idea.test), max_new_tokens=tokens, batch_size=BATCH)
    mine = lm.generate(list(idea.test), steering, max_new_tokens=tokens, batch_size=BATCH)
    theirs = lm.generate(prompts, max_new_tokens=tokens, batch_size=BATCH)
    step()
    arms = {"plain": plain, "told": theirs, "mine": mine}
    loops = {name: _share([_loops(one) for one in answers]) for name, answers in arms.items()}
    shows = WordCheck(idea.signs)
    signs = tuple(_share([shows(one.text) for one in answers]) for answers in arms.values()) if idea.signs else ()
    verdict = Verdict(
        share.estimate,
        share.low,
        share.high,
        tuple(random),
        len(asked.questions),
        loops["mine"],
        loops["told"],
        _perplexity(lm, idea.test, mine) / _perplexity(lm, idea.test, theirs),
        signs,
    )
    rows = zip(idea.test, plain, theirs, mine, strict=True)
    return verdict, [Example(question, *(one.text.strip() for one in texts)) for question, *texts in rows]


def _loops(answer: Generation) -> bool:
    return not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _perplexity(lm: LM, questions: Sequence[str], answers: Sequence[Generation]) -> float:
    """The median perplexity of the answers after the bare questions, unsteered; infinite where all are empty."""
    texts = [(lm.encode(q), one.token_ids) for q, one in zip(questions, answers, strict=True) if one.token_ids]
    return median(perplexities(lm, texts)) if texts else math.inf
