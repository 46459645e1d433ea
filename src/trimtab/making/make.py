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
from trimtab.evaluate.divergence import with_divergence
from trimtab.keywords import keywords
from trimtab.learn.inputs import check_lm, pairs_for
from trimtab.making.candidates import FROM_LAST, Candidate, candidates, distillation_candidates
from trimtab.making.contrasts import check_enough, contrasts, supports_system_prompt, with_system_prompt
from trimtab.making.effect import SUPPORTED_POSITIONS, check_prompted, effect, prompt_effect
from trimtab.making.evaluation import Example, evaluate_steering
from trimtab.making.from_pairs import material_from_pairs
from trimtab.making.idea import Idea, idea_from_sentence
from trimtab.making.material import FinalPrompt, Material
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
    material = _material(lm, wanted, tokens, distill=distill)
    return _make_from_material(lm, material, tokens=tokens, positions=positions, seed=seed, stage=stage, say=say)


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

    Returns:
        The steering at strength 1, its card with the verdict. Look at `verdict.holds` before you use it.

    Raises:
        TrimtabError: Too few pairs with different prompts, pairs of different kinds, or whose sides have the same
            answer; and as `make` does.
    """
    material = material_from_pairs(lm, pairs_for(lm, pairs), name, tokens, trains=distill)
    return _make_from_material(lm, material, tokens=tokens, positions=positions, seed=seed, stage=stage, say=say)


def _material(lm: LM, idea: Idea, tokens: int, *, distill: bool) -> Material:
    supports_system = supports_system_prompt(lm)
    prompts = [
        with_system_prompt(idea.positive[n % len(idea.positive)], question, supports_system)
        for n, question in enumerate(idea.test)
    ]
    return Material(
        name=idea.name,
        source=idea.source,
        learn=partial(contrasts, lm, idea, idea.learn, PROMPTS, tokens),
        test=partial(contrasts, lm, idea, idea.test, PROMPTS, tokens),
        held_out_questions=frozenset(idea.learn[HELD_OUT // 2 :: HELD_OUT]),
        writes=True,
        prompted=True,
        trained_candidates=distillation_candidates(lm, idea.name) if distill else (),
        final_prompts=tuple(
            FinalPrompt(question, question, prompt) for question, prompt in zip(idea.test, prompts, strict=True)
        ),
        signs=idea.signs,
    )


def _make_from_material(
    lm: LM,
    material: Material,
    *,
    tokens: int,
    positions: Positions,
    seed: int,
    stage: Stage | None,
    say: Callable[[str], None] | None,
) -> Made:
    if positions not in SUPPORTED_POSITIONS:
        raise TrimtabError(
            f"a steering is made for the last prompt token on, or for all tokens, not for {positions}; change its"
            " positions afterwards, with steering.at(…)"
        )

    def stage_progress(what: str) -> Callable[[int, int], None] | None:
        if stage is None:
            return None
        stage(what, 0, 1)  # a start: the number of steps isn't known yet
        return lambda done, total: stage(what, done, total)

    answering, testing, learning, measuring = STAGES
    learn_answers = material.learn(stage_progress(answering) if material.writes else None)
    check_enough(learn_answers, material.name)
    if say is not None and material.writes:
        say(
            f"{len(learn_answers.positive) + len(learn_answers.negative)} of {learn_answers.asked} answers show the"
            " difference"
        )
    held_out = learn_answers.for_questions(material.held_out_questions)
    check_enough(held_out, material.name, 1)
    learned = learn_answers.for_questions(
        {answer.question for answer in (*learn_answers.positive, *learn_answers.negative)} - material.held_out_questions
    )
    test_answers = material.test(stage_progress(testing) if material.writes else None)
    check_enough(test_answers, material.name, LEAST_TESTED)
    base = effect(lm, None, test_answers)
    by_prompt = prompt_effect(lm, test_answers) if material.prompted else None
    if by_prompt is not None:
        check_prompted(base, by_prompt)  # before the slow part: without this, there would be no verdict in the end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about doses: trying strengths is the point here
        ranked = candidates(
            lm,
            material.name,
            learned,
            held_out,
            trained=material.trained_candidates,
            prompted=material.prompted,
            positions=positions,
            seed=seed,
            progress=stage_progress(learning),
            say=say,
        )
        chosen = ranked[0]
        verdict, examples = evaluate_steering(
            lm, material, chosen.steering, test_answers, base, by_prompt, tokens, seed, stage_progress(measuring)
        )
    card = chosen.steering.card
    how_made = {"idea": material.name, "source": material.source, "chosen": chosen.name, **material.options}
    card = replace(
        card,
        data=material.data or card.data,
        options={**card.options, **how_made},
        measured={**card.measured, **verdict.as_measured()},
    )
    bare_prompts = [prompt.bare for prompt in material.final_prompts]
    steering = with_divergence(lm, Steering(chosen.steering.edits, card), bare_prompts)
    return Made(material.name, material.source, steering, verdict, chosen.name, tuple(ranked), tuple(examples))
