"""Divergence in nats: what it is by definition, and that reading a given answer steers as generating it does."""

from __future__ import annotations

import pytest
import torch
from tiny import direction, naive_logits, prompt, tiny

from trimtab import LM, TrimtabError
from trimtab.engines.request import AnsweredPrompt
from trimtab.engines.vllm.lm import VllmLM
from trimtab.errors import UnsupportedError
from trimtab.evaluate.divergence import Divergence, Reference, divergence, reference, with_divergence
from trimtab.files.steering_file import edits_digest
from trimtab.steering import (
    Ablate,
    Add,
    Card,
    Edit,
    Positions,
    Rotate,
    ScaleScores,
    SetProjection,
    Site,
    Steering,
    Threshold,
    emphasis,
)

PROMPTS = [prompt(seed, 5 + 2 * seed) for seed in range(3)]
FAMILIES = ("llama", "gpt2", "gemma2", "qwen2")


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny(request.param)


def steering(lm: LM, *edits: Edit) -> Steering:
    return Steering(edits, Card("planted", model=lm.identity))


def unit(seed: int = 0) -> torch.Tensor:
    return direction(seed) / direction(seed).norm()


def edits(lm: LM) -> dict[str, Steering]:
    late = Positions.generated()
    shut = Threshold(Site(1), unit(), 1e6)
    return {
        "add": steering(lm, Edit(Site(1), Add(2 * unit()))),
        "add to what is generated": steering(lm, Edit(Site(1), Add(2 * unit()), late)),
        "two layers": steering(lm, Edit(Site(0), Ablate(unit(1))), Edit(Site(2), SetProjection(unit(2), 3.0))),
        "rotate": steering(lm, Edit(Site(2), Rotate(unit(3), one_sided=False), Positions.all(), 0.4)),
        "shut gate": steering(lm, Edit(Site(1), Add(9 * unit()), gate=shut)),
    }


def naive(lm: LM, acting: Steering, text: str, tokens: int) -> list[float]:
    """By definition, from the naive forms of the model and of the edits."""
    ids = lm.encode(text)
    (answer,) = lm.generate([text], max_new_tokens=tokens)
    whole = [*ids, *answer.token_ids]
    p, q = (naive_logits(lm, whole, len(ids), edits).double().log_softmax(-1) for edits in ((), acting.edits))
    return (p.exp() * (p - q)).sum(-1)[len(ids) - 1 : -1].tolist()


@pytest.mark.parametrize("name", ["add", "add to what is generated", "two layers", "rotate"])
def test_it_is_the_divergence_of_each_token_after_the_unsteered_answer(lm: LM, name: str) -> None:
    acting = edits(lm)[name]
    got = divergence(lm, acting, PROMPTS, tokens=4)
    for text, row in zip(PROMPTS, got.nats, strict=True):
        assert list(row) == pytest.approx(naive(lm, acting, text, 4), rel=2e-4, abs=1e-6)
    assert got.tokens == sum(len(row) for row in got.nats)


def test_nothing_diverges_by_nothing(lm: LM) -> None:
    for nothing in (None, 0 * edits(lm)["add"], edits(lm)["shut gate"]):
        assert divergence(lm, nothing, PROMPTS, tokens=4) == Divergence(tuple((0.0,) * 4 for _ in PROMPTS))


def test_neighbours_do_not_matter(lm: LM) -> None:
    base = reference(lm, PROMPTS, tokens=4)
    together = divergence(lm, edits(lm)["add"], base)
    assert divergence(lm, edits(lm)["add"], base) == together
    for text, row in zip(PROMPTS, together.nats, strict=True):
        alone = divergence(lm, edits(lm)["add"], text, tokens=4)
        assert list(alone.nats[0]) == pytest.approx(list(row), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["add", "two layers", "rotate", "shut gate", "open gate", "emphasis"])
def test_a_steered_answer_is_as_likely_when_it_is_read_as_when_it_was_generated(name: str) -> None:
    lm = tiny("llama")
    opened = steering(lm, Edit(Site(1), Add(2 * unit()), gate=Threshold(Site(0), unit(), -1e6)))
    heeded = emphasis(ScaleScores(5.0), ((1, 4),), range(lm.layout.layers), "planted")
    acting = {**edits(lm), "open gate": opened, "emphasis": heeded}[name]
    answers = lm.generate(PROMPTS, acting, max_new_tokens=4, logprobs=True)
    texts = [AnsweredPrompt(tuple(lm.encode(p)), tuple(a.token_ids)) for p, a in zip(PROMPTS, answers, strict=True)]
    for text, answer, logits in zip(texts, answers, lm.answer_logits(texts, acting), strict=True):
        assert answer.logprobs is not None
        likelihoods = logits.double().log_softmax(-1)[range(4), list(text.answer)]
        assert likelihoods.tolist() == pytest.approx(list(answer.logprobs), rel=1e-4, abs=1e-5)


def test_figures_are_over_all_tokens() -> None:
    some = Divergence(((0.0, 1.0), (3.0,)))
    assert (some.mean, some.tokens) == (pytest.approx(4 / 3), 3)
    assert some.p95 == pytest.approx(2.8)


def test_what_cannot_be_read_is_refused_in_words() -> None:
    lm = tiny("llama")
    with pytest.raises(TrimtabError, match="no prompt"):
        divergence(lm, None, [])
    with pytest.raises(UnsupportedError, match=r"engine doesn't support probabilities of all tokens: .* engine can"):
        divergence(VllmLM.__new__(VllmLM), None, ["w3"])  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_are_infinitely_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 0: a steering that breaks the model must not look like one that does nothing."""
    lm = tiny("llama")
    base = reference(lm, PROMPTS, tokens=4)
    broken = [torch.full_like(logits, torch.nan) for logits in base.logits]
    monkeypatch.setattr(LM, "answer_logits", lambda *_: broken)
    result = divergence(lm, edits(lm)["add"], base)
    assert (result.mean, result.p95) == (float("inf"), float("inf"))
    assert Divergence(((0.0,) * 99, (float("inf"),))).p95 == 0.0
    with pytest.raises(TrimtabError, match="the unsteered model's logits aren't finite"):
        divergence(lm, None, Reference(base.texts, tuple(broken)))


def test_each_prompt_may_have_a_steering_of_its_own(lm: LM) -> None:
    first, second = steering(lm, Edit(Site(1), Add(2 * unit()))), steering(lm, Edit(Site(2), Add(-3 * unit(4))))
    base = reference(lm, PROMPTS, tokens=4)
    mixed = divergence(lm, [first, None, second], base).nats
    alone = [divergence(lm, each, base).nats for each in (first, None, second)]
    for i in range(3):
        assert mixed[i] == pytest.approx(alone[i][i], abs=1e-9)
    with pytest.raises(TrimtabError, match="2 steerings for 3 texts"):
        divergence(lm, [first, second], base)


def test_a_card_has_the_divergence_where_it_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    acting = edits(lm)["add"]
    measured = lm.divergence(acting, PROMPTS)
    recorded = with_divergence(lm, acting, PROMPTS)
    assert recorded == acting
    assert recorded.card.divergence == {
        "mean": round(measured.mean, 6),
        "p95": round(measured.p95, 6),
        "tokens": measured.tokens,
        "edits": edits_digest(acting),
    }
    assert with_divergence(lm, acting, []).card.divergence is None
    base = reference(lm, PROMPTS)
    broken = [torch.full_like(logits, torch.nan) for logits in base.logits]
    monkeypatch.setattr("trimtab.evaluate.divergence.reference", lambda *_, **__: base)
    monkeypatch.setattr(LM, "answer_logits", lambda *_: broken)
    nowhere = with_divergence(lm, acting, PROMPTS).card.divergence
    assert nowhere is not None
    assert (nowhere["mean"], nowhere["p95"]) == (None, None)
    monkeypatch.setattr(LM, "cannot", {"logits": "it returns none"})
    assert with_divergence(lm, acting, PROMPTS).card.divergence is None
