"""Verified rows in one batch with greedy and sampled ones: nobody's answer depends on the others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import naive_rejection
import pytest
import tiny
import torch
from batches import drain
from test_decode import STEERINGS, stepper
from tiny import LAYERS, direction, prompt

from trimtab import LM, Ablate, Add, Edit, Positions, Rejection, Site, Steering, Threshold, TrimtabError
from trimtab.decoding.trace import Trace
from trimtab.engines.transformers import decode
from trimtab.engines.transformers.batch_row import GenerationRequest, GenerationResponse
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.forks import Forks
from trimtab.engines.transformers.sampling import GREEDY, Sampling
from trimtab.steering import BiasScores, ScaleScores, TargetMass, emphasis

FAMILIES = ("llama", "gemma3", "gpt2", "qwen3")
SCHEDULES = ("optimistic", "fused")
ADDED = Steering(tuple(Edit(Site(layer), Add(direction(3 + layer, 3.0))) for layer in range(LAYERS)))
BESIDE = Steering((Edit(Site(1), Ablate(direction(9)), Positions.all()), *ADDED.edits))
GATED = ADDED.when(Threshold(Site(0), direction(9), -1e9))
SHUT = ADDED.when(Threshold(Site(0), direction(9), 1e9))
EMPHASIS = emphasis(ScaleScores(20.0), [(1, 3)], range(LAYERS))
MASS = emphasis(TargetMass(0.6), [(0, 2)], range(LAYERS)) + emphasis(BiasScores(2.0), [(1, 2)], [1, 2])
HOT = Sampling(1.2, seed=5)
WAYS: list[tuple[Steering | None, Rejection | None, Sampling]] = [
    (EMPHASIS, Rejection(0.3), GREEDY),  # DIRECTER
    (STEERINGS[1], None, GREEDY),
    (BESIDE, Rejection(0.3, ladder="strength"), GREEDY),
    (None, None, Sampling(0.9, 0.8, seed=2)),
    (MASS, Rejection(0.2, 1, ranking="repo"), GREEDY),
    (STEERINGS[2], None, Sampling(0.8, seed=3, top_k=20)),
    (EMPHASIS + ADDED, Rejection(0.1), HOT),
    (SHUT, Rejection(0.3), GREEDY),
    (None, Rejection(0.3), GREEDY),
    (GATED, Rejection(0.3), Sampling(repetition_penalty=1.5)),
    (ADDED, Rejection(0.0, ladder="strength"), Sampling(0.7, 0.9, seed=8, min_p=0.05, repetition_penalty=1.2)),
    (None, None, GREEDY),
]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


def request_of(lm: LM, number: int, count: int, **more: Any) -> GenerationRequest:
    steering, rejection, sampling = WAYS[number % len(WAYS)]
    ids = tuple(lm.encode(prompt(number, 3 + number % 9)))
    return GenerationRequest(ids, steering, count, sampling, rejection=rejection, **more)


def with_schedule(request: GenerationRequest, schedule: str) -> GenerationRequest:
    from dataclasses import replace

    rejection = None if request.rejection is None else replace(request.rejection, schedule=schedule)
    return replace(request, rejection=rejection)


def alone(lm: LM, request: GenerationRequest) -> list[GenerationResponse]:
    batch = stepper(lm)
    key = batch.insert(request)
    return drain(batch)[key]


def same(responses: list[GenerationResponse], expected: list[GenerationResponse], tolerance: float = 1e-4) -> None:
    assert [a.token for a in responses] == [b.token for b in expected]
    assert [a.finish for a in responses] == [b.finish for b in expected]
    for a, b in zip(responses, expected, strict=True):
        assert a.error is b.error is None
        assert a.logprob == pytest.approx(b.logprob, abs=tolerance)
    mine, theirs = responses[-1], expected[-1]
    assert (mine.trace is None) == (theirs.trace is None)
    if mine.trace is not None and theirs.trace is not None:
        assert (mine.trace.steps, mine.trace.candidates, mine.trace.order) == (
            theirs.trace.steps,
            theirs.trace.candidates,
            theirs.trace.order,
        )
    assert mine.applied is not None
    assert theirs.applied is not None
    assert mine.applied.edits == theirs.applied.edits


class TestNeighboursDontMatter:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_rows_that_join_and_leave_at_random_steps(self, lm: LM, schedule: str) -> None:
        chance = random.Random(schedule)
        requests = [with_schedule(request_of(lm, n, 3 + n % 5, alternatives=1), schedule) for n in range(len(WAYS))]
        expected = [alone(lm, request) for request in requests]
        waiting = list(range(len(requests)))
        chance.shuffle(waiting)
        batch, responses, of = stepper(lm), {}, {}
        while waiting or len(batch):
            for _ in range(min(len(waiting), chance.choice([0, 1, 2, 4]))):
                number = waiting.pop()
                of[batch.insert(requests[number])] = number
            for response in batch.step():
                responses.setdefault(response.key, []).append(response)
        for key, number in of.items():
            same(responses[key], expected[number])
        opened = [step.open for answer in expected if answer[-1].trace for step in answer[-1].trace.steps]
        assert any(opened)
        assert not all(opened)

    def test_they_are_what_the_naive_reference_gives(self, lm: LM) -> None:
        batch, keys = stepper(lm), {}
        for number in (0, 1, 2, 3, 5):
            keys[batch.insert(request_of(lm, number, 6))] = number
            batch.step()
        # what has come before isn't looked at here
        keys2 = {batch.insert(request_of(lm, number, 6)): number for number in (0, 2)}
        responses = drain(batch)
        for key, number in keys2.items():
            steering, rejection, _ = WAYS[number]
            assert steering is not None
            assert rejection is not None
            text = prompt(number, 3 + number % 9)
            expected, _ = naive_rejection.generate(
                lm, text, steering.edits, rejection.beta, 6, halve=rejection.ladder == "halve"
            )
            assert [response.token for response in responses[key]] == expected

    def test_rows_over_copies_of_the_cache(self, llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        shared = [alone(llama, request_of(llama, n, 5, alternatives=0)) for n in range(8)]
        monkeypatch.setattr(decode, "rows_for", Forks)
        batch = stepper(llama)
        keys = []
        for n in range(8):
            keys.append(batch.insert(request_of(llama, n, 5, alternatives=0)))
            first = batch.step() if n % 3 == 0 else []
            keys[-1] = (keys[-1], first)
        responses = drain(batch)
        begun: dict[int, list[GenerationResponse]] = {}
        for _, first in keys:
            for response in first:
                begun.setdefault(response.key, []).append(response)
        for (key, _), expected in zip(keys, shared, strict=True):
            same(begun.get(key, []) + responses.get(key, []), expected)

    def test_in_lm_generate(self, llama: LM) -> None:
        """Requests of all kinds, more of them than rows; and the same ones in another order."""
        greedy = [n for n, (_, _, sampling) in enumerate(WAYS) if sampling is GREEDY]
        texts = [prompt(n, 3 + n % 9) for n in greedy]
        steerings, rejections = [WAYS[n][0] for n in greedy], [WAYS[n][1] for n in greedy]
        together = llama.generate(
            texts, steerings, rejection=rejections, max_new_tokens=6, batch_size=4, chat=False, logprobs=True
        )
        turned = llama.generate(texts[::-1], steerings[::-1], rejection=rejections[::-1], max_new_tokens=6, chat=False)[
            ::-1
        ]
        for n, answer, turned_answer in zip(greedy, together, turned, strict=True):
            expected = alone(llama, request_of(llama, n, 6, alternatives=0))
            assert list(answer.token_ids) == list(turned_answer.token_ids) == [response.token for response in expected]
            assert answer.logprobs == pytest.approx([response.logprob for response in expected], abs=1e-6)
            assert (answer.trace is None) == (WAYS[n][1] is None)


class TestSteps:
    def test_a_row_that_leaves_takes_its_drafts_along(self, llama: LM) -> None:
        """Others' drafts still come true; passes are those of the rows that are left."""
        batch = stepper(llama)
        keys = [batch.insert(request_of(llama, 0, count)) for count in (3, 8, 8)]
        responses = drain(batch)
        expected = alone(llama, request_of(llama, 0, 8))
        for key, count in zip(keys, (3, 8, 8), strict=True):
            assert [response.token for response in responses[key]] == [response.token for response in expected[:count]]
        trace, by_itself = responses[keys[1]][-1].trace, expected[-1].trace
        assert isinstance(trace, Trace)
        assert isinstance(by_itself, Trace)
        assert trace.passes == by_itself.passes

    def test_a_row_that_is_removed(self, llama: LM) -> None:
        batch = stepper(llama)
        gone, stays = (batch.insert(request_of(llama, number, 8)) for number in (0, 2))
        batch.step()
        batch.step()
        trace = batch.trace(gone)
        assert trace is not None
        assert len(trace.steps) == 2
        applied = batch.remove(gone)
        assert applied is not None
        assert len(applied.edits) == LAYERS
        assert batch.trace(gone) is None
        answer = drain(batch)[stays]
        assert [response.token for response in answer] == [
            response.token for response in alone(llama, request_of(llama, 2, 8))
        ][2:]

    def test_one_that_has_no_rung_keeps_no_other_out(self, llama: LM) -> None:
        one_layer = Steering(ADDED.edits[:1])
        bad = GenerationRequest(tuple(llama.encode(prompt(1, 5))), one_layer, 5, rejection=Rejection())
        batch = stepper(llama)
        wrong, right = batch.insert(bad), batch.insert(request_of(llama, 0, 5))
        responses = drain(batch)
        assert isinstance(responses[wrong][0].error, TrimtabError)
        same(responses[right], alone(llama, request_of(llama, 0, 5)))

    def test_edits_of_the_prompt_alone_are_refused_when_a_row_joins(self, llama: LM) -> None:
        steering = Steering((Edit(Site(1), Add(direction(1)), Positions.span(0, 2)),))
        request = GenerationRequest(
            tuple(llama.encode(prompt(1, 5))), steering, 5, rejection=Rejection(ladder="strength")
        )
        with pytest.raises(TrimtabError, match="being decoded"):
            stepper(llama).insert(request)

    def test_a_rung_that_is_no_number_is_no_plausible_one(self, llama: LM) -> None:
        far = Steering(tuple(Edit(Site(layer), Add(direction(layer, 1e300))) for layer in range(LAYERS)))
        ids = tuple(llama.encode(prompt(1, 5)))
        for schedule in SCHEDULES:
            rejection = Rejection(0.3, ladder="strength", schedule=schedule)
            steered = alone(llama, GenerationRequest(ids, 1e6 * far, 5, rejection=rejection))
            plain = alone(llama, GenerationRequest(ids, None, 5))
            assert [response.token for response in steered] == [response.token for response in plain]
            assert steered[-1].trace is not None
            assert all(step.candidate is None for step in steered[-1].trace.steps)


@pytest.fixture
def counted() -> Iterator[Any]:
    from pretend_gpu import pretending

    with pretending() as counts:
        yield counts


@pytest.mark.parametrize(("beta", "waits"), [(1.0, 1), (1e-30, 2)])
def test_a_mixed_batch_waits_as_one_row_does(counted: Any, beta: float, waits: int) -> None:
    """Once a step, and once more where a gate is open, however many rows there are and whatever is beside them."""
    from pretend_gpu import move

    lm = tiny.tiny("llama")
    move(lm.model)
    batch: GenerationBatch = stepper(lm)
    for row in range(8):
        ids = tuple(lm.encode(prompt(row, 4 + row)))
        if row % 2:
            way = {"steering": EMPHASIS if row % 4 == 1 else ADDED, "rejection": Rejection(beta, ladder="strength")}
            batch.insert(GenerationRequest(ids, max_new_tokens=30, **way))  # type: ignore[arg-type]
        else:
            batch.insert(GenerationRequest(ids, STEERINGS[1], 30, Sampling(1.0, seed=row) if row % 4 else GREEDY))
    for _ in range(7):
        batch.step()
    for _ in range(3):
        counted.clear()
        assert len(batch.step()) == 8
        _, waited, copies = counted.totals
        assert (waited, copies) == (waits, 0), (counted.waits, counted.copies)
    assert torch.isfinite(lm.model.get_input_embeddings().weight.sum().cpu())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_row_at_a_time_over_the_models_own_cache(family: str) -> None:
    """As models have it whose rows can't share a batch: they answer one prompt after the other."""
    lm = tiny.tiny(family)
    lm.check(EMPHASIS + ADDED)
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout, single_row=True)
    numbers = (0, 2, 6, 8)
    keys = [batch.insert(request_of(lm, number, 6, alternatives=1)) for number in numbers]
    responses: dict[int, list[GenerationResponse]] = {}
    while len(batch):
        for response in batch.step():
            responses.setdefault(response.key, []).append(response)
        assert batch.running <= 1
    for key, number in zip(keys, numbers, strict=True):
        same(responses[key], alone(lm, request_of(lm, number, 6, alternatives=1)))
