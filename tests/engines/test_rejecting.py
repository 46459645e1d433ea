"""Decoding with rejection through `lm.generate`: endings, processors, sampling, streams, traces, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, direction, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, LogitsProcessorList

from trimtab import LM, Add, Edit, Positions, Site, Steering, Threshold, TrimtabError
from trimtab.decoding.rejection import SCHEDULES, Rejection
from trimtab.engines.transformers.rows import Rows
from trimtab.steering import ScaleScores, emphasis
from trimtab.text.spans import Phrase

PROMPTS = [prompt(seed, length) for seed, length in enumerate((9, 14, 6))]
PHRASES = [" ".join(text.split()[2:5]) for text in PROMPTS]
WAYS = [Rejection(0.3, schedule=schedule) for schedule in ("optimistic", "fused")]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("qwen3", seed=1)


def tokens(answers: list[Any]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


class TestEmphasize:
    def test_a_phrase_is_scaled_scores_at_its_tokens(self, lm: LM) -> None:
        named = lm.generate(PROMPTS, emphasize=PHRASES, max_new_tokens=6)
        spans = [lm.spans(text, phrase) for text, phrase in zip(PROMPTS, PHRASES, strict=True)]
        built = [emphasis(ScaleScores(100.0), span, range(LAYERS)) for span in spans]
        assert tokens(named) == tokens(lm.generate(PROMPTS, built, rejection=Rejection(), max_new_tokens=6))
        assert all(answer.trace is not None for answer in named)
        assert [len(answer.applied.edits) for answer in named] == [LAYERS] * 3

    def test_one_phrase_for_all_several_for_one_and_none(self, lm: LM) -> None:
        shared = [f"w5 w6 {text}" for text in PROMPTS]
        assert all(a.applied.edits for a in lm.generate(shared, emphasize="w5 w6", max_new_tokens=1))
        some = lm.generate(
            PROMPTS, emphasize=[[PHRASES[0], Phrase(PROMPTS[0].split()[-1])], None, None], max_new_tokens=4
        )
        assert some[0].applied.edits
        assert tokens(some)[1:] == tokens(lm.generate(PROMPTS, max_new_tokens=4))[1:]

    def test_without_rejection_every_token_is_steered(self, lm: LM) -> None:
        plain = lm.generate(PROMPTS, emphasize=PHRASES, rejection=False, max_new_tokens=6)
        assert all(answer.trace is None for answer in plain)
        built = [emphasis(ScaleScores(), lm.spans(t, p), range(LAYERS)) for t, p in zip(PROMPTS, PHRASES, strict=True)]
        assert tokens(plain) == tokens(lm.generate(PROMPTS, built, max_new_tokens=6))

    def test_rejecting_steered_and_unsteered_requests_in_one_call(self, lm: LM) -> None:
        at_every_layer = Steering(tuple(Edit(Site(layer), Add(direction(layer, 3.0))) for layer in range(LAYERS)))
        ways = [WAYS[0], None, None]
        mixed = lm.generate(PROMPTS, [at_every_layer, at_every_layer, None], rejection=ways, max_new_tokens=6)
        for i, (steering, way) in enumerate(((at_every_layer, WAYS[0]), (at_every_layer, None), (None, None))):
            (alone,) = lm.generate(PROMPTS[i], steering, rejection=way, max_new_tokens=6)
            assert mixed[i].token_ids == alone.token_ids
        assert mixed[0].trace is not None
        assert mixed[1].trace is None

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_where_nothing_is_steered_the_answer_is_the_raw_one(self, lm: LM, schedule: str) -> None:
        """No steering, an empty one, one whose gate is shut; alone, and beside one that is in force."""
        at_every_layer = Steering(tuple(Edit(Site(layer), Add(direction(layer, 3.0))) for layer in range(LAYERS)))
        shut = at_every_layer.when(Threshold(Site(0), direction(0), 1e9))
        way = Rejection(0.3, schedule=schedule)
        plain = tokens(lm.generate(PROMPTS, max_new_tokens=4))
        for steering in (None, Steering(), shut):
            answers = lm.generate(PROMPTS, steering, rejection=way, max_new_tokens=4)
            assert tokens(answers) == plain
            assert not any(step.open for answer in answers if answer.trace for step in answer.trace.steps)
        mixed = lm.generate(PROMPTS, [shut, at_every_layer, None], rejection=way, max_new_tokens=4)
        assert [mixed[0].token_ids, mixed[2].token_ids] == [plain[0], plain[2]]


class TestGenerate:
    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.schedule)
    def test_any_end_token_ends_a_row_and_the_others_go_on(self, lm: LM, way: Rejection) -> None:
        free = lm.generate(PROMPTS, emphasize=PHRASES, rejection=way, max_new_tokens=10)
        ends = [free[0].token_ids[2], free[1].token_ids[5]]
        ended = lm.generate(PROMPTS, emphasize=PHRASES, rejection=way, max_new_tokens=10, eos_token_id=ends)
        for a, b in zip(free, ended, strict=True):
            stop = next((i + 1 for i, token in enumerate(a.token_ids) if token in ends), 10)
            assert b.token_ids == a.token_ids[:stop]
            assert b.finish_reason == ("stop" if stop < 10 or a.token_ids[-1] in ends else "length")
            assert b.trace.steps == a.trace.steps[:stop]
        assert len({len(answer.token_ids) for answer in ended}) > 1

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.schedule)
    def test_a_finished_request_has_no_more_rungs(self, lm: LM, way: Rejection, monkeypatch: Any) -> None:
        way = replace(way, beta=0.0)  # every gate is open at every token
        free = lm.generate(PROMPTS, emphasize=PHRASES, rejection=way, max_new_tokens=8)
        ended: list[set[int]] = []
        run = Rows.run

        def spied(
            self: Any, token: Any, cache: Any, columns: int, steer: Any, chosen: Any, rows: Any, **rest: Any
        ) -> Any:
            ended.append({row for version, row in zip(chosen, rows, strict=True) if version is not None})
            return run(self, token, cache, columns, steer, chosen, rows, **rest)

        end = next(t for t in free[0].token_ids if all(t not in other.token_ids for other in free[1:]))
        stop = free[0].token_ids.index(end) + 1
        assert stop < 8
        monkeypatch.setattr(Rows, "run", spied)
        lm.generate(PROMPTS, emphasize=PHRASES, rejection=way, max_new_tokens=8, eos_token_id=end)
        steps = [rows for rows in ended if len(rows) != 1]  # a ranking has rows of one request
        first = [request for request in range(3) if any(request not in rows for rows in steps)]
        assert len(first) == 1  # the request that ended, and only that one
        gone = next(i for i, rows in enumerate(steps) if first[0] not in rows)
        assert all(first[0] not in rows for rows in steps[gone:])
        assert gone > 0

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.schedule)
    def test_processors_act_on_raw_and_steered_logits_alike(self, lm: LM, way: Rejection) -> None:
        """A processor that forbids all but some tokens: what is emitted, and what it replaced, are among them."""
        allowed = torch.arange(10, 60, 3)

        class Only(LogitsProcessor):
            def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                assert len(ids) == len(scores) == 1  # each row is asked for alone
                kept = torch.full_like(scores, -torch.inf)
                kept[:, allowed] = scores[:, allowed]
                return kept

        options = {"logits_processor": LogitsProcessorList([Only()]), "repetition_penalty": 1.2}
        answers = lm.generate(PROMPTS, emphasize=PHRASES, rejection=way, max_new_tokens=8, **options)
        for answer in answers:
            assert set(answer.token_ids) <= set(allowed.tolist())
            assert {s.replaced for s in answer.trace.steps} - {None} <= set(allowed.tolist())
        assert any(step.replaced for answer in answers for step in answer.trace.steps)
        strict = Rejection(1.0, schedule=way.schedule)
        raw = lm.generate(PROMPTS, emphasize=PHRASES, rejection=strict, max_new_tokens=8, **options)
        assert tokens(raw) == tokens(lm.generate(PROMPTS, max_new_tokens=8, batch_size=1, **options))

    def test_processed_schedules_agree(self, lm: LM) -> None:
        options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
        results = [
            tokens(lm.generate(PROMPTS, emphasize=PHRASES, rejection=w, max_new_tokens=8, **options)) for w in WAYS
        ]
        assert results[0] == results[1]

    def test_the_likelihoods_are_those_of_the_logits_that_gave_the_tokens(self, lm: LM) -> None:
        (answer,) = lm.generate(
            PROMPTS[0], emphasize=PHRASES[0], rejection=Rejection(0.0), max_new_tokens=5, logprobs=True
        )
        assert answer.logprobs is not None
        vocabulary = lm.model.config.vocab_size
        assert all(value >= -torch.log(torch.tensor(vocabulary)) for value in answer.logprobs)  # each was the best

    def test_a_streamer_sees_the_tokens(self, lm: LM) -> None:
        class Collect:
            def __init__(self) -> None:
                self.seen: list[int] = []
                self.ended = False

            def put(self, value: torch.Tensor) -> None:
                self.seen += value.flatten().tolist()

            def end(self) -> None:
                self.ended = True

        stream = Collect()
        (answer,) = lm.generate(PROMPTS[0], emphasize=PHRASES[0], max_new_tokens=5, streamer=stream)
        assert stream.seen == [*lm.encode(PROMPTS[0]), *answer.token_ids]
        assert stream.ended
        with pytest.raises(TrimtabError, match="streamer"):
            lm.generate(PROMPTS, emphasize=PHRASES, max_new_tokens=5, streamer=stream)


class TestSampling:
    def test_every_token_is_plausible_and_a_seed_repeats_it(self, lm: LM) -> None:
        import naive_rejection

        options = {"do_sample": True, "temperature": 1.3, "seed": 3, "max_new_tokens": 8}
        answers = lm.generate(PROMPTS, emphasize=PHRASES, rejection=WAYS[1], **options)
        assert tokens(answers) == tokens(lm.generate(PROMPTS, emphasize=PHRASES, rejection=WAYS[1], **options))
        for text, answer in zip(PROMPTS, answers, strict=True):
            ids = lm.encode(text)
            raw = naive_rejection.raw_rows(lm, (*ids, *answer.token_ids), len(ids))
            for row, token in zip(raw, answer.token_ids, strict=True):
                p = (row / 1.3).softmax(-1)
                assert float(p[token]) >= 0.3 * float(p.max()) * (1 - 1e-5)

    def test_it_is_the_steered_distribution_on_the_plausible_set(self, lm: LM) -> None:
        """Shares of the first token over many samples, against the distribution worked out by hand."""
        import naive_rejection

        spans = lm.spans(PROMPTS[1], PHRASES[1])
        emphasized = emphasis(ScaleScores(4.0), spans, range(LAYERS))
        way = Rejection(0.05, ladder="strength")
        answers = lm.generate(
            PROMPTS[1], emphasized, rejection=way, do_sample=True, num_return_sequences=400, max_new_tokens=1, seed=0
        )
        ids = lm.encode(PROMPTS[1])
        raw = naive_rejection.row(lm, ids, len(ids), ())
        allowed = raw.softmax(-1) >= 0.05 * raw.softmax(-1).max()
        for t in range(5):
            steered = naive_rejection.row(lm, ids, len(ids), (0.5**t * emphasized).edits)
            if allowed[steered.argmax()]:
                break
        expected = steered.masked_fill(~allowed, -torch.inf).softmax(-1)
        shares = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=len(raw)) / 400
        assert int(allowed.sum()) > 1
        assert float((shares - expected).abs().max()) < 4 * 0.5 / 20  # four standard errors of a share of a half

    def test_unsteered_neighbours_sample_from_the_whole_distribution(self, lm: LM) -> None:
        answers = lm.generate(
            PROMPTS, emphasize=[PHRASES[0], None, None], rejection=Rejection(0.9), do_sample=True, temperature=2.0,
            num_return_sequences=30, max_new_tokens=1, seed=0,
        )  # fmt: skip
        kinds = [{answer.token_ids for answer in answers[i * 30 : (i + 1) * 30]} for i in range(3)]
        assert len(kinds[0]) < 4 < len(kinds[1])


class TestWhatCannotRun:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"num_beams": 2}, "num_beams"),
            ({"use_cache": False}, "use_cache"),
            ({"cache_implementation": "static"}, "cache_implementation"),
            ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
            ({"emphasize": "w1 w1 w1 w1"}, "isn't in the prompt"),
            ({"emphasize": [None]}, "1 things to emphasize for 3 prompts"),
            ({"rejection": [None]}, "1 rejections for 3 prompts"),
            ({"rejection": Rejection(ranking=(0, 1))}, "leaves out layer 2"),
        ],
    )
    def test_it_says_so(self, lm: LM, options: dict, named: str) -> None:
        with pytest.raises(TrimtabError, match=named):
            lm.generate(PROMPTS, **{"emphasize": PHRASES, "max_new_tokens": 2, **options})

    def test_edits_of_the_prompt_alone(self, lm: LM) -> None:
        steering = Steering((Edit(Site(1), Add(direction(1)), Positions.span(0, 2)),))
        with pytest.raises(TrimtabError, match="being decoded"):
            lm.generate(PROMPTS[0], steering, rejection=Rejection(ladder="strength"), max_new_tokens=2)

    def test_one_layer_and_no_rung(self, lm: LM) -> None:
        steering = Steering((Edit(Site(1), Add(direction(1))),))
        with pytest.raises(TrimtabError, match="strength"):
            lm.generate(PROMPTS[0], steering, rejection=Rejection(), max_new_tokens=2)
        (answer,) = lm.generate(PROMPTS[0], steering, rejection=Rejection(min_layers=1), max_new_tokens=2)
        assert answer.trace.candidates == ("1 layers at strength 1",)


class TestAuto:
    def test_the_device_decides(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a CPU, however many rows there are; the same in each run, as no stopwatch is looked at."""
        for count in (1, 3):
            answers = lm.generate(PROMPTS[:count], emphasize=PHRASES[:count], max_new_tokens=2)
            assert {answer.trace.schedule for answer in answers} == {"optimistic"}
        monkeypatch.setattr("trimtab.engines.transformers.verify.schedule_for", lambda _: "fused")
        (answer,) = lm.generate(PROMPTS[0], emphasize=PHRASES[0], max_new_tokens=2)
        assert answer.trace.schedule == "fused"


class _Largest(TorchDispatchMode):
    """The most elements that one operation put into memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, x.numel())
        return made


@pytest.mark.parametrize("copying", [False, True])
def test_a_pass_of_rungs_copies_no_past(lm: LM, monkeypatch: pytest.MonkeyPatch, copying: bool) -> None:
    """No tensor as large as a layer's keys is made, however long the text; where keys are copied, one is seen."""
    length, seen, run = 110, _Largest(), Rows.run

    def watched(self: Rows, token: Any, cache: Any, *args: Any, **keywords: Any) -> torch.Tensor:
        with seen:
            if copying:
                cache.layers[0].keys.clone()
            return run(self, token, cache, *args, **keywords)

    monkeypatch.setattr(Rows, "run", watched)
    rejection = Rejection(1e-3, min_layers=LAYERS, ranking=tuple(range(LAYERS)))
    text = prompt(1, length)
    (answer,) = lm.generate([text], emphasize=" ".join(text.split()[3:9]), rejection=rejection, max_new_tokens=4)
    assert answer.trace is not None
    assert any(step.open for step in answer.trace.steps)
    config = lm.model.config
    past = config.num_key_value_heads * length * config.head_dim
    assert config.num_attention_heads * length < past  # one rung's scores are smaller
    assert (seen.elements >= past) == copying
