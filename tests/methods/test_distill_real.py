"""A prompt compiled into an edit of the default model: a few queries and steps tell whether it learns at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab import LM, Add, Steering, load, save
from trimtab.data import queries
from trimtab.engines.transformers.forced import Change, PromptAnswer, teacher_forcing
from trimtab.learn.own_answers import Lesson, generate_own_answers
from trimtab.learn.soft_targets import divergence, soft_targets
from trimtab.learn.teachers import Teacher
from trimtab.methods.distill import learn_distill
from trimtab.steering import Site

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.long]

TEACHER = Teacher(("Answer in capital letters only.", "WRITE YOUR WHOLE ANSWER IN CAPITAL LETTERS."))
TOKENS = 16
STEPS = 16


def something(_query: str, answer: str, _cut: bool) -> bool:
    return len(answer.split()) > 1


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return queries("learn", more=True)[:8]


@pytest.fixture(scope="module")
def lessons(lm: LM, questions: list[str]) -> tuple[Lesson, ...]:
    """The answers that are learned from: greedy ones, so that making them again gives the same."""
    return generate_own_answers(lm, TEACHER, questions, check=something, tokens=TOKENS).lessons


@pytest.fixture(scope="module")
def learned(lm: LM, questions: list[str]) -> Steering:
    middle = lm.layout.layers // 2
    return learn_distill(
        lm,
        [middle - 5, middle],
        teacher=TEACHER,
        queries=questions,
        check=something,
        tokens=TOKENS,
        steps=STEPS,
        rate=0.04,
        with_prompt=0.0,
    )


def distance(lm: LM, lessons: tuple[Lesson, ...], steering: Steering) -> float:
    """From the prompted model, in nats per token, over all answers."""
    changes: dict[Site, Change] = {}
    for edit in steering.edits:
        assert isinstance(edit.operation, Add)
        changes[edit.site] = lambda x, vector=edit.operation.direction: vector.expand_as(x)  # type: ignore[misc]
    with teacher_forcing(lm.model, lm.layout, sorted(changes)) as run, torch.no_grad():
        targets = soft_targets(run, lessons)
        rows = [run.logits([PromptAnswer(lesson.plain, lesson.answer)], changes)[0] for lesson in lessons]
        return sum(float(divergence(*both).mean()) for both in zip(rows, targets, strict=True)) / len(lessons)


def test_it_gets_nearer_to_the_prompted_model(lm: LM, lessons: tuple[Lesson, ...], learned: Steering) -> None:
    before, after = distance(lm, lessons, Steering()), distance(lm, lessons, learned)
    assert after < 0.5 * before


def test_it_is_small_and_is_the_same_from_its_file(lm: LM, learned: Steering, tmp_path: Path) -> None:
    assert max(learned.card.measured["doses"].values()) <= 1.0
    save(learned, tmp_path / "capitals.safetensors")
    loaded = load(tmp_path / "capitals.safetensors")
    assert loaded == learned
    both = [lm.generate("What is a river?", steering, max_new_tokens=8)[0].token_ids for steering in (loaded, learned)]
    assert both[0] == both[1]
