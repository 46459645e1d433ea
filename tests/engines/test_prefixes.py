"""Texts that go on from others: what they get is what they get without, and what is taken over is what may be."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import transformers
from batches import long_llama, run, steering
from tiny import direction, prompt

from trimtab import LM, Ablate, Add, Positions, ScaleKeys, ScaleScores, SetProjection, Site, Steering, Threshold
from trimtab.engines.transformers.batch_row import GenerationRequest, GenerationResponse
from trimtab.engines.transformers.prefixes import LEAST, PrefixBatch, RequestPrefixCache
from trimtab.steering import emphasis
from trimtab.steering.monitors import Monitor

FAMILIES = ["llama", "gemma3", "gemma2", "mistral", "gpt2", "opt", "qwen3_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


ADD = steering((1, Add(direction(1, 2.0)), Positions.all()))
OPEN = Threshold(Site(0), direction(9), -1e9)
STEERINGS = [
    None,
    ADD,
    steering((1, SetProjection(direction(2), target=1.5), Positions.generated())),
    steering((0, Ablate(direction(4)), Positions.all_but_first()), (2, Add(direction(5, 3.0)), Positions.prompt())),
    ADD.when(Threshold(Site(0), direction(9), 0.0)),
    emphasis(ScaleScores(), [(0, 2)], range(4), "x"),
    emphasis(ScaleKeys(3.0), [(0, 2)], range(4), "x"),
]


def batch_of(lm: LM, **options: Any) -> PrefixBatch:
    return PrefixBatch(
        lm.model, lm.tokenizer, lm.layout, prefixes=RequestPrefixCache(options.pop("tokens", 10_000), **options)
    )


def request_of(ids: tuple[int, ...], acting: Steering | None, count: int = 4, **more: Any) -> GenerationRequest:
    return GenerationRequest(ids, acting, count, alternatives=0, **{"scope": "a", **more})


def after(ids: tuple[int, ...], answer: list[GenerationResponse], *more: int) -> tuple[int, ...]:
    """The text, its answer, and what comes after it."""
    return (*ids, *(response.token for response in answer), *more)


class TestTexts:
    def test_they_are_the_same_with_and_without(self, lm: LM) -> None:
        """Dialogues of three turns, several at once, each under a steering that may change, clean caches among them."""
        chance = random.Random(1)
        batch, plain = batch_of(lm), batch_of(lm, tokens=0)
        talks = [tuple(lm.encode(prompt(n, 18 + n))) for n in range(len(STEERINGS))]
        of = list(STEERINGS)
        reused = 0
        for turn in range(3):
            requests = [
                request_of(ids, acting, 4, clean_cache=n in (1, 2) and turn != 1, scope="ab"[n % 2])
                for n, (ids, acting) in enumerate(zip(talks, of, strict=True))
            ]
            results, wanted = run(batch, *requests), run(plain, *requests)
            for mine, theirs in zip(results, wanted, strict=True):
                assert [response.token for response in mine] == [response.token for response in theirs]
                tolerance = 2e-3 if lm.model.dtype.itemsize == 4 else 1e-6
                assert [response.logprob for response in mine] == pytest.approx(
                    [response.logprob for response in theirs], abs=tolerance
                )
                assert not any(response.cached for response in theirs)
                reused += mine[0].cached
            talks = [
                after(ids, mine, *lm.encode(prompt(100 * turn + n, chance.randint(1, 4))))
                for n, (ids, mine) in enumerate(zip(talks, results, strict=True))
            ]
            if turn == 1:
                of = [of[0], STEERINGS[2], 2.0 * ADD, *of[3:]]
        assert reused > 40

    def test_a_long_text_goes_on(self) -> None:
        lm = long_llama()
        batch, plain = batch_of(lm), batch_of(lm, tokens=0)
        ids = tuple(lm.encode(prompt(1, 300)))
        for acting in (None, ADD):
            (first,) = run(batch, request_of(ids, acting))
            later = after(ids, first, *ids[:290])
            (reused,), (wanted,) = run(batch, request_of(later, acting)), run(plain, request_of(later, acting))
            assert [response.token for response in reused] == [response.token for response in wanted]
            assert reused[0].cached == len(ids) + 3
            assert wanted[0].cached == 0

    def test_neighbours_and_answers_to_one_prompt(self, llama: LM) -> None:
        batch = batch_of(llama)
        ids, other = (tuple(llama.encode(prompt(n, 20))) for n in (1, 2))
        (first,) = run(batch, request_of(ids, None))
        later = after(ids, first, 5, 6)
        answers = run(batch, request_of(later, None), request_of(other, None), request_of(later, None))
        assert [responses[0].cached for responses in answers] == [23, 0, 23]
        assert [t.token for t in answers[0]] == [t.token for t in answers[2]]
        assert [t.token for t in answers[1]] == [t.token for t in run(batch_of(llama), request_of(other, None))[0]]

    def test_what_monitors_read(self, llama: LM) -> None:
        monitor = Monitor.of("m", ADD)
        batch = batch_of(llama)
        ids = tuple(llama.encode(prompt(1, 20)))
        (first,) = run(batch, request_of(ids, ADD, monitors=(monitor,)))
        request = request_of(after(ids, first, 5, 6), ADD, monitors=(monitor,))
        (reused,), (wanted,) = run(batch, request), run(batch_of(llama), request)
        assert reused[0].cached == 23
        assert [t.monitored for t in reused] == [pytest.approx(t.monitored, rel=1e-5) for t in wanted]


class TestWhatIsTakenOver:
    def cached(self, lm: LM, before: Any, later: Any, /, *, shared: bool = False, scopes: str = "aa") -> int:
        """Of 20 prompt tokens and 3 of the answer, how many the next turn takes over."""
        batch = batch_of(lm, shared=shared)
        ids = tuple(lm.encode(prompt(1, 20)))
        earlier_steering, clean = before if isinstance(before, tuple) else (before, False)
        later_steering, clean_too = later if isinstance(later, tuple) else (later, False)
        (first,) = run(batch, request_of(ids, earlier_steering, clean_cache=clean, scope=scopes[0]))
        (answer,) = run(
            batch, request_of(after(ids, first, 5, 6), later_steering, clean_cache=clean_too, scope=scopes[1])
        )
        return answer[0].cached

    def test_as_far_as_the_same_acted(self, llama: LM) -> None:
        generated, prompts, last = (
            steering((1, Add(direction(1, 2.0)), rule))
            for rule in (Positions.generated(), Positions.prompt(), Positions.from_last_prompt_token())
        )
        for before, later, cached in [
            (None, None, 23),
            (ADD, ADD, 23),
            (ADD, 1.0 * ADD, 23),  # the same, made anew
            (ADD, 2.0 * ADD, 0),
            (None, ADD, 0),
            (ADD, None, 0),
            (generated, generated, 20),  # its answer is prompt now, which isn't steered
            (generated, None, 20),
            (prompts, prompts, 20),  # its answer is prompt now, which is steered
            (last, last, 19),
            (last, None, 19),
            ((ADD, True), None, 23),
            (None, (ADD, True), 23),
            ((ADD, True), (2.0 * ADD, True), 23),
            ((ADD, True), ADD, 0),
            (ADD.when(OPEN), ADD, 23),  # its gate was open
            (ADD, ADD.when(OPEN), 0),  # the gate has to read all of the prompt
        ]:
            assert self.cached(llama, before, later) == cached, (str(before), str(later))

    def test_across_scopes_only_what_is_unsteered_and_if_that_is_allowed(self, llama: LM) -> None:
        for before, later in ((None, None), (ADD, ADD), ((ADD, True), None)):
            assert self.cached(llama, before, later, scopes="ab") == 0
        assert self.cached(llama, None, None, shared=True, scopes="ab") == 23
        assert self.cached(llama, (ADD, True), None, shared=True, scopes="ab") == 23
        assert self.cached(llama, ADD, ADD, shared=True, scopes="ab") == 0
        generated = steering((1, Add(direction(1, 2.0)), Positions.generated()))
        assert self.cached(llama, generated, generated, shared=True, scopes="ab") == 20
        assert self.cached(llama, ADD, ADD, shared=True) == 23

    def test_what_a_monitor_switched_on_counts_from_there_on(self, llama: LM) -> None:
        monitor = Monitor("m", Monitor.of("m", ADD).condition, -1e9, "steer", ADD)
        batch = batch_of(llama)
        ids = tuple(llama.encode(prompt(1, 20)))
        (first,) = run(batch, request_of(ids, None, monitors=(monitor,)))
        later = after(ids, first, 5, 6)
        for acting, cached in ((None, 20), (ADD, 0)):
            (reused,), (wanted,) = (
                run(batch, request_of(later, acting)),
                run(batch_of(llama), request_of(later, acting)),
            )
            assert reused[0].cached == cached
            assert [t.logprob for t in reused] == pytest.approx([t.logprob for t in wanted], abs=1e-6)

    def test_without_a_scope_nothing_is_kept(self, llama: LM) -> None:
        batch = batch_of(llama)
        run(batch, GenerationRequest(tuple(llama.encode(prompt(1, 20))), None, 4))
        assert batch.prefixes is not None
        assert len(batch.prefixes) == 0

    def test_recurrent_states_are_not(self) -> None:
        config = transformers.Lfm2Config(**tiny.SIZES, full_attn_idxs=[1, 3], block_ff_dim=48)
        hybrid = LM(transformers.Lfm2ForCausalLM(config).double().eval(), tiny.tokenizer())
        assert batch_of(hybrid).prefixes is None


class TestTheBound:
    def test_what_was_used_least_lately_goes_first(self, llama: LM) -> None:
        batch = batch_of(llama, tokens=70)
        assert (kept := batch.prefixes) is not None
        texts = [tuple(llama.encode(prompt(n, 20))) for n in range(4)]
        for ids in texts[:3]:
            run(batch, request_of(ids, None))
        assert (len(kept), kept.cached_tokens) == (3, 69)
        assert kept.find("a", (*texts[0], 5), ()) is not None  # used again
        run(batch, request_of(texts[3], None))
        assert (len(kept), kept.cached_tokens) == (3, 69)
        assert [kept.find("a", (*ids, 5), ()) is not None for ids in texts] == [True, False, True, True]

    def test_the_next_turn_takes_the_place_of_the_one_before(self, llama: LM) -> None:
        batch = batch_of(llama)
        ids = tuple(llama.encode(prompt(1, 20)))
        (first,) = run(batch, request_of(ids, ADD))
        run(batch, request_of(after(ids, first, 5, 6), ADD))
        run(batch, request_of(ids, ADD))  # is there already
        assert batch.prefixes is not None
        assert (len(batch.prefixes), batch.prefixes.cached_tokens) == (1, 20 + 4 + 2 + 3)

    def test_short_texts_and_too_long_ones(self, llama: LM) -> None:
        batch = batch_of(llama, tokens=30)
        run(batch, request_of(tuple(llama.encode(prompt(1, LEAST - 5))), None, 3))
        run(batch, request_of(tuple(llama.encode(prompt(1, 40))), None, 3))
        assert batch.prefixes is not None
        assert len(batch.prefixes) == 0
        assert batch.clear() == []

    def test_a_row_that_is_given_up_is_not_kept_and_one_at_its_end_is(self, llama: LM) -> None:
        for ended in (False, True):
            batch = batch_of(llama)
            key = batch.insert(request_of(tuple(llama.encode(prompt(1, 20))), None, 30))
            batch.step()
            batch.step()
            batch.remove(key, ended=ended)
            assert batch.prefixes is not None
            assert len(batch.prefixes) == ended
