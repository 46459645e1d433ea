"""Activation capping and StTP/StMP, each against its formula written out number by number, over several families."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import prompt
from torch import Tensor

from trimtab import LM, Positions, SetProjection, Site, Steering, Threshold, TrimtabError, learn_cap, learn_sttp, load
from trimtab import save as save_steering
from trimtab.methods import sttp
from trimtab.text.pairs import Pair

pytestmark = [
    pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning"),
    # The formulas are tested here; how each family is read and steered, in tests/properties.
    pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3")),
]

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "falcon")
PAIRS = [Pair(prompt(3 * i, 3 + i % 3), prompt(3 * i + 1, 4), prompt(200 + i, 5), "answers") for i in range(8)]
SWAPPED = [Pair(pair.negative, pair.positive, pair.prompt, pair.shape) for pair in PAIRS]
PROMPTS = [prompt(seed, length) for seed, length in ((50, 5), (51, 9), (52, 6), (53, 12))]
NEW = 4
Formula = Callable[[list[float]], list[float]]
"""What becomes of one activation, a list of `width` numbers."""


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def side(lm: LM, layer: int, which: str) -> list[Tensor]:
    """The answers' tokens `[tokens, width]` of one side."""
    projections = []
    for pair in PAIRS:
        ids = lm.encode(f"{pair.prompt} {getattr(pair, which)}")
        projections.append(naive.activations(lm, ids, "residual", layer).double()[len(lm.encode(pair.prompt)) :])
    return projections


def means(lm: LM, layer: int, which: str) -> Tensor:
    return torch.stack([x.mean(0) for x in side(lm, layer, which)])


def dot(x: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(x, v, strict=True))


def shifted(x: list[float], v: list[float], by: float) -> list[float]:
    return [a + by * b for a, b in zip(x, v, strict=True)]


def capped(v: list[float], tau: float) -> Formula:
    """x + max(0, tau - x.v) v"""
    return lambda x: shifted(x, v, max(0.0, tau - dot(x, v)))


def at_wrong_side(v: list[float], line: float, target: float | None, alpha: float) -> Formula:
    """Where x.v < line: to the target, or mirrored on the line by the share alpha."""

    def formula(x: list[float]) -> list[float]:
        along = dot(x, v)
        if not along < line:
            return x
        return shifted(x, v, 2 * alpha * (line - along) if target is None else target - along)

    return formula


@torch.no_grad()
def naive_generate(lm: LM, text: str, formulas: dict[int, Formula], count: int) -> tuple[list[int], list[float]]:
    """Greedy, all recomputed at each step: the formula of a layer at every token but the first."""
    ids, logprobs = lm.encode(text), []
    start = len(ids)

    def changed(formula: Formula) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            return torch.stack([x[0], *(torch.tensor(formula(row.tolist()), dtype=x.dtype) for row in x[1:])])

        return change

    for _ in range(count):
        handles = [naive.hooked(lm, "residual", layer, changed(f)) for layer, f in formulas.items()]
        try:
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[start:], logprobs


def runs_as_written(lm: LM, steering: Steering, formulas: dict[int, Formula], path: Path) -> None:
    """In a padded batch beside unsteered rows, over a cache, and from a file: as each prompt alone by the formulas."""
    save_steering(steering, path / "s.safetensors")
    again = load(path / "s.safetensors")
    assert again == steering
    answers = lm.generate(PROMPTS, [again, None, again, 0.0 * again], max_new_tokens=NEW, logprobs=True)
    plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    for i in (1, 3):
        assert answers[i].logprobs == plain[i].logprobs
    for i in (0, 2):
        tokens, logprobs = naive_generate(lm, PROMPTS[i], formulas, NEW)
        assert list(answers[i].token_ids) == tokens
        assert answers[i].logprobs == pytest.approx(logprobs, abs=1e-6)
        assert answers[i].logprobs != plain[i].logprobs


def before_and_after(lm: LM, steering: Steering, layer: int) -> tuple[Tensor, Tensor]:
    """The activations `[tokens, width]` of some answers of both sides, unsteered and steered, each text alone."""
    values: tuple[list[Tensor], list[Tensor]] = ([], [])
    for text in [f"{pair.prompt} {text}" for pair in PAIRS[:4] for text in (pair.positive, pair.negative)]:
        values[0].append(lm.capture(text, [layer], Positions.all())[0][Site(layer)])
        with lm.steered(steering):
            values[1].append(lm.capture(text, [layer], Positions.all())[0][Site(layer)])
    return torch.cat(values[0]), torch.cat(values[1])


class TestCap:
    @pytest.mark.parametrize("over", ["wanted", "both"])
    @pytest.mark.parametrize("quantile", [0.25, 0.6])
    def test_what_is_learned(self, lm: LM, quantile: float, over: str) -> None:
        steering = learn_cap(lm, PAIRS, [1, 2], quantile=quantile, over=over)  # type: ignore[arg-type]
        for edit in steering.edits:
            plus, minus = (means(lm, edit.site.layer, which) for which in ("positive", "negative"))
            difference = plus.mean(0) - minus.mean(0)
            v = difference / difference.norm()
            assert isinstance(edit.operation, SetProjection)
            assert (edit.operation.one_sided, edit.strength) == (True, 1.0)
            assert torch.allclose(edit.operation.direction.double(), v, atol=1e-5)
            ordered = sorted([*(plus @ v).tolist(), *((minus @ v).tolist() if over == "both" else [])])
            place = quantile * (len(ordered) - 1)
            low, share = math.floor(place), place % 1
            cap = ordered[low] + share * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
            assert edit.operation.target == pytest.approx(cap, abs=1e-4 * float(plus.norm(dim=-1).mean()))
            caps = steering.card.measured["caps"][str(edit.site.layer)]
            for name, which in (("wanted", "positive"), ("other", "negative")):
                along = torch.cat(side(lm, edit.site.layer, which)) @ edit.operation.direction.double()
                assert caps["moved"][name] == pytest.approx(
                    float((along < edit.operation.target).double().mean()), abs=1e-6
                )

    def test_it_runs_by_the_formula(self, lm: LM, tmp_path: Path) -> None:
        steering = learn_cap(lm, PAIRS, [1, 3], quantile=0.6)
        formulas: dict[int, Formula] = {}
        for edit in steering.edits:
            v = edit.operation.direction.double().tolist()
            formulas[edit.site.layer] = capped(v, edit.operation.target)
        runs_as_written(lm, steering, formulas, tmp_path)

    def test_what_is_at_the_cap_stays_to_the_bit(self, lm: LM) -> None:
        for bound, sign in (("floor", 1), ("ceiling", -1)):
            steering = learn_cap(lm, PAIRS, 2, quantile=0.5, bound=bound).at(Positions.all())  # type: ignore[arg-type]
            (edit,) = steering.edits
            v, tau = sign * edit.operation.direction.double(), sign * edit.operation.target
            before, after = before_and_after(lm, steering, 2)
            stayed = 0
            for x, y in zip(before, after, strict=True):
                if sign * float(x.double() @ v) >= sign * tau:
                    stayed += 1
                    assert torch.equal(x, y)
                else:
                    assert float(y.double() @ v) == pytest.approx(tau, abs=1e-5 * max(1.0, float(x.norm())))
                    across = x.double() - y.double()
                    assert torch.allclose(across - (across @ v) * v, torch.zeros_like(across), atol=1e-5)
            assert 0 < stayed < len(before), bound

    def test_a_ceiling_is_the_floor_of_exchanged_pairs(self, lm: LM) -> None:
        ceiling, floor = learn_cap(lm, PAIRS, [2], bound="ceiling"), learn_cap(lm, SWAPPED, [2])
        assert ceiling.edits == floor.edits
        (edit,) = ceiling.edits
        minus = means(lm, 2, "negative") @ -edit.operation.direction.double()
        assert -edit.operation.target == pytest.approx(float(minus.quantile(0.75)), abs=1e-4)

    def test_the_card_and_the_defaults(self) -> None:
        lm = tiny.tiny("llama")
        steering = learn_cap(lm, PAIRS)
        assert [edit.site.layer for edit in steering.edits] == [3]  # 0.7 of four blocks
        assert {str(edit.positions) for edit in steering.edits} == {"all-but-first"}
        options = {"layers": [3], "quantile": 0.25, "over": "wanted", "bound": "floor"}
        assert (steering.card.method, steering.card.options) == ("cap", options)
        assert steering.card.measured["pairs"] == 8
        assert learn_cap(lm, PAIRS) == steering

    def test_bad_input(self) -> None:
        lm = tiny.tiny("llama")
        for quantile in (-0.1, 1.5, math.nan, True, "0.5"):
            with pytest.raises(TrimtabError, match=r"between 0 and 1.*25th percentile is 0\.25"):
                learn_cap(lm, PAIRS, quantile=quantile)  # type: ignore[arg-type]
        cases: list[tuple[dict[str, Any], str]] = [
            ({"over": "all"}, "no over 'all'; known: wanted, both"),
            ({"bound": "wall"}, "no bound 'wall'; known: floor, ceiling"),
            ({"layers": 9}, "layers 0 to 3"),
        ]
        for options, words in cases:
            with pytest.raises(TrimtabError, match=words):
                learn_cap(lm, PAIRS, **options)
        with pytest.raises(TrimtabError, match="got 1 pairs; give two or more"):
            learn_cap(lm, PAIRS[:1])
        with pytest.raises(TrimtabError, match=r"layer 3.*don't differ"):
            learn_cap(lm, [Pair("w7", "w7", "w8", "answers")] * 3)
        with pytest.raises(TrimtabError, match="from answers or texts"):
            learn_cap(lm, [Pair("w3", "w4", "", "prompts")] * 2)


def logistic_loss(x: Tensor, y: Tensor, w: Tensor, b: float) -> float:
    """The penalised loss that the probe is to minimise, in a loop."""
    total = float(w @ w) / 2
    for row, label in zip(x, y, strict=True):
        z = float(row @ w) + b
        total += math.log1p(math.exp(-abs(z))) + max(z, 0.0) - float(label) * z
    return total


class TestStTP:
    def test_the_probe_is_the_best_of_its_kind(self, lm: LM) -> None:
        """Its gradient is zero: no small step in any direction makes the loss smaller."""
        plus, minus = means(lm, 2, "positive"), means(lm, 2, "negative")
        probe = sttp.fit(plus, minus, 2)
        x = torch.cat([plus, minus])
        x = x - x.mean(0)
        scale = float(x.square().mean().sqrt())
        x, y = x / scale, torch.tensor([1.0] * 8 + [0.0] * 8)
        v = probe.direction.double()
        offset = (probe.boundary - float(torch.cat([plus, minus]).mean(0) @ v)) / scale
        sizes = torch.linspace(0.05, 20, 4000, dtype=torch.float64)
        size = min(sizes.tolist(), key=lambda s: logistic_loss(x, y, s * v, -s * offset))
        best = logistic_loss(x, y, size * v, -size * offset)
        draw = torch.Generator().manual_seed(0)
        for _ in range(20):
            step = 0.02 * torch.randn(len(v) + 1, generator=draw, dtype=torch.float64)
            assert logistic_loss(x, y, size * v + step[:-1], -size * offset + float(step[-1])) > best - 1e-4

    @pytest.mark.parametrize(("move", "alpha"), [("target", 1.0), ("target", 3.0), ("mirror", 1.0), ("mirror", 0.6)])
    def test_it_runs_by_the_formula(self, lm: LM, tmp_path: Path, move: str, alpha: float) -> None:
        steering = learn_sttp(lm, PAIRS, [1, 2], move=move, alpha=alpha)  # type: ignore[arg-type]
        formulas: dict[int, Formula] = {}
        for edit in steering.edits:
            layer = edit.site.layer
            v = edit.operation.direction.double()
            line = steering.card.measured["probes"][str(layer)]["line"]
            along = means(lm, layer, "positive") @ v
            target = float(along.mean()) + alpha * float(((along - along.mean()) ** 2).mean().sqrt())
            size = float(means(lm, layer, "positive").norm(dim=-1).mean())
            if move == "target":
                assert edit.operation.target == pytest.approx(target, abs=1e-5 * size)
                assert isinstance(edit.gate, Threshold)
                assert edit.gate.each_token
                exact, to = -edit.gate.threshold, edit.operation.target
            else:
                assert edit.strength == 2 * alpha
                exact, to = edit.operation.target, None
            assert exact == pytest.approx(line, abs=1e-6 * size)

            formulas[layer] = at_wrong_side(v.tolist(), exact, to, alpha)
        runs_as_written(lm, steering, formulas, tmp_path)

    @pytest.mark.parametrize("move", ["target", "mirror"])
    def test_only_tokens_on_the_wrong_side_move_and_to_where_they_should(self, lm: LM, move: str) -> None:
        steering = learn_sttp(lm, PAIRS, 2, move=move).at(Positions.all())  # type: ignore[arg-type]
        (edit,) = steering.edits
        v = edit.operation.direction.double()
        line = edit.operation.target if move == "mirror" else -edit.gate.threshold  # type: ignore[attr-defined]
        before, after = before_and_after(lm, steering, 2)
        for x, y in zip(before.double(), after.double(), strict=True):
            if float(x @ v) < line:
                to = edit.operation.target if move == "target" else 2 * line - float(x @ v)
                assert float(y @ v) == pytest.approx(to, abs=1e-5 * max(1.0, float(x.norm())))
                assert torch.allclose(x - (x @ v) * v, y - (y @ v) * v, atol=1e-5)
            else:
                assert torch.equal(x, y)

    def test_it_finds_a_planted_line(self) -> None:
        draw = torch.Generator().manual_seed(0)
        u = tiny.direction(1)
        noise = lambda: torch.randn(400, 32, generator=draw, dtype=torch.float64)  # noqa: E731
        wanted, other = noise() + 5 * u, noise() + 1 * u
        probe = sttp.fit(wanted, other, 0)
        assert float(probe.direction.double() @ u) > 0.9
        assert probe.boundary == pytest.approx(3, abs=0.3)
        assert sttp.held_out_accuracy(wanted, other, 0) > 0.93
        turned = sttp.fit(other, wanted, 0)
        assert turned.boundary == pytest.approx(-probe.boundary, abs=1e-4)
        far = sttp.fit(100 + 7 * wanted, 100 + 7 * other, 0)  # its units and its origin don't matter
        assert torch.allclose(far.direction, probe.direction, atol=1e-5)
        assert far.boundary == pytest.approx(7 * probe.boundary + 100 * float(probe.direction.double().sum()), rel=1e-4)

    def test_the_card_and_the_defaults(self) -> None:
        lm = tiny.tiny("llama")
        steering = learn_sttp(lm, PAIRS)
        assert [(edit.site.layer, str(edit.positions)) for edit in steering.edits] == [(2, "all-but-first")]
        assert steering.card.options == {"layers": [2], "move": "target", "alpha": 1.0}
        probe = steering.card.measured["probes"]["2"]
        assert 0 <= probe["accuracy"] <= 1
        assert probe["moved"]["wanted"] < probe["moved"]["other"]
        assert learn_sttp(lm, PAIRS) == steering

    def test_bad_input(self) -> None:
        lm = tiny.tiny("llama")
        cases: list[tuple[dict[str, Any], str]] = [
            ({"move": "away"}, "no move 'away'; known: target, mirror"),
            ({"alpha": -1.0}, "0 or more, got -1.*exchange the pairs' sides"),
            ({"alpha": math.nan}, "0 or more, got nan"),
            ({"move": "mirror", "alpha": 0.0}, "moves nothing; 0.5 moves tokens to the line"),
            ({"layers": [7]}, "layers 0 to 3"),
        ]
        for options, words in cases:
            with pytest.raises(TrimtabError, match=words):
                learn_sttp(lm, PAIRS, **options)
        with pytest.raises(TrimtabError, match="two pairs or more, got 1"):
            learn_sttp(lm, PAIRS[:1])
        with pytest.raises(TrimtabError, match=r"layer 2.*don't differ"):
            learn_sttp(lm, [Pair("w7", "w7", "w8", "answers")] * 3)
        probe = sttp.Probe(tiny.direction(1), 3.0)
        with pytest.raises(TrimtabError, match="target 2 isn't beyond the probe's line at 3"):
            sttp._edit(Site(1), probe, 2.0, "target", 1.0, Positions.all())
