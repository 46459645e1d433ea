"""Positions by meaning in vLLM's workers: what a rig does is decided by the tokens that it was told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import naive_meanings
import pytest
import torch
from naive_meanings import holding_in
from tiny import LAYERS, WIDTH, direction, naive_together

from trimtab import Add, Edit, Positions, SetProjection, Site, Steering, TrimtabError, UnsupportedError
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.core import block_keys
from trimtab.engines.vllm.frontend import Link
from trimtab.engines.vllm.segment_tracker import reserved_segments
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager
from trimtab.engines.vllm.wire import Wire, content_of, identified_edits
from trimtab.engines.vllm.worker import _tokens_unknown

TOKENIZER = naive_meanings.tokenizer()
THINKING, ANSWER = Positions.thinking("<", "b>"), Positions.answer("<", "b>")
GIVEN = {
    "a": Steering(
        (
            Edit(Site(1), Add(direction(1)), THINKING | Positions.prompt()),
            Edit(Site(1), SetProjection(direction(2), target=1.5), ANSWER),
            Edit(Site(2), Add(direction(3)), ~Positions.at("a")),
        )
    ),
    "b": Steering((Edit(Site(1), Add(direction(4)), Positions.window(1, 3)),)),
    "c": Steering((Edit(Site(3), Add(direction(5)), Positions.after("<a") & ~Positions.first_generated(3)),)),
}
PROMPTS = {"a": "ab<a", "b": "b>b", "c": "az<>b>"}


def make_rig() -> SteeringManager:
    device = torch.device("cpu")
    bank = Bank(range(LAYERS), WIDTH, 24, 64, torch.float64, device)
    worker = SteeringManager({Site(layer): WIDTH for layer in range(LAYERS)}, torch.float64, device, bank)
    worker.tokenizer = lambda: TOKENIZER
    return worker


def placed(acting: Steering, prompt_length: int) -> tuple[Wire, Steering]:
    digest, content, strengths = content_of(acting)
    plain = {"parts": [[digest, list(strengths)]], "reading": None, "prompt_length": 0, "spans": []}
    part = Wire.from_plain(plain)
    return part.with_spans(
        reserved_segments(identified_edits(part.parts[0], content), prompt_length), prompt_length
    ), content


def start(worker: SteeringManager, name: str, ids: list[int], more: list[int] = []) -> None:  # noqa: B006
    wire, content = placed(GIVEN[name], len(ids))
    worker.steerings[wire.parts[0].digest] = content
    worker.start(name, wire, [*ids, *more])


def check_pass(worker: SteeringManager, texts: dict[str, list[int]], prompts: dict[str, int], chunks: Chunks) -> None:
    """Each token of a pass is steered as the whole text so far says."""
    worker.begin(chunks)
    for layer in range(LAYERS):
        x = torch.randn(sum(chunks.counts), WIDTH, dtype=torch.float64)
        hidden = x.clone()
        worker.apply(Site(layer), hidden, None)
        row = 0
        for name, first, count in zip(*chunks, strict=True):
            holds = holding_in(SimpleNamespace(tokenizer=TOKENIZER), texts[name])
            for t in range(first, first + count):
                here = [e for e in GIVEN[name].edits if e.site.layer == layer and holds(e, t, prompts[name])]
                expected = naive_together(here, x[row]) if here else x[row]
                torch.testing.assert_close(hidden[row], expected, rtol=1e-9, atol=1e-9)
                row += 1
    assert not worker.end().plain()[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_batch_with_preemption_is_the_textbook_formula_token_by_token(seed: int) -> None:
    torch.manual_seed(seed)
    worker = make_rig()
    texts = {name: TOKENIZER.encode(prompt) for name, prompt in PROMPTS.items()}
    prompts = {name: len(ids) for name, ids in texts.items()}
    for name, ids in texts.items():
        start(worker, name, ids)
    names = list(texts)
    check_pass(worker, texts, prompts, Chunks(names, [0] * 3, [prompts[name] for name in names]))
    for step in range(12):
        new = torch.randint(3, 87, (3,)).tolist()
        for name, token in zip(names, new, strict=True):
            texts[name].append(token)
        worker.add_sampled_tokens(names, [[token] for token in new])
        if step == 6:  # all is computed anew, in chunks
            worker.resume(names)
            for first in range(0, len(texts["a"]) - 1, 4):
                counts = [min(4, len(texts[name]) - 1 - first) for name in names]
                alive = [i for i, count in enumerate(counts) if count > 0]
                chunks = Chunks([names[i] for i in alive], [first] * len(alive), [counts[i] for i in alive])
                check_pass(worker, texts, prompts, chunks)
        check_pass(worker, texts, prompts, Chunks(names, [len(texts[name]) - 1 for name in names], [1] * 3))
    worker.finish(names)
    assert worker.bank.slots.used == 0


def test_a_begun_answer_is_read() -> None:
    worker, ids = make_rig(), TOKENIZER.encode(PROMPTS["a"])
    more = TOKENIZER.encode("a<ab>b")
    start(worker, "a", ids, more)
    whole = [*ids, *more]
    check_pass(worker, {"a": whole}, {"a": len(ids)}, Chunks(["a"], [0], [len(whole)]))


def test_a_token_that_wasnt_told_ends_the_request() -> None:
    worker, ids = make_rig(), TOKENIZER.encode(PROMPTS["a"])
    start(worker, "a", ids)
    start(worker, "b", ids)
    worker.expect({"a": 1, "b": 1})
    worker.begin(Chunks(["a", "b"], [len(ids), len(ids)], [1, 1]))
    for layer in range(LAYERS):
        worker.apply(Site(layer), torch.zeros(2, WIDTH, dtype=torch.float64), None)
    _, faults, _ = worker.end().plain()
    assert list(faults) == ["a"]
    assert "before the plugin knew which token it is" in faults["a"]


def test_a_worker_without_the_tokens() -> None:
    worker, ids = make_rig(), TOKENIZER.encode(PROMPTS["a"])
    wire, content = placed(GIVEN["a"], len(ids))
    worker.steerings[wire.parts[0].digest] = content
    with pytest.raises(TrimtabError, match="need the request's tokens"):
        worker.start("a", wire)


def test_blocks_are_keyed_by_all_that_may_act() -> None:
    def keys(acting: Steering, n: int, start: int, stop: int) -> Any:
        return block_keys(placed(acting, n)[0], start, stop)

    swapped = GIVEN["a"].at(ANSWER)
    assert keys(GIVEN["c"], 8, 0, 8) == []  # of the prompt's nothing is changed
    assert keys(GIVEN["c"], 8, 8, 16) == keys(GIVEN["c"], 8, 8, 16) != []
    different = [keys(GIVEN["a"], 8, 8, 16), keys(swapped, 8, 8, 16), keys(0.5 * GIVEN["a"], 8, 8, 16)]
    assert len({str(key) for key in (*different, keys(GIVEN["a"], 7, 8, 16))}) == 4
    wire = placed(GIVEN["a"], 8)[0]
    assert len(wire.slots) == len({s.key for s in wire.spans if s.banked}) > 2


def test_engines_that_dont_tell_tokens_refuse_them() -> None:
    link = Link(
        8, LAYERS, WIDTH, False, tokens_unknown="async scheduling leaves it on the device; async_scheduling=False"
    )
    with pytest.raises(UnsupportedError, match=r"positions by meaning depend on each token.*async_scheduling=False"):
        link.check(GIVEN["a"])
    link.check(GIVEN["b"])

    def worker(asynchronous: bool, stages: int, first: bool) -> Any:
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
            parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        )
        runner = SimpleNamespace(_model_forward=None) if first else SimpleNamespace()
        return SimpleNamespace(vllm_config=config, model_runner=runner)

    assert _tokens_unknown(worker(False, 1, True)) == ""
    for case, words in (((True, 1, True), "async_sch"), ((False, 2, True), "pipeline"), ((False, 1, False), "V2")):
        assert words in _tokens_unknown(worker(*case))
