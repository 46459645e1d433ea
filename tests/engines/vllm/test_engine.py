"""The promises on vLLM, with the default model in float32: one engine, in this process so that nothing is left to time.

It has a tiny pool of blocks, few slots, and prompts are computed in chunks, so that requests are cut, preempted,
resumed and kept waiting all along.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, LONG, PROMPTS, TINY, added, direction, without_plugin

from trimtab import (
    LM,
    Ablate,
    Add,
    BiasScores,
    Edit,
    MaskNeurons,
    Positions,
    Rotate,
    ScaleElements,
    ScaleScores,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
)
from trimtab.engines.vllm.attach import find_blocks

SLOTS = 9
NEW = 12
FEW = PROMPTS[:12]  # more than there is room for at once
OPERATIONS = [
    Add(direction(1, 8.0)),
    SetProjection(direction(2), target=40.0),
    Ablate(direction(3)),
    Add(direction(4, 8.0), keep_norm=True),
    ScaleElements((direction(5) > 0.02).float()),
    Rotate(direction(6), one_sided=False),
]


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TRIMTAB_SLOTS"] = str(SLOTS)
    made = LM.load(engine="vllm", **TINY)
    yield made
    made.close()


def tokens(answers: list[Any]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def metric(vllm: Any, name: str) -> float:
    return sum(getattr(m, "value", 0) for m in vllm.llm.get_metrics() if m.name == name)


def rig(vllm: Any) -> Any:
    from trimtab.engines.vllm.operator import MANAGERS

    return MANAGERS[-1]


def assert_nothing_is_left(vllm: Any) -> None:
    """Of requests that are done; the worker hears of the last of them with the next step."""
    vllm.generate("Hi", max_new_tokens=1)
    assert rig(vllm).bank.slots.used == 0
    assert not rig(vllm).programs


def forget(vllm: Any) -> None:
    assert vllm.llm.reset_prefix_cache()


class TestNothingMeansNothing:
    def test_unsteered_is_what_an_engine_without_the_plugin_says(self, vllm: Any, tmp_path: Path) -> None:
        """Beside steered requests too: the same prompts in the same places, so that batches are cut the same."""
        plain = without_plugin(TINY, [vllm.encode(p) for p in FEW], NEW, tmp_path)
        forget(vllm)
        unsteered = vllm.generate(FEW, max_new_tokens=NEW, logprobs=True)
        assert [(list(a.token_ids), list(a.logprobs)) for a in unsteered] == plain
        rows = [added(i, 0.5) if i % 2 else None for i in range(4)] + [None] * 8
        forget(vllm)
        mixed = vllm.generate(FEW, rows, max_new_tokens=NEW)
        ends_alike = [list(t) for i, t in enumerate(tokens(mixed)) if rows[i] is None]
        assert ends_alike == [t for i, (t, _) in enumerate(plain) if rows[i] is None]

    @pytest.mark.parametrize(
        "nothing",
        [Steering(), 0.0 * added(), added().when(Threshold(Site(3), direction(9), 1e9))],
        ids=["empty", "strength 0", "gate shut"],
    )
    def test_no_edit_is_no_edit(self, vllm: Any, nothing: Steering) -> None:
        forget(vllm)
        plain = vllm.generate(PROMPTS[:6], max_new_tokens=NEW, logprobs=True)
        forget(vllm)
        same = vllm.generate(PROMPTS[:6], nothing, max_new_tokens=NEW, logprobs=True)
        assert tokens(same) == tokens(plain)
        read = any(
            edit.gate.readings for edit in nothing.edits
        )  # to read a prompt caches it: batches are cut otherwise
        for a, b in zip(same, plain, strict=True):
            assert a.logprobs == (pytest.approx(b.logprobs, abs=1e-3) if read else b.logprobs)

    def test_rows_of_a_mixed_batch_are_identical_to_the_bit(self, vllm: Any) -> None:
        """Answers of one length, and prompts that share no blocks, so that the batches are cut the same."""
        forget(vllm)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "logprobs": True, "chat": False}
        plain = vllm.generate(PROMPTS[:8], **options)
        rows = [added(3) if i % 2 else None for i in range(8)]
        rows[3] = Steering((Edit(Site(9), SetProjection(direction(4), 60.0), Positions.all()),))
        forget(vllm)
        mixed = vllm.generate(PROMPTS[:8], rows, **options)
        for i in range(8):
            assert (mixed[i].logprobs == plain[i].logprobs) == (rows[i] is None)
        assert_nothing_is_left(vllm)


class TestTheSameAsTransformers:
    """The engine that recomputes nothing against the one with explicit hooks."""

    @pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__ + ("'" if o.keep_norm else ""))
    def test_activations_after_the_steered_block(self, vllm: Any, lm: LM, operation: Any) -> None:
        span = Positions.span(4, 9)
        steering = Steering(
            (Edit(Site(10), operation, span), Edit(Site(10), Add(direction(7, 3.0)), Positions.span(6, 12)))
        )
        sites, everywhere = [Site(9), Site(10), Site(14)], Positions.prompt()
        ours = vllm.capture(PROMPTS[5], sites, everywhere, steering=steering)[0]
        with lm.steered(steering):
            theirs = lm.capture(PROMPTS[5], sites, everywhere)[0]
        plain = lm.capture(PROMPTS[5], sites, everywhere)[0]
        for site in sites:
            torch.testing.assert_close(ours[site], theirs[site], rtol=2e-4, atol=2e-3)
        changed = (ours[Site(10)] - plain[Site(10)]).norm(dim=-1) > 0.05
        assert changed.nonzero().flatten().tolist() == list(range(4, 12))

    @pytest.mark.smoke
    def test_greedy_text(self, vllm: Any, lm: LM) -> None:
        """Of 12 answers at least 11 are the same; where one isn't, it parts at a near-tie."""
        rows = [added(i, 4.0, positions=Positions.from_last_prompt_token()) if i % 3 else None for i in range(12)]
        rows[4] = Steering((Edit(Site(12), SetProjection(direction(2), 25.0), Positions.generated()),))
        rows[7] = Steering((Edit(Site(12), Ablate(direction(3)), Positions.all()),))
        rows[8] = added(5, 5.0).when(Threshold(Site(8), direction(3), -1e3))
        ours = vllm.generate(FEW, rows, max_new_tokens=24)
        theirs = lm.generate(FEW, rows, max_new_tokens=24, logprobs=True, batch_size=12)
        same = [a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True)]
        assert sum(same) >= 11
        for i in (i for i, equal in enumerate(same) if not equal):
            at = next(k for k, (a, b) in enumerate(zip(ours[i].token_ids, theirs[i].token_ids, strict=False)) if a != b)
            assert theirs[i].logprobs is not None
            assert theirs[i].logprobs[at] < -0.6  # the likeliest token had hardly more than half

    def test_positions_by_meaning(self, vllm: Any, lm: LM) -> None:
        """Requests are preempted and found in the prefix cache all along; what acts is decided by their own tokens."""
        rules = [
            Positions.after("."),
            Positions.answer(" the", " of") | Positions.last_prompt_token(),
            ~Positions.at("e"),
            Positions.thinking(" a", "."),
        ]
        rows = [Steering((Edit(Site(12), Add(direction(i, 9.0)), rules[i % 4]),)) for i in range(8)]
        expected = tokens(lm.generate(PROMPTS[:8], rows, max_new_tokens=20))
        for _ in range(2):
            answers = tokens(vllm.generate(PROMPTS[:8], rows, max_new_tokens=20))
            assert sum(a == b for a, b in zip(answers, expected, strict=True)) >= 7  # one may part at a near-tie
        plain = tokens(lm.generate(PROMPTS[:8], max_new_tokens=20))
        assert sum(a != b for a, b in zip(plain, expected, strict=True)) >= 4
        assert_nothing_is_left(vllm)

    def test_it_is_the_same_model(self, vllm: Any, lm: LM) -> None:
        assert vllm.identity == lm.identity


class TestPrefixCache:
    """A prompt of several blocks, cached by one request and asked for again by another: in all four orders."""

    PROMPT_SIDE = added(21)
    DECODE_ONLY = added(22, positions=Positions.generated())

    @pytest.fixture(scope="class")
    def alone(self, vllm: Any) -> dict[str, tuple[int, ...]]:
        answers = {}
        for name, steering in (("none", None), ("prompt", self.PROMPT_SIDE), ("decode", self.DECODE_ONLY)):
            forget(vllm)
            answers[name] = vllm.generate(LONG, steering, max_new_tokens=NEW)[0].token_ids
        assert len(set(answers.values())) == 3
        return answers

    def cached(self, vllm: Any) -> float:
        return metric(vllm, "vllm:prefix_cache_hits")

    @pytest.mark.parametrize("steered", ["prompt", "decode"])
    @pytest.mark.parametrize("first", ["steered", "unsteered"])
    def test_each_is_as_alone(self, vllm: Any, alone: dict[str, Any], steered: str, first: str) -> None:
        steering = {"prompt": self.PROMPT_SIDE, "decode": self.DECODE_ONLY}[steered]
        order = [steering, None] if first == "steered" else [None, steering]
        forget(vllm)
        before = self.cached(vllm)
        for acting in order:
            assert (
                vllm.generate(LONG, acting, max_new_tokens=NEW)[0].token_ids
                == alone["none" if acting is None else steered]
            )
        shared = self.cached(vllm) - before
        assert shared >= 96 if steered == "decode" else shared == 0

    def test_the_same_steering_finds_its_blocks_again(self, vllm: Any, alone: dict[str, Any]) -> None:
        forget(vllm)
        before = self.cached(vllm)
        for _ in range(2):
            assert vllm.generate(LONG, self.PROMPT_SIDE, max_new_tokens=NEW)[0].token_ids == alone["prompt"]
        assert self.cached(vllm) - before >= 96

    def test_an_answer_steered_while_generated_isnt_taken_for_an_unsteered_text(self, vllm: Any) -> None:
        """The next turn has the answer in its prompt; its blocks were computed under a steering, these aren't."""
        from vllm import SamplingParams

        def go_on(ids: list[int]) -> dict[int, float]:
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
            (step,) = vllm.llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0].outputs[0].logprobs
            return {token: value.logprob for token, value in step.items()}

        forget(vllm)
        answer = vllm.generate(LONG, self.DECODE_ONLY, max_new_tokens=64, min_new_tokens=64)[0]
        turn = vllm.encode(LONG) + list(answer.token_ids)
        before = self.cached(vllm)
        after = go_on(turn)
        assert 96 <= self.cached(vllm) - before <= answer.prompt_tokens
        forget(vllm)
        assert after == pytest.approx(go_on(turn), abs=1e-2)

    def test_a_gate_is_decided_without_the_cache(self, vllm: Any) -> None:
        """What a gate reads is computed, even where all of the prompt's blocks are there."""
        value = vllm.capture(LONG, [8])[0][Site(8)][0] @ direction(3)
        for threshold, acts in ((float(value) - 0.1, True), (float(value) + 0.1, False)):
            gated = self.PROMPT_SIDE.when(Threshold(Site(8), direction(3), threshold))
            answer = vllm.generate(LONG, gated, max_new_tokens=4)[0]
            assert bool(answer.applied.edits) == acts


class TestChunksAndPreemption:
    def test_a_border_inside_a_chunk_and_inside_the_span(self, vllm: Any, lm: LM) -> None:
        """Chunks are of 48 tokens: the span begins in the first and ends in the third."""
        steering = Steering((Edit(Site(6), Add(direction(8, 10.0)), Positions.span(40, 110)),))
        sites, everywhere = [Site(6), Site(12)], Positions.prompt()
        assert len(vllm.encode(LONG)) > 120
        ours = vllm.capture(LONG, sites, everywhere, steering=steering)[0]
        with lm.steered(steering):
            theirs = lm.capture(LONG, sites, everywhere)[0]
        for site in sites:
            torch.testing.assert_close(ours[site], theirs[site], rtol=5e-4, atol=5e-3)

    @pytest.mark.long
    def test_preempted_requests_end_as_they_would_have(self, vllm: Any, lm: LM) -> None:
        """Twelve requests of some 90 tokens in a pool of 768: some are thrown out, and computed again."""
        window = Positions.window(5, 40) | Positions.prompt()
        rows = [added(i, 3.0, positions=window) if i % 2 else None for i in range(12)]
        options = {"max_new_tokens": 48, "min_new_tokens": 48}
        before = metric(vllm, "vllm:num_preemptions")
        ours = vllm.generate(PROMPTS[:12], rows, **options)
        assert metric(vllm, "vllm:num_preemptions") > before
        theirs = lm.generate(PROMPTS[:12], rows, batch_size=12, **options)
        same = sum(a.token_ids[:40] == b.token_ids[:40] for a, b in zip(ours, theirs, strict=True))
        assert same >= 11


class TestNothingIsSilentlyUnsteered:
    """Faults planted in vLLM: what was to be steered, or read, raises; the engine goes on, and others are answered."""

    @pytest.fixture
    def runner(self, vllm: Any) -> Any:
        return vllm._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def unhook(self, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        block = find_blocks(runner.get_model(), LAYERS)[12]
        monkeypatch.setattr(block, "_forward_hooks", type(block._forward_hooks)())

    def hook_twice(self, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        block = find_blocks(runner.get_model(), LAYERS)[12]
        hooks = block._forward_hooks
        twice = type(hooks)([*hooks.items(), *((key + 10_000, hook) for key, hook in hooks.items())])
        monkeypatch.setattr(block, "_forward_hooks", twice)

    def past_begin(self, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "_model_forward", runner._model_forward.__wrapped__)

    def past_the_plugin(self, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "execute_model", runner.execute_model.__wrapped__)
        monkeypatch.setattr(runner, "_model_forward", runner._model_forward.__wrapped__)

    def one_step_past_the_plugin(self, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        through, around, steps = runner.execute_model, runner.execute_model.__wrapped__, iter(range(10_000))
        forward = runner._model_forward

        def execute(*args: Any, **kwargs: Any) -> Any:
            swallowed = next(steps) == 5
            runner._model_forward = forward.__wrapped__ if swallowed else forward
            return (around if swallowed else through)(*args, **kwargs)

        monkeypatch.setattr(runner, "execute_model", execute)
        monkeypatch.setattr(runner, "_model_forward", forward)  # put back at the end

    @pytest.mark.parametrize(
        ("plant", "why"),
        [
            (unhook, r"behind block 12 the steering should have run once, on \d+ tokens, but didn't run"),
            pytest.param(hook_twice, r"behind block 12 .* ran 2 times", marks=pytest.mark.long),
            pytest.param(
                past_begin, "a step in which the plugin wasn't asked to steer this request", marks=pytest.mark.long
            ),
            pytest.param(past_the_plugin, "steered requests, but accounted for 0 of them", marks=pytest.mark.long),
            (one_step_past_the_plugin, "steered requests, but accounted for 0 of them"),
        ],
        ids=["unhooked", "hooked twice", "begin isn't called", "steps past the plugin", "one step past the plugin"],
    )
    def test_a_planted_fault_raises(
        self, vllm: Any, runner: Any, monkeypatch: pytest.MonkeyPatch, plant: Any, why: str
    ) -> None:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "chat": False}
        forget(vllm)
        right = tokens(vllm.generate(PROMPTS[:4], [None, added(3), None, added(4)], **options))
        with monkeypatch.context() as planted:
            plant(self, runner, planted)
            forget(vllm)
            with pytest.raises(TrimtabError, match=why):
                vllm.generate(PROMPTS[:4], [None, added(3), None, added(4)], **options)
            unsteered = vllm.generate(PROMPTS[:4:2], **options)
            assert tokens(unsteered) == right[::2]
        rig(vllm).finish(list(rig(vllm).programs))  # of those whose end it wasn't told of either
        forget(vllm)
        assert tokens(vllm.generate(PROMPTS[:4], [None, added(3), None, added(4)], **options)) == right
        assert_nothing_is_left(vllm)

    def test_what_isnt_read_raises(self, vllm: Any, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as planted:
            self.unhook(runner, planted)
            with pytest.raises(TrimtabError, match="behind block 12"):
                vllm.capture(PROMPTS[0], [11, 12])
        assert vllm.capture(PROMPTS[0], [11, 12])

    def test_who_asks_vllm_itself_is_told_too(self, vllm: Any, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm import SamplingParams

        vllm.register("sea", added(40, 6.0))
        params = SamplingParams(temperature=0, max_tokens=8, extra_args={"steering": "sea"})
        with monkeypatch.context() as planted:
            self.unhook(runner, planted)
            with pytest.raises(TrimtabError, match="behind block 12"):
                vllm.llm.generate("The sea", params, use_tqdm=False)
        assert vllm.llm.generate("The sea", params, use_tqdm=False)
        vllm.unregister("sea")


class TestSlots:
    def test_many_strengths_over_few_slots(self, vllm: Any) -> None:
        """80 strengths, 8 slots: requests wait, none is lost, and each is as among others of its strength."""
        base = added(30, 1.0, positions=Positions.all())
        strengths = [0.15 * i for i in range(80)]
        options = {"max_new_tokens": 5, "chat": False}
        answers = vllm.generate([PROMPTS[i % 20] for i in range(80)], [s * base for s in strengths], **options)
        assert len(answers) == 80
        assert len(vllm._link.sent) < 80
        room = vllm._engine.engine_core.engine_core.scheduler._trimtab_room
        assert not room.waiting
        assert not any(room.users)
        assert_nothing_is_left(vllm)
        for i in (0, 31, 60, 79):
            alone = vllm.generate(PROMPTS[i % 20], strengths[i] * base, **options)[0]
            assert answers[i].token_ids == alone.token_ids

    def test_one_that_needs_more_than_there_are_is_refused(self, vllm: Any) -> None:
        windows = [Positions.window(2 * i, 2 * i + 1) for i in range(SLOTS)]
        greedy = sum((added(i, positions=w) for i, w in enumerate(windows)), Steering())
        with pytest.raises(TrimtabError, match=r"needs \d+ slots, the engine has 8; raise TRIMTAB_SLOTS"):
            vllm.generate(PROMPTS[0], greedy, max_new_tokens=4)
        assert vllm.generate(PROMPTS[0], max_new_tokens=4)  # and the engine goes on


class TestAdmission:
    @pytest.mark.parametrize(
        ("edit", "why"),
        [
            (Edit(Site(3, "scores"), BiasScores(1.0), Positions.span(1, 3)), "bias_scores"),
            (Edit(Site(3, "scores"), ScaleScores(), Positions.span(1, 3)), "TRIMTAB_SITES=keys"),
            (Edit(Site(3, "neurons"), MaskNeurons(torch.rand(1536))), "can't run"),
            (Edit(Site(3, "heads"), Add(direction(1))), "inside a block"),
            (Edit(Site(3, "block_input"), Add(direction(1))), "output of the previous block"),
            (Edit(Site(30), Add(direction(1))), "layers 0 to 29"),
            (Edit(Site(3), Add(torch.ones(64))), "width is 64, this model's is 576"),
        ],
        ids=["scores", "keys", "neurons", "heads", "block input", "layer", "width"],
    )
    def test_what_cant_be_honoured_is_refused_with_the_reason(self, vllm: Any, edit: Edit, why: str) -> None:
        with pytest.raises(TrimtabError, match=why):
            vllm.generate(PROMPTS[:2], [None, Steering((edit,))], max_new_tokens=2)

    def test_options(self, vllm: Any) -> None:
        with pytest.raises(TrimtabError, match="can't take num_beams"):
            vllm.generate(PROMPTS[0], num_beams=4)
        with pytest.raises(UnsupportedError, match="rejection"):
            vllm.generate(PROMPTS[0], added(), rejection=True)
        with pytest.raises(TrimtabError, match="ask for at most"):
            vllm.generate(PROMPTS[0], max_new_tokens=512)
        sampled = [vllm.generate(PROMPTS[1], do_sample=True, seed=s, max_new_tokens=12)[0].text for s in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]


class TestNames:
    def test_by_name_as_a_request_gives_it(self, vllm: Any) -> None:
        from vllm import SamplingParams

        steering = added(40, 6.0)
        forget(vllm)
        twice = vllm.generate(PROMPTS[0], 2 * steering, max_new_tokens=NEW, logprobs=True)[0]
        wanted = twice.token_ids
        vllm.register("sea", steering)
        ids = {"prompt_token_ids": vllm.encode(PROMPTS[0])}

        def ask(steerings: Any) -> tuple[int, ...]:
            params = SamplingParams(temperature=0, max_tokens=NEW, extra_args={"steering": steerings})
            return tuple(vllm.llm.generate(ids, params, use_tqdm=False)[0].outputs[0].token_ids)

        assert ask('[{"name": "sea", "strength": 2}]') == wanted
        assert ask([{"name": "sea", "strength": 1}, {"name": "sea"}]) == wanted
        assert vllm.generate(PROMPTS[0], "sea", max_new_tokens=NEW, logprobs=True)[0].logprobs != twice.logprobs
        vllm.register("sea", 2 * steering)  # replaced
        assert ask("sea") == wanted
        with pytest.raises(TrimtabError, match="no steering 'see'; registered: sea"):
            ask("see")
        with pytest.raises(TrimtabError, match="name, strength and positions"):
            ask([{"name": "sea", "layer": 3}])
        again = vllm.generate(PROMPTS[0], "sea", max_new_tokens=NEW, logprobs=True)[0]
        assert again.logprobs == pytest.approx(twice.logprobs, abs=1e-3)
        vllm.unregister("sea")
        with pytest.raises(TrimtabError, match="no steering 'sea'; registered: none"):
            ask("sea")
        assert vllm.generate(PROMPTS[0], max_new_tokens=2)
