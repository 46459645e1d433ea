"""Prepares a user's own pairs for making a steering: which to learn from, which to test on, and what to compare with.

A side is an answer after a prompt. Steered answers follow what the two prompts of a pair have in common. What only the
positive one has (its own system prompt, an instruction) is what the steering is compared with. Pairs of prompts have no
answers: the model writes them, each under its own side's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from trimtab.data import queries
from trimtab.engines.contract import check_length
from trimtab.errors import TrimtabError
from trimtab.learn.activations import error_prefix
from trimtab.making.candidates import RATE, STEPS, distillation_candidates, first_layer
from trimtab.making.contrasts import Answer, Contrasts, Progress, PromptedQuestion, generate_contrasts
from trimtab.making.material import FinalPrompt, Material, Say, TrainedCandidate
from trimtab.methods.bipo import learn_bipo
from trimtab.steering import Positions, Steering
from trimtab.text.answers import encode_prompt, encode_sides, side_question
from trimtab.text.letters import letter_of
from trimtab.text.pairs import Content, Pair, Side, digest, sides
from trimtab.text.shared_prompt import prompt_of, shared_side, with_system_apart

if TYPE_CHECKING:
    from trimtab.lm import LM

LEAST_PROMPTS = 16
"""The minimum number of distinct prompts for learning, choosing and testing."""
HELD_OUT, MOST_HELD_OUT, MOST_TESTED, MAX_FINAL_PROMPTS = 4, 40, 100, 20
"""One in four of the prompts to learn from is used for choosing instead, up to 40. At most 100 prompts are for testing,
and 20 of them are answered at the end; all others are learned from.
"""
PREFERRED_STRENGTHS = (1.0, 1.5)


@dataclass(frozen=True)
class Case:
    """A prepared pair: the name of its prompt, both sides' prompts, and what they have in common."""

    pair: Pair
    question: str
    positive: Side
    negative: Side
    bare: Side

    @property
    def prompted(self) -> bool:
        """Whether the positive side's prompt says more than what the sides have in common."""
        return (self.positive.prompt, self.positive.system) != (self.bare.prompt, self.bare.system)


def material_from_pairs(lm: LM, pairs: Sequence[Pair], name: str, tokens: int, *, trains: bool) -> Material:
    """The material for a steering, from pairs.

    Args:
        lm: The model.
        pairs: The pairs, all of one shape.
        name: Its name.
        tokens: The maximum length of an answer that the model writes, in tokens.
        trains: Whether to train a vector, too.

    Raises:
        TrimtabError: Too few distinct prompts, or a pair that can't be used; the message names it.
    """
    cases = [_case(pair, number) for number, pair in enumerate(pairs, 1)]
    questions = list(dict.fromkeys(case.question for case in cases))
    if len(questions) < LEAST_PROMPTS:
        what = "pairs" if cases and not cases[0].positive.prompt else "pairs with different prompts"
        raise TrimtabError(
            f"{name}: {len(questions)} {what}, and {LEAST_PROMPTS} are needed to learn from some and test on others;"
            " `trimtab learn caa` learns from fewer, without a test"
        )
    test = spread_over(questions[1::2], MOST_TESTED)
    learn = [question for question in questions if question not in set(test)]
    held_out = spread_over(learn[HELD_OUT // 2 :: HELD_OUT], MOST_HELD_OUT)
    shape, prompted = pairs[0].shape, all(case.prompted for case in cases)
    writes = shape == "prompts"
    read = partial(_written, lm, cases, tokens) if writes else partial(_from_answers, lm, cases)
    return Material(
        name=name,
        source=f"{len(pairs)} pairs",
        learn=partial(read, frozenset(learn)),
        test=partial(read, frozenset(test)),
        held_out_questions=frozenset(held_out),
        writes=writes,
        prompted=prompted,
        trained_candidates=_trained_candidates(lm, cases, name, prompted) if trains else (),
        final_prompts=_final_prompts(cases, spread_over(test, MAX_FINAL_PROMPTS), shape),
        options={"shape": shape},
        data=digest(pairs),
    )


def spread_over(texts: Sequence[str], most: int) -> list[str]:
    """At most `most` of the texts, evenly spaced."""
    count = min(len(texts), most)
    return [texts[i * len(texts) // count] for i in range(count)]


# ---- prompts -----------------------------------------------------------------------------------------------


def _case(pair: Pair, number: int) -> Case:
    positive, negative = (with_system_apart(side) for side in sides(pair))
    if pair.shape != "prompts" and positive.answer.strip() == negative.answer.strip():
        raise TrimtabError(
            f"pair {number}: both sides have the same answer, so the wanted one can't be recognized; give"
            " pairs of prompts (prompt, prompt_without_instruction), which the model answers itself"
        )
    bare = shared_side(positive, negative)
    return Case(pair, _named(bare.prompt) or f"pair {number}", positive, negative, bare)


def _named(prompt: Content) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    return prompt[0][1] if len(prompt) == 1 else "\n".join(f"{role}: {content}" for role, content in prompt)


# ---- given answers and generated answers ---------------------------------------------------------------------


def _from_answers(lm: LM, cases: Sequence[Case], questions: frozenset[str], progress: Progress | None) -> Contrasts:
    """The pairs' own answers."""
    positive, negative = [], []
    for number, case in enumerate(cases, 1):
        if case.question in questions:
            with error_prefix(f"pair {number}"):
                mine, other = _encoded(lm, case)
                positive.append(mine)
                negative.append(other)
    return Contrasts(tuple(positive), tuple(negative), 2 * len(positive))


def _encoded(lm: LM, case: Case) -> tuple[Answer, Answer]:
    """Both answers as token ids.

    An answer that is a letter ends with it; a bare text is split into its first token as the prompt and the rest as the
    answer.
    """
    pair, both = case.pair, (case.positive, case.negative)
    if pair.shape == "letters":
        letters = [letter_of(side.answer) for side in both]
        questions = [side_question(lm.tokenizer, side, (letter,)) for side, letter in zip(both, letters, strict=True)]
        prompts = [question.prompt for question in questions]
        answers = [
            (*question.opening, question.letters[letter]) for question, letter in zip(questions, letters, strict=True)
        ]
        bare = side_question(lm.tokenizer, case.bare, letters).prompt
    else:
        encoded = encode_sides(lm.tokenizer, pair)
        starts = [part.start or 1 for part in encoded]
        prompts = [part.ids[:start] for part, start in zip(encoded, starts, strict=True)]
        answers = [part.ids[start:] for part, start in zip(encoded, starts, strict=True)]
        bare = tuple(encode_prompt(lm.tokenizer, case.bare)) if pair.shape == "answers" else ()
    if not all(answers):
        raise TrimtabError("a text of a single token can't be distinguished from others; write more")
    for prompt, ids in zip(prompts, answers, strict=True):
        check_length(lm.layout, max(len(prompt), len(bare)) + len(ids), "a prompt with its answer")
    others = (prompts[1], prompts[0])
    mine, other = (
        Answer(case.question, tuple(own), tuple(not_own), tuple(bare or own), tuple(ids), side.answer)
        for own, not_own, ids, side in zip(prompts, others, answers, both, strict=True)
    )
    return mine, other


def _written(
    lm: LM, cases: Sequence[Case], tokens: int, questions: frozenset[str], progress: Progress | None
) -> Contrasts:
    """The model's own answers to both prompts of each pair."""
    rows = []
    for case in cases:
        if case.question in questions:
            mine, other, bare = (prompt_of(side) for side in (case.positive, case.negative, case.bare))
            rows += [
                PromptedQuestion(True, case.question, mine, other, bare),
                PromptedQuestion(False, case.question, other, mine, bare),
            ]
    return generate_contrasts(lm, rows, tokens, progress)


# ---- training and final questions --------------------------------------------------------------------------


def _trained_candidates(lm: LM, cases: Sequence[Case], name: str, prompted: bool) -> tuple[TrainedCandidate, ...]:
    """Distillation, if a prompt produces the wanted answers; else training by preference, except for bare texts."""
    if prompted:
        return distillation_candidates(lm, name)
    if cases[0].pair.shape == "texts":
        return ()
    learn = partial(_learn_by_preference, lm, _by_question(cases))
    return (TrainedCandidate("by preference", learn, PREFERRED_STRENGTHS),)


def _learn_by_preference(
    lm: LM,
    pairs: Mapping[str, Sequence[Pair]],
    learned: Contrasts,
    positions: Positions,
    seed: int,
    _say: Say | None,
    progress: Progress | None,
) -> Steering:
    """A vector at every block that prefers the wanted answers (BiPO, `learn_bipo`)."""
    answer_pairs = [replace(pair, shape="answers") for question in learned.questions for pair in pairs[question]]
    layers = range(first_layer(positions), lm.layout.layers)
    return learn_bipo(lm, answer_pairs, layers, steps=STEPS, rate=RATE, seed=seed, progress=progress).at(positions)


def _by_question(cases: Sequence[Case]) -> dict[str, list[Pair]]:
    by_question: dict[str, list[Pair]] = {}
    for case in cases:
        by_question.setdefault(case.question, []).append(case.pair)
    return by_question


def _final_prompts(cases: Sequence[Case], questions: Sequence[str], shape: str) -> tuple[FinalPrompt, ...]:
    """The pairs' own prompts; general questions if a pair has none, or one that is answered by a letter."""
    if shape in ("texts", "letters"):
        return tuple(FinalPrompt(question, question) for question in spread_over(queries("test"), MAX_FINAL_PROMPTS))
    first = {case.question: case for case in reversed(cases)}
    return tuple(
        FinalPrompt(
            question,
            prompt_of(first[question].bare),
            prompt_of(first[question].positive) if first[question].prompted else None,
        )
        for question in questions
    )
