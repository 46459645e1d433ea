"""The verdict on a steering, from answers to questions that weren't used for learning or choosing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from trimtab.data import WordCheck
from trimtab.evaluate.controls import means_for, random_like
from trimtab.evaluate.decision import decide
from trimtab.evaluate.fluency import perplexities
from trimtab.making.contrasts import BATCH, Contrasts
from trimtab.making.effect import Effect, effect, gain_of, share_of
from trimtab.making.material import FinalPrompt, Material
from trimtab.making.verdict import Verdict
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation
    from trimtab.evaluate.intervals import Interval
    from trimtab.lm import LM
    from trimtab.steering import Steering

RANDOM = 3


@dataclass(frozen=True)
class Example:
    """One of the test questions, and the model's answers to it; `prompted` is `None` if there is no such prompt."""

    question: str
    unsteered: str
    prompted: str | None
    steered: str


def evaluate_steering(
    lm: LM,
    material: Material,
    steering: Steering,
    test_answers: Contrasts,
    base: Effect,
    by_prompt: Effect | None,
    tokens: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Verdict, list[Example]]:
    """The verdict on a steering, and examples of its answers.

    Args:
        lm: The model.
        material: The material that it was made from, which includes the prompts to answer.
        steering: The steering.
        test_answers: Answers for and against, to the test questions.
        base: The effect without a steering.
        by_prompt: The effect of the system prompt; `None` if there is none to compare with.
        tokens: The maximum length of an answer, in tokens.
        seed: The seed of the random directions.
        progress: Called with the progress.

    Raises:
        TrimtabError: As `share_of` does.
    """
    total, done = RANDOM + 2, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def worth(measured: Effect) -> Interval:
        return gain_of(base.leads, measured.leads) if by_prompt is None else share_of(base, measured, by_prompt)

    means = means_for(lm, [steering], [prompt.bare for prompt in material.final_prompts])
    mine = effect(lm, steering, test_answers)
    interval = worth(mine)
    step()
    random, chances = [], [_chance(base.leads, mine.leads)]
    for n in range(RANDOM):
        other = effect(lm, random_like(steering, seed + n, means), test_answers)
        random.append(worth(other).estimate)
        chances.append(_chance_of_random(base, other, mine))
        step()
    arms = _answers(lm, material.final_prompts, steering, tokens)
    step()
    before = "prompted" if "prompted" in arms else "plain"
    looping = {name: [float(_loops(answer)) for answer in answers] for name, answers in arms.items()}
    more_loops = decide(looping[before], looping["steered"])
    shows = WordCheck(material.signs)
    verdict = Verdict(
        interval.estimate,
        interval.low,
        interval.high,
        tuple(random),
        max(chances),
        len(test_answers.questions),
        more_loops.after,
        more_loops.before,
        more_loops.p,
        _perplexity(lm, material.final_prompts, arms["steered"])
        / _perplexity(lm, material.final_prompts, arms[before]),
        tuple(_share([shows(answer.text) for answer in answers]) for answers in arms.values())
        if material.signs
        else (),
        None if by_prompt is not None else gain_of(base.wanted, mine.wanted).estimate,
    )
    texts = {name: [answer.text.strip() for answer in answers] for name, answers in arms.items()}
    prompted_texts: Sequence[str | None] = texts.get("prompted", [None] * len(material.final_prompts))
    rows = zip(material.final_prompts, texts["plain"], prompted_texts, texts["steered"], strict=True)
    return verdict, [Example(prompt.question, *answer_texts) for prompt, *answer_texts in rows]  # type: ignore[arg-type]


def _answers(
    lm: LM, final_prompts: Sequence[FinalPrompt], steering: Steering, tokens: int
) -> dict[str, list[Generation]]:
    """The answers unsteered, with the prompt for what is wanted (if there is one for each question), and steered."""
    bare = [question.bare for question in final_prompts]
    prompts = [question.prompted for question in final_prompts if question.prompted is not None]
    arms = {"plain": lm.generate(bare, max_new_tokens=tokens, batch_size=BATCH)}
    if len(prompts) == len(final_prompts):
        arms["prompted"] = lm.generate(prompts, max_new_tokens=tokens, batch_size=BATCH)
    arms["steered"] = lm.generate(bare, steering, max_new_tokens=tokens, batch_size=BATCH)
    return arms


def _chance(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The p-value of the exact paired test that these values grew, by question."""
    return decide(list(before.values()), [after[question] for question in before]).p


def _chance_of_random(base: Effect, random: Effect, mine: Effect) -> float:
    """How often chance alone does as well as the steering does beside a random direction.

    A random direction that breaks the text makes the wanted answers less likely than no steering does. Its leads are
    then noise between answers that are all impossible, so the likelihoods of the wanted answers are compared instead.
    """
    if sum(random.wanted.values()) < sum(base.wanted.values()):
        return _chance(random.wanted, mine.wanted)
    return _chance(random.leads, mine.leads)


def _loops(answer: Generation) -> bool:
    return not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _perplexity(lm: LM, final_prompts: Sequence[FinalPrompt], answers: Sequence[Generation]) -> float:
    """The median perplexity of the answers after the bare questions, unsteered; infinite if all are empty."""
    texts = [
        (lm.encode(q.bare), answer.token_ids)
        for q, answer in zip(final_prompts, answers, strict=True)
        if answer.token_ids
    ]
    return median(perplexities(lm, texts)) if texts else math.inf
