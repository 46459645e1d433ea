"""Makes a measured steering from one sentence, or from pairs.

The model answers questions under system prompts for and against the idea. Steerings are learned from the answers that
show the difference: by their mean difference (persona vectors, Chen et al., arXiv 2507.21509) and by distillation
(`learn_distill`). Held-out questions choose between them, and other questions again test the chosen one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.inputs import check_lm, pairs_for
from trimtab.making.candidates import FROM_LAST, Candidate, candidates, distilling
from trimtab.making.contrasts import check_enough, contrasts, hears_system, under
from trimtab.making.effect import READ, check_prompted, effect, prompted
from trimtab.making.from_pairs import material_from_pairs
from trimtab.making.idea import Idea, idea_from_sentence
from trimtab.making.judged import Example, judged
from trimtab.making.material import Heard, Material
from trimtab.making.verdict import Verdict
from trimtab.steering import Positions, Steering
from trimtab.text.pairs import Pairs

if TYPE_CHECKING:
    from trimtab.lm import LM

HELD_OUT = 4
"""One in this many of the questions to learn from is used for choosing between candidates instead."""
LEAST_TESTED = 4
"""The minimum number of test questions with answers on both sides for a verdict."""
PROMPTS = 2
TOKENS = 64
STAGES = ("answering for and against", "answering the test questions", "learning", "measuring")

Stage = Callable[[str, int, int], None]
"""Called with the name of the current stage, the number of its steps that are done, and their total."""


@dataclass(frozen=True)
class Made:
    """The steering that was chosen, the verdict on it, and examples of its answers.

    Args:
        idea: What was wanted, in a few words.
        source: Where the idea comes from.
        steering: The result, at strength 1.
        verdict: What it is worth.
        name: The name of the best candidate.
        candidates: All that were tried, the best one first.
        examples: The model's answers to test questions.
    """

    idea: str
    source: str
    steering: Steering
    verdict: Verdict
    name: str
    candidates: tuple[Candidate, ...]
    examples: tuple[Example, ...]


@keywords
def make(
    lm: LM,
    idea: str | Idea,
    *,
    tokens: int = TOKENS,
    distill: bool = True,
    positions: Positions = FROM_LAST,
    seed: int = 0,
    stage: Stage | None = None,
    say: Callable[[str], None] | None = None,
) -> Made:
    """Make a steering from an idea, with a verdict.

    Args:
        lm: The model; on the transformers engine.
        idea: A sentence, such as "be blunt, not flattering", or an `Idea`.
        tokens: The maximum length of an answer, in tokens.
        distill: Whether to distill too, which captures more and takes longest.
        positions: Where it acts: from the last prompt token on, or at all tokens, as a control vector of llama.cpp does
            (then block 0 is left out, which llama.cpp can't steer).
        seed: The seed of the order of answers and of the random directions.
        stage: Called with the current stage, one of `STAGES`, at its beginning and as it progresses. An exception from
            it aborts everything.
        say: Called with messages about the progress.

    Returns:
        The steering at strength 1, its card with the verdict. Look at `verdict.holds` before you use it.

    Raises:
        TrimtabError: The model's answers for and against the idea barely differ, or it runs on another engine.
    """
    check_lm(lm, "training")
    if not isinstance(idea, (str, Idea)):
        raise TrimtabError(f"an idea is a sentence such as 'be blunt, not flattering', or an Idea, got {idea!r}")
    wanted = idea_from_sentence(idea) if isinstance(idea, str) else idea
    made_from = _material(lm, wanted, tokens, distill=distill)
    return _made(lm, made_from, tokens=tokens, positions=positions, seed=seed, stage=stage, say=say)


@keywords
def make_from_pairs(
    lm: LM,
    pairs: Pairs,
    *,
    name: str = "pairs",
    tokens: int = TOKENS,
    distill: bool = True,
    positions: Positions = FROM_LAST,
    seed: int = 0,
    stage: Stage | None = None,
    say: Callable[[str], None] | None = None,
) -> Made:
    """Make a steering from your own pairs, with a verdict.

    About half of the prompts are learned from, the others are for the test. The model answers pairs of prompts (with
    and without an instruction). If no prompt of a pair produces the wanted answers (none has its own system prompt,
    say), there is no prompt to compare with. The effect is then given in nats per token, together with that of random
    directions.

    Args:
        lm: The model; on the transformers engine.
        pairs: `Pair`s, or anything that `as_pairs` accepts; `read_pairs` reads a file.
        name: Its name.
        tokens: The maximum length of an answer that the model writes, in tokens.
        distill: Whether to train a vector too, which takes longest: distilled if a prompt produces the wanted answers,
            by preference (BiPO) if only the answers are given. Bare texts have neither.
        positions: As in `make`.
        seed: The seed of the order of answers and of the random directions.
        stage: Called with the current stage, as in `make`; stages that don't apply are skipped.
        say: Called with messages about the progress.

    Raises:
        TrimtabError: Too few pairs with different prompts, pairs of different kinds, or whose sides have the same
            answer; and as `make` does.
    """
    made_from = material_from_pairs(lm, pairs_for(lm, pairs), name, tokens, trains=distill)
    return _made(lm, made_from, tokens=tokens, positions=positions, seed=seed, stage=stage, say=say)


def _material(lm: LM, idea: Idea, tokens: int, *, distill: bool) -> Material:
    heard = hears_system(lm)
    prompts = [under(idea.positive[n % len(idea.positive)], question, heard) for n, question in enumerate(idea.test)]
    return Material(
        name=idea.name,
        source=idea.source,
        learn=partial(contrasts, lm, idea, idea.learn, PROMPTS, tokens),
        test=partial(contrasts, lm, idea, idea.test, PROMPTS, tokens),
        aside=frozenset(idea.learn[HELD_OUT // 2 :: HELD_OUT]),
        writes=True,
        prompted=True,
        trained=distilling(lm, idea.name) if distill else None,
        heard=tuple(Heard(question, question, prompt) for question, prompt in zip(idea.test, prompts, strict=True)),
        signs=idea.signs,
    )


def _made(
    lm: LM,
    made_from: Material,
    *,
    tokens: int,
    positions: Positions,
    seed: int,
    stage: Stage | None,
    say: Callable[[str], None] | None,
) -> Made:
    if positions not in READ:
        raise TrimtabError(
            f"a steering is made for the last prompt token on, or for all tokens, not for {positions}; change its"
            " positions afterwards, with steering.at(…)"
        )

    def at(what: str) -> Callable[[int, int], None] | None:
        if stage is None:
            return None
        stage(what, 0, 1)  # a start: the number of steps isn't known yet
        return lambda done, total: stage(what, done, total)

    answering, testing, learning, measuring = STAGES
    learn_answers = made_from.learn(at(answering) if made_from.writes else None)
    check_enough(learn_answers, made_from.name)
    if say is not None and made_from.writes:
        say(
            f"{len(learn_answers.positive) + len(learn_answers.negative)} of {learn_answers.asked} answers show the"
            " difference"
        )
    held_out = learn_answers.on(made_from.aside)
    check_enough(held_out, made_from.name, 1)
    learned = learn_answers.on(
        {answer.question for answer in (*learn_answers.positive, *learn_answers.negative)} - made_from.aside
    )
    test_answers = made_from.test(at(testing) if made_from.writes else None)
    check_enough(test_answers, made_from.name, LEAST_TESTED)
    base = effect(lm, None, test_answers)
    by_prompt = prompted(lm, test_answers) if made_from.prompted else None
    if by_prompt is not None:
        check_prompted(base, by_prompt)  # before the slow part: without this, there would be no verdict in the end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about doses: trying strengths is the point here
        ranked = candidates(
            lm,
            made_from.name,
            learned,
            held_out,
            trained=made_from.trained,
            positions=positions,
            seed=seed,
            progress=at(learning),
            say=say,
        )
        chosen = ranked[0]
        verdict, examples = judged(
            lm, made_from, chosen.steering, test_answers, base, by_prompt, tokens, seed, at(measuring)
        )
    card = chosen.steering.card
    how_made = {"idea": made_from.name, "source": made_from.source, "chosen": chosen.name, **made_from.options}
    card = replace(
        card,
        data=made_from.data or card.data,
        options={**card.options, **how_made},
        measured={**card.measured, **verdict.as_measured()},
    )
    steering = Steering(chosen.steering.edits, card)
    return Made(made_from.name, made_from.source, steering, verdict, chosen.name, tuple(ranked), tuple(examples))
