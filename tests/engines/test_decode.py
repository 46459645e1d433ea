"""Rows that join and leave a batch get what each gets alone, on tiny random models of many families."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from batches import drain, steering
from tiny import FAMILIES, LAYERS, by_transformers, direction, prompt

from trimtab import (
    LM,
    Ablate,
    Add,
    Edit,
    Positions,
    ScaleScores,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
)
from trimtab.engines.transformers.columns import MIN_SPARE_COLUMNS
from trimtab.engines.transformers.decode import PREFILL, GenerationBatch, GenerationRequest, GenerationResponse
from trimtab.engines.transformers.sampling import Sampling
from trimtab.steering import Rotate, emphasis

STEPPED = [family for family in FAMILIES if family not in ("mixtral",)]  # one mixture of experts will do
SCORES = ("llama", "qwen3", "gemma3", "gemma2")  # families whose attention can be steered, windows and caps included


@pytest.fixture(scope="module", params=STEPPED)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


STEERINGS = [
    None,
    steering((1, Add(direction(1, 2.0)), Positions.from_last_prompt_token())),
    steering((1, SetProjection(direction(2), target=1.5), Positions.all()), (3, Add(direction(3)), Positions.all())),
    steering((0, Ablate(direction(4)), Positions.all_but_first()), (2, Add(direction(5, 3.0)), Positions.prompt())),
    steering((2, Add(direction(6, 2.0), keep_norm=True), Positions.first_generated(2))),
    steering((2, Rotate(direction(7), one_sided=False), Positions.window(1, 4))),
    steering((1, Add(direction(8, 3.0)), Positions.all())).when(Threshold(Site(0), direction(9), 0.0)),
    steering((1, Add(direction(8, 3.0)), Positions.all())).when(~Threshold(Site(0), direction(9), 0.0)),
    0.0 * steering((1, Add(direction(1, 2.0)), Positions.all())),
]


def request_of(lm: LM, number: int, length: int, count: int, **more: Any) -> GenerationRequest:
    ids = tuple(lm.encode(prompt(number, length)))
    return GenerationRequest(ids, STEERINGS[number % len(STEERINGS)], count, **more)


def stepper(lm: LM) -> GenerationBatch:
    return GenerationBatch(lm.model, lm.tokenizer, lm.layout)


def alone(lm: LM, number: int, length: int, count: int, **options: Any) -> Any:
    (answer,) = lm.generate(
        prompt(number, length),
        STEERINGS[number % len(STEERINGS)],
        max_new_tokens=count,
        chat=False,
        logprobs=True,
        **{**by_transformers(), **options},
    )
    return answer


class TestRowsGetWhatTheyGetAlone:
    @pytest.mark.long_unless(lambda lm, seed: seed == 0 or lm in SCORES)
    @pytest.mark.parametrize("seed", range(2))
    def test_joining_at_random_steps(self, lm: LM, seed: int) -> None:
        """Prompts longer and shorter than the batch, several at once, some leaving in the middle."""
        chance = random.Random(seed)
        waiting = [(number, chance.randint(2, 14), chance.randint(1, 9)) for number in range(12)]
        expected = {number: alone(lm, number, length, count) for number, length, count in waiting}
        batch, responses, of = stepper(lm), {}, {}
        cancelled: set[int] = set()
        while waiting or len(batch):
            for _ in range(min(len(waiting), chance.choice([0, 0, 1, 3]))):
                number, length, count = waiting.pop(0)
                of[batch.insert(request_of(lm, number, length, count, alternatives=2))] = number
            before = batch.running
            steps = batch.step()
            assert len({step.key for step in steps}) == len(steps) >= before
            for response in steps:
                assert response.error is None
                responses.setdefault(response.key, []).append(response)
            if chance.random() < 0.1 and batch.running:
                key = chance.choice([row.key for row in batch._rows])
                assert batch.remove(key) is not None
                cancelled.add(key)
        assert set(of.values()) == set(range(12))
        tolerance = 2e-3 if lm.model.dtype == torch.float32 else 1e-4
        for key, number in of.items():
            answer, own = expected[number], responses.get(key, [])
            ids = [token.token for token in own]
            if key in cancelled:
                assert ids == list(answer.token_ids)[: len(ids)]
                assert not any(token.finish for token in own)
                continue
            assert ids == list(answer.token_ids)
            assert [token.logprob for token in own] == pytest.approx(answer.logprobs, abs=tolerance)
            assert all(token.likeliest[0] == (token.token, token.logprob) for token in own)
            assert [token.finish for token in own] == [None] * (len(ids) - 1) + ["length"]
            assert own[-1].applied is not None
            assert own[-1].applied.edits == answer.applied.edits

    def test_samples_are_those_of_the_seed(self, llama: LM) -> None:
        batch = stepper(llama)
        wanted: dict[int, Any] = {}
        for number in range(6):
            sampling = Sampling(0.8 + number / 10, 1.0 if number % 2 else 0.7, seed=number)
            key = batch.insert(request_of(llama, number, 5 + number, 7, sampling=sampling))
            more = {"seed": number, "stopping_criteria": None, **sampling.options}
            wanted[key] = alone(llama, number, 5 + number, 7, **more)
            batch.step()
        responses = drain(batch)
        for key, answer in wanted.items():
            ids = [response.token for response in responses[key]]
            assert tuple(ids) == answer.token_ids[-len(ids) :]  # it had begun before
        greedy = {number: alone(llama, number, 5 + number, 7).token_ids for number in range(6)}
        assert any(wanted[key].token_ids != greedy[n] for n, key in enumerate(wanted))

    @pytest.mark.parametrize("family", SCORES)
    def test_edits_of_attention_scores(self, family: str) -> None:
        lm = tiny.tiny(family)
        towards = emphasis(ScaleScores(3.0), [(1, 3)], range(LAYERS))
        both = towards + STEERINGS[1]  # type: ignore[operator]
        rows = [(1, 4, towards), (2, 11, both), (3, 6, None), (4, 9, towards), (5, 5, STEERINGS[3])]
        batch, keys = stepper(lm), []
        responses: dict[int, list[GenerationResponse]] = {}
        for number, length, acting in rows:
            keys.append(batch.insert(GenerationRequest(tuple(lm.encode(prompt(number, length))), acting, 6)))
            for token in batch.step():
                responses.setdefault(token.key, []).append(token)
        for key, tokens in drain(batch).items():
            responses.setdefault(key, []).extend(tokens)
        changed = 0
        for key, (number, length, acting) in zip(keys, rows, strict=True):
            (answer,) = lm.generate(
                prompt(number, length), acting, max_new_tokens=6, rejection=False, **by_transformers()
            )
            assert tuple(token.token for token in responses[key]) == answer.token_ids
            (plain,) = lm.generate(prompt(number, length), max_new_tokens=6)
            changed += plain.token_ids != answer.token_ids
        assert changed >= 3

    def test_beyond_the_room_that_was_allocated(self) -> None:
        """Buffers grow in the middle of an answer, and a long row that leaves takes its columns with it."""
        lm = tiny.tiny("llama", seed=3)
        lm.layout = type(lm.layout)(**{**vars(lm.layout), "context": None})
        batch = stepper(lm)
        keys = [batch.insert(request_of(lm, 1, 4, MIN_SPARE_COLUMNS + 20)), batch.insert(request_of(lm, 2, 60, 5))]
        early = batch.step() + batch.step()
        assert batch._cache.width == 61
        keys.append(batch.insert(request_of(lm, 3, 7, 30)))
        responses = drain(batch)
        for response in reversed(early):
            responses[response.key].insert(0, response)
        for key, (number, length, count) in zip(
            keys, ((1, 4, MIN_SPARE_COLUMNS + 20), (2, 60, 5), (3, 7, 30)), strict=True
        ):
            assert tuple(token.token for token in responses[key]) == alone(lm, number, length, count).token_ids
        assert batch._cache.width == 0

    def test_the_models_own_generation_settings_count(self) -> None:
        lm = tiny.tiny("llama")
        lm.model.generation_config.repetition_penalty = 1.7
        expected = [alone(lm, number, 6, 12).token_ids for number in range(3)]
        lm.model.generation_config.repetition_penalty = 1.0
        assert [alone(lm, number, 6, 12).token_ids for number in range(3)] != expected
        lm.model.generation_config.repetition_penalty = 1.7
        batch = stepper(lm)
        keys = [batch.insert(request_of(lm, number, 6, 12)) for number in range(3)]
        responses = drain(batch)
        assert [tuple(response.token for response in responses[key]) for key in keys] == expected

    def test_an_answer_ends_where_the_model_ends_it(self) -> None:
        lm = tiny.tiny("llama")
        end = alone(lm, 1, 6, 8).token_ids[4]
        lm.model.generation_config.eos_token_id = end
        answer = alone(lm, 1, 6, 8)
        batch = stepper(lm)
        key, other = batch.insert(request_of(lm, 1, 6, 8)), batch.insert(request_of(lm, 2, 9, 8))
        responses = drain(batch)
        assert [response.token for response in responses[key]] == list(answer.token_ids)
        assert (responses[key][-1].finish, answer.finish_reason) == ("stop", "stop")
        assert tuple(response.token for response in responses[other]) == alone(lm, 2, 9, 8).token_ids


class TestTheBatch:
    def test_a_row_that_leaves_is_gone_before_the_next_step(self, llama: LM) -> None:
        batch = stepper(llama)
        keys = [batch.insert(request_of(llama, number, 6, 20)) for number in range(3)]
        batch.step()
        batch.remove(keys[1])
        assert (batch.running, len(batch._cache.lengths)) == (2, 2)
        assert {response.key for response in batch.step()} == {keys[0], keys[2]}
        assert batch.remove(keys[1]) is None
        batch.insert(request_of(llama, 5, 6, 20))
        assert len(batch.clear()) == 3
        assert len(batch) == 0
        assert batch.step() == []

    def test_rows_of_one_prompt_are_read_once(self, llama: LM) -> None:
        batch, widths = stepper(llama), []
        handle = llama.layout.decoder.register_forward_pre_hook(
            lambda _m, _a, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        keys = [batch.insert(request_of(llama, 1, 6, 5)) for _ in range(3)] + [batch.insert(request_of(llama, 2, 6, 5))]
        responses = drain(batch)
        handle.remove()
        assert widths[0] == (2, 6)
        assert set(widths[1:]) == {(4, 1)}
        for key in keys[:3]:
            assert tuple(response.token for response in responses[key]) == alone(llama, 1, 6, 5).token_ids

    def test_one_step_reads_so_many_tokens_at_most(self, llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        assert PREFILL > 100
        monkeypatch.setattr("trimtab.engines.transformers.decode.PREFILL", 20)
        batch = stepper(llama)
        keys = [batch.insert(request_of(llama, number, 8, 4)) for number in range(5)]
        firsts = [[response.key for response in batch.step()] for _ in range(3)]
        assert firsts == [keys[:2], keys[:4], keys]

    def test_what_steered_a_row_is_what_steered_it_alone(self, llama: LM) -> None:
        """All tokens are measured up to the stride, so short answers have the same dose wherever they are."""
        push = steering((1, Add(direction(1, 2.0)), Positions.all()))
        batch = stepper(llama)
        key = batch.insert(GenerationRequest(tuple(llama.encode(prompt(1, 6))), push, 2))
        batch.insert(request_of(llama, 2, 9, 2))
        batch.step()
        halfway = batch.applied(key)
        assert halfway is not None
        assert [(d.layer, d.tokens) for d in halfway.doses] == [(1, 6)]
        responses = {t.key: t for t in batch.step()}
        (answer,) = llama.generate(prompt(1, 6), push, max_new_tokens=2)
        applied = responses[key].applied
        assert applied is not None
        assert [(d.layer, d.tokens) for d in applied.doses] == [(d.layer, d.tokens) for d in answer.applied.doses]
        assert applied.dose == pytest.approx(answer.applied.dose, rel=1e-5)

    def test_a_row_steered_to_pieces_leaves_the_others_alone(self, llama: LM) -> None:
        wild = steering((1, Add(direction(1, 1e300)), Positions.generated()))
        batch = stepper(llama)
        bad = batch.insert(GenerationRequest(tuple(llama.encode(prompt(1, 9))), wild, 6))
        good = batch.insert(request_of(llama, 2, 6, 6))
        early = batch.step() + batch.step()
        late = batch.insert(request_of(llama, 3, 4, 6))  # takes a place in which there are no numbers
        more = drain(batch)
        errors = [response for response in [*early, *more.get(bad, [])] if response.error]
        assert [response.key for response in errors] == [bad]
        assert "lower the strength" in str(errors[0].error)
        ids = [response.token for response in [*early, *more[good]] if response.key == good]
        assert tuple(ids) == alone(llama, 2, 6, 6).token_ids
        assert tuple(response.token for response in more[late]) == alone(llama, 3, 4, 6).token_ids

    def test_nothing_is_left_on_the_model(self, llama: LM) -> None:
        def hooks() -> int:
            return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules())

        before, own = hooks(), llama.model.config._attn_implementation
        batch = stepper(llama)
        batch.insert(GenerationRequest(tuple(llama.encode(prompt(1, 6))), emphasis(ScaleScores(), [(1, 2)], [0, 1]), 4))
        batch.insert(request_of(llama, 1, 6, 4))
        batch.step()
        batch.step()
        assert (hooks(), llama.model.config._attn_implementation) == (before, own)

    def test_what_cant_run_is_said_before(self, llama: LM) -> None:
        batch = stepper(llama)
        with pytest.raises(TrimtabError, match="context"):
            batch.insert(request_of(llama, 1, 100, 100))
        far = GenerationRequest(
            tuple(llama.encode(prompt(1, 6))), steering((1, Add(direction(1)), Positions.span(3, 99))), 4
        )
        with pytest.raises(TrimtabError, match="span 3:99"):
            batch.insert(far)
        for bad in ({"temperature": float("nan")}, {"temperature": -1}, {"top_p": 2.0}, {"seed": 1.5}):
            with pytest.raises(TrimtabError, match=next(iter(bad))):
                Sampling(**bad)  # type: ignore[arg-type]
        assert len(batch) == 0


class Heard:
    """A streamer that is its own stopping criterion: it ends the answer after so many tokens."""

    def __init__(self, most: int) -> None:
        self.most, self.tokens, self.ended = most, [], False

    def put(self, ids: torch.Tensor) -> None:
        self.tokens.append(ids.flatten().tolist())

    def end(self) -> None:
        self.ended = True

    def __call__(self, ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(ids),), len(self.tokens) - 1 >= self.most)


def test_a_streamer_that_ends_the_answer_ends_it_in_either_loop() -> None:
    """It sees what both loops see: the prompt, then a token at a time; what steered the answer so far is told."""
    lm = tiny.tiny("llama")
    steering = Steering((Edit(Site(1), Add(direction(1, 0.3))),))
    (whole,) = lm.generate([prompt(1, 6)], steering, max_new_tokens=8)
    never = {"stopping_criteria": [lambda ids, _scores, **_: torch.zeros(len(ids), dtype=torch.bool)]}
    for sampled in ({}, {"do_sample": True, "seed": 3}):
        heard = Heard(3)
        (cut,) = lm.generate(
            [prompt(1, 6)], steering, max_new_tokens=8, streamer=heard, stopping_criteria=[heard], **sampled
        )
        assert (len(cut.token_ids), cut.finish_reason, heard.ended) == (3, "length", True)
        assert [token for some in heard.tokens[1:] for token in some] == list(cut.token_ids)
        assert cut.applied.doses
        assert cut.applied.edits == whole.applied.edits
        (full,) = lm.generate([prompt(1, 6)], steering, max_new_tokens=8, **sampled)
        assert full.token_ids[:3] == cut.token_ids
    (greedy,) = lm.generate([prompt(1, 6)], steering, max_new_tokens=8, **never)
    assert greedy.token_ids == whole.token_ids
