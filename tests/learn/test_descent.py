"""Gradient descent on edits: where it ends, when it stops, and that it does so again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from tiny import WIDTH, direction, prompt
from torch import Tensor

from trimtab import LM, Site, TrimtabError
from trimtab.engines.transformers.forced import PromptAnswer, TeacherForcing, group_by_pass, teacher_forcing
from trimtab.learn import soft_targets
from trimtab.learn.descent import PATIENCE, Descent, DescentHistory, descend
from trimtab.learn.parameters import LowRankParameters
from trimtab.learn.soft_targets import _likeliest as likeliest
from trimtab.learn.soft_targets import divergence

SITE = Site(1)
TARGETS = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(7)]
MEAN = torch.stack(TARGETS).mean(0)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


@pytest.fixture
def run(lm: LM) -> Iterator[TeacherForcing]:
    with teacher_forcing(lm.model, lm.layout, [SITE]) as opened:
        yield opened


def start(rank: int = 0, seed: int = 0) -> LowRankParameters:
    return LowRankParameters.initial({SITE: 1.0}, {SITE: WIDTH}, rank, seed, torch.device("cpu"))


def distance(_run: TeacherForcing, trained: LowRankParameters, some: Sequence[Tensor]) -> Tensor:
    """Convex: the sum of squared distances of the vector from what each example would have."""
    return torch.stack([(trained.by_site[SITE].vector - target).square().sum() for target in some]).sum()


def by(size: int) -> Callable[[Sequence[Any]], list[list[int]]]:
    return lambda some: [list(range(i, min(i + size, len(some)))) for i in range(0, len(some), size)]


def descent(
    run: TeacherForcing,
    how: Descent,
    held_out: Sequence[Tensor] = (),
    examples: Sequence[Tensor] = TARGETS,
    loss: Any = distance,
    report: Any = None,
    size: int = 3,
) -> tuple[LowRankParameters, DescentHistory]:
    return descend(run, start(), examples, held_out, loss, how, group_examples=by(size), report=report)


# ---- where it ends -------------------------------------------------------------------------------------------


def test_it_reaches_the_optimum(run: TeacherForcing) -> None:
    trained, course = descent(run, Descent(steps=300, rate=0.05, batch=7, max_dose=100))
    assert torch.allclose(trained.by_site[SITE].vector, MEAN, atol=0.02)
    assert (course.steps, len(course.losses), course.interrupted) == (300, 300, False)
    assert course.losses[-1] < course.losses[0]
    assert math.isnan(course.first_loss)


def test_how_examples_are_grouped_doesnt_matter(run: TeacherForcing) -> None:
    vectors = [descent(run, Descent(steps=20, batch=5), size=size)[0].by_site[SITE].vector for size in (1, 2, 7)]
    assert torch.allclose(vectors[0], vectors[1], atol=1e-6)
    assert torch.allclose(vectors[0], vectors[2], atol=1e-6)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_vector_does_to_a_model_is_found_again(lm: LM, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is the model with a vector in it."""
    monkeypatch.setattr(soft_targets, "TEMPERATURE", 1.0)
    planted = direction(3, 4.0)
    texts = [
        PromptAnswer(tuple(lm.encode(prompt(i, 3 + i % 4))), tuple(lm.encode(prompt(50 + i, 5)))) for i in range(10)
    ]
    with teacher_forcing(lm.model, lm.layout, [SITE]) as run:
        with torch.no_grad():
            likeliest_tokens = [likeliest(row) for row in run.logits(texts, {SITE: lambda x: planted.expand_as(x)})]

        def loss(run: TeacherForcing, trained: LowRankParameters, some: Sequence[int]) -> Tensor:
            rows = run.logits([texts[i] for i in some], trained.changes())
            return torch.stack(
                [divergence(row, likeliest_tokens[i]).mean() for row, i in zip(rows, some, strict=True)]
            ).sum()

        learned, course = descend(
            run,
            start(rank),
            range(8),
            [8, 9],
            loss,
            Descent(steps=60, rate=0.05, every=20, max_dose=2.0),
            group_examples=lambda some: group_by_pass(lm.model, [texts[i] for i in some]),
        )
    assert course.losses[-1] < 0.05 * course.losses[0]
    assert course.best_loss < course.first_loss
    if rank == 0:  # with more to choose from, eight texts don't tell a vector from a map
        assert course.best_loss < 0.1 * course.first_loss
        assert torch.cosine_similarity(learned.by_site[SITE].vector, planted.float(), dim=0) > 0.9
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_no_vector_gets_longer_than_it_may(run: TeacherForcing) -> None:
    seen: list[float] = []
    trained = start()

    def report(_done: int, _total: int, _words: str) -> None:
        seen.append(trained.doses()[SITE])

    descend(
        run,
        trained,
        TARGETS,
        [],
        distance,
        Descent(steps=30, rate=0.3, max_dose=0.2),
        group_examples=by(3),
        report=report,
    )
    assert max(seen) <= 0.2 * (1 + 1e-5)
    assert seen[-1] == pytest.approx(0.2, rel=1e-4)


def test_the_best_on_what_is_held_out_is_kept(run: TeacherForcing) -> None:
    """It is between the beginning and where the examples lead, so that it is passed on the way."""
    aside = [0.3 * MEAN]
    best, course = descent(run, Descent(steps=200, rate=0.05, batch=7, every=1, max_dose=100), aside)
    assert course.first_loss == pytest.approx(float(aside[0].square().sum()), rel=1e-5)
    assert 0 < course.best_step < course.steps
    assert course.best_loss == pytest.approx(float(distance(run, best, aside)), rel=1e-5)
    again, _ = descent(
        run, Descent(steps=200, rate=0.05, batch=7, every=1, max_dose=100), aside, report=stop_at(course.best_step)
    )
    assert torch.equal(again.by_site[SITE].vector, best.by_site[SITE].vector)


def test_with_slack_it_is_the_last_that_is_hardly_worse(run: TeacherForcing) -> None:
    """The loss on what is held out falls, and rises again past 0.3 of the way."""
    aside, reported = [0.3 * MEAN], dict[int, float]()
    trained = start()

    def report(done: int, _total: int, _words: str) -> None:
        reported[done] = float(distance(run, trained.frozen(), aside))

    for slack in (0.0, 0.5, 2.0):
        reported.clear()
        trained = start()
        how = Descent(steps=200, rate=0.05, batch=7, every=1, max_dose=100, slack=slack)
        chosen, course = descend(run, trained, TARGETS, aside, distance, how, group_examples=by(3), report=report)
        lowest = min(reported.values())
        fine = [step for step, value in reported.items() if value <= (1 + slack) * lowest and value < course.first_loss]
        assert course.best_step == max(fine)
        assert course.best_loss == pytest.approx(reported[max(fine)], rel=1e-4)
        assert course.best_loss == pytest.approx(float(distance(run, chosen, aside)), rel=1e-4)
        assert course.best_loss < course.first_loss
        assert course.steps == course.best_step + PATIENCE


def test_what_comes_back_stays_as_it_is(run: TeacherForcing) -> None:
    trained = start()
    result, _ = descend(run, trained, TARGETS, [], distance, Descent(steps=3), group_examples=by(3))
    with torch.no_grad():
        trained.by_site[SITE].vector.zero_()
    assert result.by_site[SITE].vector.any()
    assert not result.by_site[SITE].vector.requires_grad
    assert all(tensor.grad is None for tensor in trained.tensors)


# ---- when it stops -------------------------------------------------------------------------------------------


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def report(done: int, _total: int, _words: str) -> None:
        if done == step:
            raise KeyboardInterrupt

    return report


def test_patience_ends_it(run: TeacherForcing) -> None:
    best, course = descent(run, Descent(steps=100, every=2), [-5 * MEAN])
    assert (course.steps, course.best_step) == (2 * PATIENCE, 0)
    assert course.best_loss == course.first_loss
    assert not best.by_site[SITE].vector.any()


def test_an_interruption_gives_the_best_so_far(run: TeacherForcing) -> None:
    how = Descent(steps=100, every=2)
    trained, course = descent(run, how, TARGETS, report=stop_at(5))
    assert (course.steps, course.interrupted, course.best_step) == (5, True, 4)
    other, four = descent(run, how, TARGETS, report=stop_at(4))
    assert torch.equal(trained.by_site[SITE].vector, other.by_site[SITE].vector)
    assert four.best_loss == course.best_loss
    alone, course = descent(run, how, report=stop_at(5))  # nothing is held out: as it is
    assert course.interrupted
    assert not torch.equal(alone.by_site[SITE].vector, trained.by_site[SITE].vector)


@pytest.mark.parametrize("call", [1, 2, 9])
def test_an_interruption_in_the_middle_of_a_step(run: TeacherForcing, call: int) -> None:
    calls = Counter[str]()

    def loss(run: TeacherForcing, trained: LowRankParameters, some: Sequence[Tensor]) -> Tensor:
        calls["loss"] += 1
        if calls["loss"] == call:
            raise KeyboardInterrupt
        return distance(run, trained, some)

    learned, course = descent(run, Descent(steps=50, every=1), [MEAN], loss=loss)
    assert course.interrupted
    assert course.steps < 5
    assert bool(learned.by_site[SITE].vector.any()) == (course.best_step > 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(run: TeacherForcing, value: float) -> None:
    calls = Counter[str]()

    def loss(run: TeacherForcing, trained: LowRankParameters, some: Sequence[Tensor]) -> Tensor:
        calls["loss"] += 1
        return distance(run, trained, some) * (value if calls["loss"] > 5 else 1.0)

    with pytest.raises(TrimtabError, match=r"the loss is (nan|inf) at step 3; a lower rate may help"):
        descent(run, Descent(steps=50, batch=6), loss=loss)


def test_errors(run: TeacherForcing) -> None:
    with pytest.raises(TrimtabError, match="no texts to learn from"):
        descent(run, Descent(), examples=[])
    for name in ("steps", "rate", "batch", "every", "max_dose"):
        for value in (0, -1, math.nan):
            with pytest.raises(TrimtabError, match=f"{name} of a descent is above 0"):
                Descent(**{name: value})
    for value in (-0.1, math.nan):
        with pytest.raises(TrimtabError, match="slack of a descent is 0 or more"):
            Descent(slack=value)


# ---- again and in order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (5, 8), (8, 8), (1, 4)])
def test_every_example_once_before_any_comes_again(run: TeacherForcing, count: int, batch: int) -> None:
    drawn: list[int] = []

    def loss(run: TeacherForcing, trained: LowRankParameters, some: Sequence[int]) -> Tensor:
        drawn.extend(some)
        return trained.by_site[SITE].vector.square().sum()

    descend(run, start(), range(count), [], loss, Descent(steps=12, batch=batch), group_examples=by(2))
    assert len(drawn) == 12 * min(batch, count)
    for i in range(0, len(drawn), count):
        assert max(Counter(drawn[i : i + count]).values()) == 1


def test_the_same_seed_gives_the_same_bits(run: TeacherForcing) -> None:
    how = Descent(steps=9, batch=2)
    first, second = (descent(run, how, TARGETS[:2]) for _ in range(2))
    other, _ = descent(run, Descent(steps=9, batch=2, seed=1), TARGETS[:2])
    assert torch.equal(first[0].by_site[SITE].vector, second[0].by_site[SITE].vector)
    assert first[1] == second[1]
    assert not torch.equal(first[0].by_site[SITE].vector, other.by_site[SITE].vector)


def test_each_step_is_reported(run: TeacherForcing) -> None:
    reported: list[tuple[int, int, str]] = []
    descent(run, Descent(steps=4, every=3), TARGETS[:1], report=lambda *words: reported.append(words))
    assert [(done, total) for done, total, _ in reported] == [(i, 4) for i in range(1, 5)]
    assert all("loss " in words and "held out " in words for _, _, words in reported)
