"""SADI against its formulas, written out, over several families."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import LAYERS, prompt

from trimtab import LM, Add, Edit, Positions, ScaleElements, Site, Steering, TrimtabError, load, save
from trimtab.methods.sadi import choose, learn_sadi, read_differences
from trimtab.text.pairs import Pair

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "opt", "falcon", "phi3", "gpt_neox")
# The formulas are tested here; how each family is read and steered, in tests/properties.
pytestmark = pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3"))
PAIRS = [
    Pair(prompt(3 * i, 3 + i % 3), prompt(3 * i + 1, 4 + i % 2), prompt(3 * i + 2, 5), "answers") for i in range(5)
]
KINDS = {"heads": "heads", "neurons": "neurons", "act_fn": "act_fn", "hidden": "mlp"}
PROMPTS = [prompt(seed, length) for seed, length in ((50, 4), (51, 9), (52, 6))]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@cache
def literal_differences(lm: LM, site: str) -> list[list[float]]:
    """`[layers][units]`: the mean over pairs of positive minus negative at the last token, pass by pass."""
    places = [(KINDS[site], layer) for layer in range(LAYERS)]
    totals = torch.zeros(LAYERS, naive.size_of(lm, KINDS[site]), dtype=torch.float64)
    for pair in PAIRS:
        opening = lm.encode(pair.prompt)
        for sign, side in ((1, pair.positive), (-1, pair.negative)):
            ids = [*opening, *lm.tokenizer(side, add_special_tokens=False)["input_ids"]]
            for layer, x in enumerate(naive.activations_at(lm, ids, places)):
                totals[layer] += sign * x[-1].double()
    return (totals / len(PAIRS)).tolist()


def literal_mask(lm: LM, site: str, k: int, score: str) -> list[list[float]]:
    """The global top K, as nested lists: a chosen head is masked whole."""
    values = literal_differences(lm, site)
    unit = len(values[0]) // 4 if site == "heads" else 1
    scored = []
    for layer, row in enumerate(values):
        for i in range(len(row) // unit):
            part = row[i * unit : (i + 1) * unit]
            mean = sum(part) / unit
            size = sum(v * v for v in part) ** 0.5
            scored.append(({"norm": size, "signed": mean, "absolute": abs(mean)}[score], layer, i))
    masks = [[0.0] * len(row) for row in values]
    for _, layer, i in sorted(scored, key=lambda entry: -entry[0])[:k]:
        masks[layer][i * unit : (i + 1) * unit] = [1.0] * unit
    return masks


@pytest.mark.parametrize("site", KINDS)
@pytest.mark.parametrize("score", ["norm", "signed", "absolute"])
def test_the_mask_is_the_top_k_over_all_layers(lm: LM, site: str, score: str) -> None:
    expected = literal_mask(lm, site, 6, score)
    learned = learn_sadi(lm, PAIRS, site=site, k=6, score=score)  # type: ignore[arg-type]
    masks = {edit.site.layer: edit.operation.direction.tolist() for edit in learned.edits}
    assert all(edit.site.kind == KINDS[site] for edit in learned.edits)
    assert masks == {layer: mask for layer, mask in enumerate(expected) if any(mask)}
    chosen = learned.card.measured["chosen"]
    assert sum(len(units) for units in chosen.values()) == 6


@pytest.mark.parametrize("site", KINDS)
def test_answers_are_what_the_formula_gives(lm: LM, site: str, tmp_path: Path) -> None:
    """In a batch of prompts of different lengths beside an unsteered one, with and without a cache, from a file."""
    paper = learn_sadi(lm, PAIRS, site=site, k=5, delta=1.5)
    assert {str(edit.positions) for edit in paper.edits} == {"last-prompt-token"}
    decode = learn_sadi(lm, PAIRS, site=site, k=5, delta=0.5, positions=Positions.from_last_prompt_token())
    save(paper, tmp_path / "s.safetensors")
    assert load(tmp_path / "s.safetensors") == paper
    steerings = [load(tmp_path / "s.safetensors"), None, decode]
    for way in ({}, {"use_cache": False}):
        answers = lm.generate(PROMPTS, steerings, max_new_tokens=4, logprobs=True, **way)  # type: ignore[arg-type]
        for text, acting, answer in zip(PROMPTS, steerings, answers, strict=True):
            tokens, logprobs = naive.generate(lm, text, acting, 4)
            assert list(answer.token_ids) == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_delta_zero_is_nothing(lm: LM) -> None:
    plain = lm.generate(PROMPTS, None, max_new_tokens=4, logprobs=True)
    answers = lm.generate(PROMPTS, learn_sadi(lm, PAIRS, delta=0.0), max_new_tokens=4, logprobs=True)
    assert [(a.token_ids, a.logprobs) for a in answers] == [(a.token_ids, a.logprobs) for a in plain]


def test_a_head_scaled_is_its_part_of_the_output_added(lm: LM) -> None:
    """The attention output grows by `delta * W_o[:, head] x[head]`."""
    learned = learn_sadi(lm, PAIRS, [2], k=1, delta=0.8, positions=Positions.all())
    (edit,) = learned.edits
    sites = [Site(2, "heads"), Site(2, "attention")]
    (before,) = lm.capture(PROMPTS[1], sites, Positions.all())
    with lm.steered(learned):
        (after,) = lm.capture(PROMPTS[1], sites, Positions.all())
    from trimtab.engines.transformers.places import output_weight

    part = (before[sites[0]] * edit.operation.direction) @ output_weight(lm.layout, sites[0]).T
    assert torch.allclose(after[sites[1]], before[sites[1]] + 0.8 * part, atol=1e-5)


@torch.no_grad()
def literal_frozen(lm: LM, site: str, masks: list[list[float]], delta: float, text: str) -> torch.Tensor:
    """The released code: a clean pass, its entries scaled, and the last token of every layer overwritten with them.

    The log-probabilities `[vocabulary]` after the prompt.
    """
    ids = lm.encode(text)
    kind = KINDS[site]
    clean = [x[-1] for x in naive.activations_at(lm, ids, [(kind, layer) for layer in range(LAYERS)])]
    scaled = [x * (1 + delta * torch.tensor(mask).to(x)) for x, mask in zip(clean, masks, strict=True)]

    def overwriting(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.cat([x[:-1], scaled[layer][None]])

    handles = [naive.hooked(lm, kind, layer, overwriting(layer)) for layer in range(LAYERS)]
    try:
        return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("site", KINDS)
def test_frozen_is_the_released_codes(lm: LM, site: str, tmp_path: Path) -> None:
    frozen = learn_sadi(lm, PAIRS, site=site, k=5, delta=1.5, mode="frozen")
    assert [edit.site.layer for edit in frozen.edits] == list(range(LAYERS))
    assert frozen.card.options["mode"] == "frozen"
    save(frozen, tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    assert again == frozen
    masks = literal_mask(lm, site, 5, "norm")
    plain = lm.generate(PROMPTS[1], max_new_tokens=3, logprobs=True)
    for way in ({}, {"use_cache": False}):
        answers = lm.generate(PROMPTS, [again, None, again], max_new_tokens=3, logprobs=True, **way)  # type: ignore[arg-type]
        assert answers[1].logprobs == pytest.approx(plain[0].logprobs, abs=1e-5)
        for i in (0, 2):
            expected = literal_frozen(lm, site, masks, 1.5, PROMPTS[i])
            assert answers[i].token_ids[0] == int(expected.argmax())
            assert answers[i].logprobs[0] == pytest.approx(float(expected.max()), abs=1e-4)
            tokens, logprobs = naive.generate(lm, PROMPTS[i], frozen, 3)
            assert list(answers[i].token_ids) == tokens
            assert answers[i].logprobs == pytest.approx(logprobs, abs=1e-4)


def test_frozen_is_live_for_one_layer_and_not_for_several(lm: LM) -> None:
    for layers, same in (([2], True), (None, False)):
        ways = [learn_sadi(lm, PAIRS, layers, k=3, delta=3.0, mode=mode) for mode in ("live", "frozen")]
        live, frozen = (lm.generate(PROMPTS, way, max_new_tokens=3, logprobs=True) for way in ways)
        for a, b in zip(live, frozen, strict=True):
            assert (a.logprobs == pytest.approx(b.logprobs, abs=1e-5)) == same
    nothing = learn_sadi(lm, PAIRS, k=3, delta=0.0, mode="frozen")
    plain, none = (lm.generate(PROMPTS, steering, max_new_tokens=3, logprobs=True) for steering in (None, nothing))
    assert [answer.logprobs for answer in plain] == [answer.logprobs for answer in none]


def test_held_at_the_activation_function_the_other_half_still_reacts(lm: LM) -> None:
    """Neurons held as a whole product don't; only in a gated MLP are the two different."""
    held = learn_sadi(lm, PAIRS, site="act_fn", k=20, delta=3.0, score="signed", mode="frozen")
    edits = [edit.operation for edit in held.edits]
    same_masks = Steering(
        tuple(
            Edit(Site(layer, "neurons"), operation, Positions.last_prompt_token(), 3.0)
            for layer, operation in enumerate(edits)
        )
    )
    change_held, change_elsewhere = (
        lm.generate(PROMPTS[0], s, max_new_tokens=1, logprobs=True)[0] for s in (held, same_masks)
    )
    gated = lm.name.removeprefix("tiny-") not in ("gpt2", "opt", "falcon", "gpt_neox")
    assert (change_held.logprobs != pytest.approx(change_elsewhere.logprobs, abs=1e-6)) == gated
    live = []
    for kind in ("act_fn", "neurons"):
        scaled = [
            Edit(Site(layer, kind), ScaleElements(edit.direction), Positions.last_prompt_token(), 3.0)
            for layer, edit in enumerate(edits)
        ]
        live.append(lm.generate(PROMPTS[0], Steering(tuple(scaled)), max_new_tokens=3, logprobs=True)[0].logprobs)
    assert live[0] == pytest.approx(live[1], abs=1e-6)


def test_masks_are_nested_in_k_and_blind_to_order() -> None:
    lm = tiny.tiny("llama")
    differences = read_differences(lm, PAIRS)
    size = {k: choose(lm, differences, k=k) for k in (1, 3, 8)}
    for small, large in ((1, 3), (3, 8)):
        for site, mask in size[small].items():
            assert bool((mask <= size[large][site]).all())
    turned = [Pair(p.negative, p.positive, p.prompt, p.shape) for p in PAIRS]
    for others in (PAIRS[::-1], PAIRS * 2, turned):
        masks = choose(lm, read_differences(lm, others), k=3)
        assert {s: m.tolist() for s, m in masks.items()} == {s: m.tolist() for s, m in size[3].items()}


def test_a_mask_for_another_operation() -> None:
    lm = tiny.tiny("qwen2")
    fixed = learn_sadi(lm, PAIRS, k=3, delta=2.0, operation="add")
    differences = read_differences(lm, PAIRS)
    masks = choose(lm, differences, k=3)
    assert [edit.site for edit in fixed.edits] == list(masks)
    for edit in fixed.edits:
        assert isinstance(edit.operation, Add)
        assert torch.allclose(edit.operation.direction, (masks[edit.site] * differences[edit.site]).float())


def test_what_it_refuses() -> None:
    lm = tiny.tiny("llama")
    cases = (
        ({"site": "keys"}, "unknown site 'keys'; sites: heads, neurons, act_fn, hidden"),
        ({"k": 99}, "from 1 to 16"),
        ({"k": 0}, "from 1 to 16"),
        ({"score": "best"}, "scores: norm, signed, absolute"),
        ({"operation": "rotate"}, "scale, add"),
        ({"mode": "cold"}, "live, frozen"),
        ({"mode": "frozen", "operation": "add"}, "the frozen mode only scales"),
        ({"mode": "frozen", "positions": Positions.all()}, "the frozen mode only scales"),
    )
    for options, message in cases:
        with pytest.raises(TrimtabError, match=message):
            learn_sadi(lm, PAIRS, **options)  # type: ignore[arg-type]
    with pytest.raises(TrimtabError, match="no pairs"):
        learn_sadi(lm, [])
    with pytest.raises(TrimtabError, match="no site neurons"):
        learn_sadi(tiny.tiny("mixtral"), PAIRS, site="neurons")
