"""A prompt read in chunks is a prompt read in one pass: the cache, the logits, what acted and how strongly."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from batches import steering
from tiny import FAMILIES, LAYERS, WIDTH, direction, prompt

from trimtab import (
    LM,
    Ablate,
    Add,
    Positions,
    ScaleScores,
    SetProjection,
    Site,
    Steering,
    Threshold,
)
from trimtab.engines.transformers import chunked_prefill, decode
from trimtab.engines.transformers.chunked_prefill import ChunkedPrefill
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest, GenerationResponse
from trimtab.steering import Rotate, emphasis
from trimtab.steering.elements import HoldElements

LENGTH = 13
READ = [family for family in FAMILIES if family != "mixtral"]
RULES = [
    Positions.all(),
    Positions.all_but_first(),
    Positions.prompt(),
    Positions.generated(),
    Positions.last_prompt_token(),
    Positions.from_last_prompt_token(),
    Positions.first_generated(2),
    Positions.span(2, 7),
    Positions.window(0, 3),
    Positions.opening(3),
    Positions.tokens([0, 4, 5, 12]),
]
"""At which positions: before, across and after the ends of chunks."""
ADD, OTHER = Add(direction(1, 2.0)), Add(direction(2, 3.0))
OPEN, SHUT = Threshold(Site(0), direction(9), -1e9), Threshold(Site(0), direction(9), 1e9)
SPAN = Threshold(Site(1), direction(8), 0.0, positions=Positions.span(1, 9))
TOKENS = Threshold(Site(2), direction(3), 0.0, each_token=True)


STEERINGS: dict[str, Steering | None] = {
    "none": None,
    "zero": 0.0 * steering((1, ADD, RULES[0])),
    **{str(rule): steering((1, ADD, rule)) for rule in RULES},
    "two layers": steering((0, ADD, RULES[2]), (3, OTHER, RULES[5])),
    "projections": steering((1, SetProjection(direction(4), 1.5), RULES[0]), (1, Ablate(direction(5)), RULES[6 + 1])),
    "rotation": steering((2, Rotate(direction(7), one_sided=False), RULES[6 + 1])),
    "open": steering((1, ADD, RULES[0])).when(OPEN),
    "open, late": steering((1, ADD, RULES[5])).when(OPEN),
    "open, generated": steering((1, ADD, RULES[3])).when(OPEN),
    "shut": steering((1, ADD, RULES[0])).when(SHUT),
    "span": steering((2, ADD, RULES[6 + 1])).when(SPAN) + steering((2, OTHER, RULES[0])).when(~SPAN),
    "held": steering((1, HoldElements(torch.ones(WIDTH) / 2), RULES[4]), (2, ADD, RULES[5])),
    "each token": steering((2, ADD, RULES[0])).when(TOKENS),
}
BY_ONES = ("none", "all", "span:2:7", "projections", "open", "each token")
"""What is read in chunks of a single token on every family by day; Llama reads all so, the others at night."""
SCORES = {
    "scores": emphasis(ScaleScores(3.0), [(1, 3), (6, 9)], range(LAYERS)),
    "scores and more": emphasis(ScaleScores(3.0), [(2, 6)], range(LAYERS)) + steering((1, ADD, RULES[5])).when(OPEN),
}


@pytest.fixture(scope="module", params=READ)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def read(lm: LM, steering: Steering | None, chunk: int, length: int = LENGTH) -> tuple[ChunkedPrefill, torch.Tensor]:
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
    ids = lm.encode(prompt(3, length))
    prefill = ChunkedPrefill(lm.model, lm.layout, ids, steering, batch.device)
    with torch.no_grad():
        for _ in range(4 * length):
            if (logits := prefill.advance(chunk)) is not None:
                return prefill, logits
    raise AssertionError("it never ends")


def same(lm: LM, left: Any, right: Any, *, doses: bool = True) -> None:
    (a, x), (b, y) = left, right
    tolerance = 2e-4 if lm.model.dtype == torch.float32 else 1e-9
    assert torch.allclose(x, y, rtol=1e-5, atol=tolerance if x.dtype == torch.float64 else 2e-4)
    for mine, theirs in zip(a.cache.layers, b.cache.layers, strict=True):
        assert (mine.keys is None) == (theirs.keys is None)
        if mine.keys is not None:
            assert mine.keys.shape[-2] == LENGTH
            assert torch.allclose(mine.keys, theirs.keys, rtol=0, atol=tolerance)
            assert torch.allclose(mine.values, theirs.values, rtol=0, atol=tolerance)
    assert a.names == b.names
    assert [(e.site, e.positions, e.strength) for e in a.edits] == [(e.site, e.positions, e.strength) for e in b.edits]
    mine, theirs = a.tally(), b.tally()
    assert {site: count for site, (_, _, count) in mine.items()} == {s: count for s, (_, _, count) in theirs.items()}
    for site, (total, measured, _) in mine.items() if doses else ():
        assert total / measured == pytest.approx(theirs[site][0] / theirs[site][1], rel=1e-4)


@pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma2", "gemma3", "falcon", "qwen2_vl"))
@pytest.mark.long_unless(lambda lm, name, chunks: 1 not in chunks or lm == "llama" or name in BY_ONES)
@pytest.mark.parametrize("chunks", [(5, 12), (1,)], ids=["of several", "of one"])
@pytest.mark.parametrize("name", STEERINGS)
def test_chunks_are_one_pass(lm: LM, name: str, chunks: tuple[int, ...]) -> None:
    whole = read(lm, STEERINGS[name], LENGTH)
    for chunk in chunks:
        same(lm, read(lm, STEERINGS[name], chunk), whole, doses=chunk > 1)  # of single tokens not all are measured


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2"])
@pytest.mark.parametrize("name", SCORES)
def test_edits_of_attention_scores(family: str, name: str) -> None:
    lm = tiny.tiny(family)
    whole = read(lm, SCORES[name], LENGTH)
    plain = read(lm, None, LENGTH)
    assert not torch.allclose(whole[1], plain[1], atol=1e-3)
    for chunk in (1, 5, 12):
        same(lm, read(lm, SCORES[name], chunk), whole, doses=chunk > 1)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


class TestRows:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (chunked_prefill, decode):
            monkeypatch.setattr(module, "CHUNK", 4)

    @pytest.mark.parametrize("name", [*STEERINGS, *SCORES])
    def test_they_get_what_they_get_alone(self, llama: LM, name: str) -> None:
        """Beside short rows that go on meanwhile, and another long one that waits for its turn."""
        acting = {**STEERINGS, **SCORES}[name]
        batch = GenerationBatch(llama.model, llama.tokenizer, llama.layout)
        requests = [(1, 3, STEERINGS["two layers"], 9), (2, LENGTH, acting, 5), (4, 4, None, 9), (5, LENGTH, acting, 4)]
        keys = [
            batch.insert(GenerationRequest(tuple(llama.encode(prompt(n, size))), s, count, alternatives=0))
            for n, size, s, count in requests
        ]
        heard: dict[int, list[GenerationResponse]] = {key: [] for key in keys}
        before = 0
        while len(batch):
            for each in batch.step():
                assert each.error is None
                heard[each.key].append(each)
            before += not heard[keys[1]] and bool(heard[keys[0]])
        assert before >= LENGTH // 4  # the short one had tokens while the long one was read
        for key, (n, size, s, count) in zip(keys, requests, strict=True):
            (answer,) = llama.generate(prompt(n, size), s, max_new_tokens=count, chat=False, logprobs=True)
            assert [each.token for each in heard[key]] == list(answer.token_ids)
            assert [each.logprob for each in heard[key]] == pytest.approx(answer.logprobs, abs=1e-4)
            assert heard[key][-1].applied.edits == answer.applied.edits
            assert heard[key][-1].applied.dose == pytest.approx(answer.applied.dose, rel=0.2)

    def test_a_row_can_leave_between_two_chunks(self, llama: LM) -> None:
        batch = GenerationBatch(llama.model, llama.tokenizer, llama.layout)
        first, second = (batch.insert(GenerationRequest(tuple(llama.encode(prompt(n, 20))), None, 3)) for n in (1, 2))
        passes = []
        handle = llama.layout.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            assert batch.step() == batch.step() == []
            assert len(batch) == 2
            assert batch.remove(first) is not None
            assert len(batch) == 1
            responses = [each for _ in range(5) for each in batch.step()]
        finally:
            handle.remove()
        assert {each.key for each in responses} == {second}
        assert len(passes) == 2 + 5
        (answer,) = llama.generate(prompt(2, 20), max_new_tokens=3, chat=False)
        assert responses[0].token == answer.token_ids[0]
        assert batch.clear() == [second]
        assert not len(batch)

    def test_rows_of_one_prompt_read_it_once(self, llama: LM) -> None:
        batch = GenerationBatch(llama.model, llama.tokenizer, llama.layout)
        request = GenerationRequest(tuple(llama.encode(prompt(1, 20))), STEERINGS["all"], 3)
        keys = [batch.insert(request) for _ in range(3)]
        passes = []
        handle = llama.layout.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            assert [batch.step() for _ in range(4)] == [[]] * 4
            assert len(batch) == 3
            assert batch.remove(keys[1]) is not None
            responses = [each for _ in range(4) for each in batch.step()]
        finally:
            handle.remove()
        assert len(passes) == 20 // 4 + 2
        (answer,) = llama.generate(prompt(1, 20), STEERINGS["all"], max_new_tokens=3, chat=False)
        for key in (keys[0], keys[2]):
            assert [each.token for each in responses if each.key == key] == list(answer.token_ids)
        assert not [each for each in responses if each.key == keys[1]]

    def test_one_that_cannot_be_read_keeps_no_other_out(self, llama: LM) -> None:
        wild = steering((1, Add(torch.full((WIDTH,), 1e308, dtype=torch.float64)), RULES[0])).when(SPAN)
        batch = GenerationBatch(llama.model, llama.tokenizer, llama.layout)
        bad = batch.insert(GenerationRequest(tuple(llama.encode(prompt(1, 20))), wild.when(OPEN), 3))
        good = batch.insert(GenerationRequest(tuple(llama.encode(prompt(2, 20))), None, 1))
        responses = {each.key: each for _ in range(40) for each in batch.step()}
        assert responses[good].finish == "length"
        assert bad in responses
