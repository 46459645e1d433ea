"""ITI against its formulas, written out, over several families."""

from __future__ import annotations

from pathlib import Path

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import LAYERS, prompt

from trimtab import LM, Site, TrimtabError, load, save
from trimtab.engines.transformers.places import output_weight
from trimtab.methods.iti import learn_iti, rank_heads, split
from trimtab.text.pairs import Pair

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "opt", "falcon", "olmo2")
# The formulas are tested here; how each family is read and steered, in tests/properties.
pytestmark = pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3"))
PAIRS = [Pair(prompt(3 * i, 3), prompt(3 * i + 1, 4), prompt(7 + i // 2, 5), "answers") for i in range(14)]
PROMPTS = [prompt(seed, length) for seed, length in ((50, 4), (51, 9), (52, 6))]
BANK = [prompt(70 + i, 4 + i) for i in range(5)]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def last(lm: LM, ids: list[int], layer: int) -> torch.Tensor:
    """`[heads, size]` at the last token."""
    return naive.activations(lm, ids, "heads", layer)[-1].double().view(4, -1)


def literal_probe(x: list[torch.Tensor], y: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of the penalised log loss, by an optimizer that knows nothing of Newton."""
    w = torch.zeros(len(x[0]), dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    rows, labels = torch.stack(x), torch.tensor(y, dtype=torch.float64)
    search = torch.optim.LBFGS([w, b], max_iter=2000, tolerance_grad=1e-11, tolerance_change=1e-16, history_size=50, line_search_fn="strong_wolfe")  # fmt: skip # noqa: E501

    def closure() -> torch.Tensor:
        search.zero_grad()
        p = torch.sigmoid(rows @ w + b)
        loss = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum() + (w * w).sum() / 2
        loss.backward()
        return loss

    search.step(closure)
    return w.detach(), b.detach()


def literal_heads(lm: LM, direction: str, bank: list[str] | None) -> list[tuple[float, int, int, torch.Tensor, float]]:
    fitted, held = split(PAIRS)
    heads = []
    for layer in range(LAYERS):
        sides = []
        for pair in PAIRS:
            opening = lm.encode(pair.prompt)
            both = [[*opening, *lm.tokenizer(s, add_special_tokens=False)["input_ids"]] for s in (pair.positive, pair.negative)]  # fmt: skip # noqa: E501
            sides.append([last(lm, ids, layer) for ids in both])
        others = [last(lm, lm.encode(text), layer) for text in bank or ()]
        for h in range(4):
            x = [sides[i][m][h] for i in fitted for m in (0, 1)]
            w, b = literal_probe(x, [1, 0] * len(fitted))
            right = [(float(sides[i][m][h] @ w + b) > 0) == (m == 0) for i in held for m in (0, 1)]
            true, false = (torch.stack([side[m][h] for side in sides]) for m in (0, 1))
            u = true.mean(0) - false.mean(0) if direction == "mean" else w
            u = u / u.norm()
            bank_of = [activation[h] for activation in others] or [side[m][h] for side in sides for m in (0, 1)]
            p = [float(x @ u) for x in bank_of]
            mean = sum(p) / len(p)
            sigma = (sum((v - mean) ** 2 for v in p) / len(p)) ** 0.5
            heads.append((sum(right) / len(right), layer, h, u, sigma))
    return sorted(heads, key=lambda head: (-head[0], head[1], head[2]))


@pytest.mark.parametrize(("direction", "bank"), [("mean", None), ("probe", BANK)])
def test_heads_directions_and_deviations(lm: LM, direction: str, bank: list[str] | None) -> None:
    expected = literal_heads(lm, direction, bank)
    ranked = rank_heads(lm, PAIRS, direction=direction, bank=bank)
    assert [(h.layer, h.head) for h in ranked] == [(layer, head) for _, layer, head, _, _ in expected]
    for mine, (accuracy, _, _, u, sigma) in zip(ranked, expected, strict=True):
        assert mine.accuracy == pytest.approx(accuracy)
        assert torch.allclose(mine.direction, u, atol=1e-3)
        assert mine.sigma == pytest.approx(sigma, rel=1e-3)


def test_answers_are_what_the_formula_gives(lm: LM, tmp_path: Path) -> None:
    """In a batch of prompts of different lengths beside an unsteered one, with and without a cache, from a file."""
    learned = learn_iti(lm, PAIRS, heads=5, alpha=2.0)
    ranked = rank_heads(lm, PAIRS)[:5]
    push = torch.zeros(LAYERS, 4, ranked[0].direction.shape[0], dtype=torch.float64)
    for chosen in ranked:
        push[chosen.layer, chosen.head] = chosen.sigma * chosen.direction
    for edit in learned.edits:
        assert (edit.site.kind, edit.strength, str(edit.positions)) == ("heads", 2.0, "from-last-prompt-token")
        assert torch.allclose(edit.operation.direction, push[edit.site.layer].flatten().float())
    assert {edit.site.layer for edit in learned.edits} == {head.layer for head in ranked}
    save(learned, tmp_path / "s.safetensors")
    assert load(tmp_path / "s.safetensors") == learned
    steerings = [load(tmp_path / "s.safetensors"), None, -1.0 * learned]
    for way in ({}, {"use_cache": False}):
        answers = lm.generate(PROMPTS, steerings, max_new_tokens=4, logprobs=True, **way)  # type: ignore[arg-type]
        for text, acting, answer in zip(PROMPTS, steerings, answers, strict=True):
            tokens, logprobs = naive.generate(lm, text, acting, 4)
            assert list(answer.token_ids) == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_it_equals_a_bias_behind_the_projection(lm: LM) -> None:
    """The attention output grows by `W_o d` at steered tokens; heads that weren't chosen stay as they are."""
    learned = learn_iti(lm, PAIRS, [2], heads=2, alpha=3.0)
    (edit,) = learned.edits
    sites = [Site(2, "heads"), Site(2, "attention")]
    n = len(lm.encode(PROMPTS[1]))
    from trimtab import Positions

    (before,) = lm.capture(PROMPTS[1], sites, Positions.all())
    with lm.steered(learned):
        (after,) = lm.capture(PROMPTS[1], sites, Positions.all())
    assert torch.equal(before[sites[0]][: n - 1], after[sites[0]][: n - 1])
    v = 3.0 * edit.operation.direction.to(before[sites[0]].dtype)
    assert torch.equal(before[sites[0]][-1][v == 0], after[sites[0]][-1][v == 0])
    bias = output_weight(lm.layout, sites[0]) @ v
    assert torch.allclose(after[sites[1]][-1], before[sites[1]][-1] + bias, atol=1e-5)


def test_questions_stay_together() -> None:
    for seed in range(5):
        fitted, held = split(PAIRS, 0.3, seed)
        assert sorted(fitted + held) == list(range(len(PAIRS)))
        assert not {PAIRS[i].prompt for i in fitted} & {PAIRS[i].prompt for i in held}
    assert split(PAIRS, 0.3, 1) == split(PAIRS, 0.3, 1)
    assert split(PAIRS, 0.3, 1) != split(PAIRS, 0.3, 2)


def test_what_it_refuses() -> None:
    lm = tiny.tiny("llama")
    with pytest.raises(TrimtabError, match="from 1 to 16"):
        learn_iti(lm, PAIRS)  # 48 heads of 16
    with pytest.raises(TrimtabError, match="got 1, which is too few"):
        learn_iti(lm, PAIRS[:2], heads=2)
    with pytest.raises(TrimtabError, match="directions: mean, probe"):
        learn_iti(lm, PAIRS, heads=2, direction="pca")
    with pytest.raises(TrimtabError, match="between 0 and 1"):
        learn_iti(lm, PAIRS, heads=2, validation=1.0)
