"""Gates that the generating pass itself decides, on tiny random models of many families."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import FAMILIES, by_transformers, direction, prompt

from trimtab import LM, Add, Edit, MaskNeurons, Positions, ScaleScores, SetProjection, Site, Steering, Threshold
from trimtab.engines.transformers import joining, static_batches
from trimtab.engines.transformers.generate import Generation
from trimtab.engines.transformers.places import place
from trimtab.engines.transformers.prefill import decides_at_prefill
from trimtab.steering import emphasis
from trimtab.steering.gates import Gate

LATE = Positions.from_last_prompt_token()
PROMPTS = [prompt(0, 4), prompt(0, 4), *(prompt(seed, 3 + seed) for seed in range(2, 6))]  # one gate and its opposite


def gate(seed: int, layer: int, positions: Positions | None = None) -> Gate:
    test = Threshold(Site(layer), direction(seed), 0.0)
    return test if positions is None else Threshold(Site(layer), direction(seed), 0.0, positions=positions)


def edits(*several: Edit) -> Steering:
    return Steering(several)


STEERINGS: list[Steering | None] = [
    edits(Edit(Site(1), Add(direction(1, 2.0)), LATE, gate=gate(2, 3))),
    edits(Edit(Site(1), Add(direction(1, 2.0)), LATE, gate=~gate(2, 3))),
    None,
    edits(
        Edit(Site(0), Add(direction(3, 2.0)), Positions.generated(), gate=gate(4, 2, Positions.prompt())),
        Edit(Site(2), SetProjection(direction(5), target=2.0), LATE, gate=~gate(4, 2, Positions.prompt())),
    ),
    edits(Edit(Site(2), Add(direction(6, 3.0)), LATE)),
    edits(Edit(Site(3), Add(direction(7, 2.0)), LATE, gate=gate(8, 0) | ~gate(8, 0))),
]

DEEPER: list[Steering | None] = [
    edits(Edit(Site(2), Add(direction(1, 2.0)), gate=gate(2, 1))),
    edits(Edit(Site(2), Add(direction(1, 2.0)), gate=~gate(2, 1))),
    None,
    edits(
        Edit(Site(2, "block_input"), Add(direction(3, 2.0)), LATE, gate=gate(4, 0, Positions.all())),
        Edit(Site(3), SetProjection(direction(5), target=2.0), gate=~gate(4, 0, Positions.all()) | gate(2, 1)),
    ),
    edits(Edit(Site(2), Add(direction(6, 3.0)), Positions.prompt())),
    edits(Edit(Site(3, "attention"), Add(direction(7, 2.0)), gate=gate(8, 0) | ~gate(8, 0))),
]
"""Every edit is deeper than what the batch's gates read, wherever it acts."""


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(params=[{}, by_transformers()], ids=["by steps", "by transformers"])
def loop(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options by which one decoding loop or the other is taken."""
    return request.param  # type: ignore[no-any-return]


def answers(lm: LM, steerings: Any = STEERINGS, count: int = 5, **more: Any) -> list[Generation]:
    return lm.generate(PROMPTS, steerings, max_new_tokens=count, chat=False, logprobs=True, **more)


def by_passes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, lm: LM, steerings: Any = STEERINGS, count: int = 5, **more: Any
) -> list[Generation]:
    with monkeypatch.context() as context:
        for module in (static_batches, joining):
            context.setattr(module, "decides_at_prefill", lambda *_: False)
        return answers(lm, steerings, count, **more)


@pytest.mark.long_unless(lambda lm, count: count == 5 or lm in ("llama", "gemma3", "falcon", "qwen3_moe", "qwen2_vl"))
@pytest.mark.parametrize("steerings", [STEERINGS, DEEPER], ids=["any layers", "deeper edits"])
@pytest.mark.parametrize("count", [1, 5])
def test_answers_are_those_of_gates_read_beforehand(
    lm: LM, monkeypatch: pytest.MonkeyPatch, count: int, steerings: list[Steering | None], loop: dict[str, Any]
) -> None:
    before = by_passes_of_their_own(monkeypatch, lm, steerings, count, **loop)
    acted = [bool(earlier.applied.edits) for earlier in before]
    assert sorted(acted[:2]) == [False, True]
    plain = answers(lm, None, count, **loop)
    for answer, other, unsteered in zip(answers(lm, steerings, count, **loop), before, plain, strict=True):
        assert answer.applied.edits == other.applied.edits
        assert answer.token_ids == other.token_ids
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert [d.layer for d in answer.applied.doses] == [d.layer for d in other.applied.doses]
        same = {"rel": 1e-4} if steerings is DEEPER else {"rel": 0.9}  # otherwise not of the same tokens
        assert answer.applied.dose == pytest.approx(other.applied.dose, **same)
        if not answer.applied.edits:
            assert (answer.token_ids, answer.logprobs) == (unsteered.token_ids, unsteered.logprobs)


@pytest.mark.parametrize("steerings", [STEERINGS, DEEPER], ids=["any layers", "deeper edits"])
@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 3, "seed": 7}, {"num_beams": 2}])
def test_several_rows_a_request(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], steerings: list[Steering | None]
) -> None:
    lm = tiny.tiny("llama")
    before = by_passes_of_their_own(monkeypatch, lm, steerings, **options)
    answers_of_rows = answers(lm, steerings, **options)
    assert [answer.token_ids for answer in answers_of_rows] == [answer.token_ids for answer in before]
    assert [answer.applied.edits for answer in answers_of_rows] == [answer.applied.edits for answer in before]


def test_no_pass_is_made_for_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny("llama")
    passes: list[tuple[int, ...]] = []
    handle = lm.layout.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        by_passes_of_their_own(monkeypatch, lm)
        alone = len(passes)
        passes.clear()
        answers(lm)
        width = max(len(lm.encode(text, chat=False)) for text in PROMPTS)
        assert passes == [(6, width)] + [(6, 1)] * 5  # the last prompt token once more, then four tokens
        assert alone > 5
        passes.clear()
        shut = Steering((Edit(Site(1), Add(direction(1)), LATE, gate=gate(2, 3) & ~gate(2, 3)),))
        assert not any(answer.applied.edits for answer in answers(lm, shut))
        assert passes == [(5, width)] + [(6, 1)] * 4  # two are of one prompt, and of one steering here
        passes.clear()
        assert any(answer.applied.edits for answer in answers(lm, DEEPER))
        assert passes == [(6, width)] + [(6, 1)] * 4
    finally:
        handle.remove()


def test_what_acts_on_generated_tokens_alone_leaves_the_first_to_the_bit(lm: LM, loop: dict[str, Any]) -> None:
    later = Steering((Edit(Site(1), Add(direction(1, 4.0)), Positions.generated(), gate=gate(8, 0) | ~gate(8, 0)),))
    steerings = [later, None, STEERINGS[5], later, None, later]
    plain, steered = answers(lm, None, **loop), answers(lm, steerings, **loop)
    for answer, other, steering in zip(steered, plain, steerings, strict=True):
        assert answer.logprobs is not None
        assert other.logprobs is not None
        assert (answer.logprobs[0] == other.logprobs[0]) == (steering is not STEERINGS[5])
        assert (answer.logprobs == other.logprobs) == (steering is None)


def test_operations_that_the_prompt_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny("llama")
    size = place(lm.layout, Site(1, "neurons")).size
    thresholds = torch.linspace(0, 3, size)
    masked = Steering((Edit(Site(1, "neurons"), MaskNeurons(thresholds), Positions.generated()),))
    steerings = [masked, masked, None, STEERINGS[0], masked, STEERINGS[1]]
    before = by_passes_of_their_own(monkeypatch, lm, steerings=steerings)
    assert decides_at_prefill(lm.layout, steerings, [9] * 6, {})
    answers_now = answers(lm, steerings)
    assert [gated.token_ids for gated in answers_now] == [earlier.token_ids for earlier in before]
    for answer, other in zip(answers_now, before, strict=True):
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert answers_now[4].logprobs != answers(lm, None)[4].logprobs


def test_what_isn_t_decided_so() -> None:
    layout, lengths = tiny.tiny("llama").layout, [9]
    gated = STEERINGS[0]
    assert gated is not None
    assert decides_at_prefill(layout, [gated], lengths, {"do_sample": False, "top_k": None})
    assert not decides_at_prefill(layout, [STEERINGS[4]], lengths, {})  # nothing to decide
    assert not decides_at_prefill(layout, [gated.at(Positions.all())], lengths, {})
    assert decides_at_prefill(layout, DEEPER, [9] * 6, {})
    assert not decides_at_prefill(layout, [*DEEPER[1:], edits(Edit(Site(1), Add(direction(1))))], [9] * 6, {})
    assert not decides_at_prefill(layout, [gated, STEERINGS[4].at(Positions.prompt())], [9, 9], {})  # type: ignore[union-attr]
    assert not decides_at_prefill(layout, [gated], lengths, {"cache_implementation": "static"})
    assert not decides_at_prefill(layout, [gated], lengths, {"prefill_chunk_size": 4})
    assert not decides_at_prefill(layout, [gated], lengths, {"use_cache": False})
    heeding = gated + emphasis(ScaleScores(), ((1, 3),), range(2), "directer")
    assert not decides_at_prefill(layout, [heeding], lengths, {})
    windows = tiny.tiny("gemma3").layout  # they forget what was before
    assert not decides_at_prefill(windows, [gated], lengths, {})
    assert decides_at_prefill(windows, DEEPER, [9] * 6, {})


@pytest.mark.parametrize("steerings", [STEERINGS, DEEPER], ids=["any layers", "deeper edits"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, steerings: list[Steering | None], loop: dict[str, Any]
) -> None:
    lm = tiny.tiny("llama")
    plain = answers(lm, None)
    broken = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("no memory"))  # noqa: E731
    with monkeypatch.context() as context:
        context.setattr(type(lm.layout.blocks[2]), "forward", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            answers(lm, steerings, **loop)
    hooks = [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert answers(lm, None) == plain
