"""The gate, the plausibility test, the ladders and the rankings, as functions of plain numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.decoding.ranking import disturbance, order_layers, sensitivity
from trimtab.decoding.rejection import (
    Rejection,
    gate_open,
    halving_subsets,
    ladder,
    plausible,
    threshold,
)
from trimtab.errors import TrimtabError
from trimtab.steering import Add, Edit, Positions, ScaleScores, Site, emphasis

SIZES = {  # layers: sizes of the rungs, with the released code's two layers at least, and with the paper's one
    1: ([], [1]),
    2: ([2], [2, 1]),
    3: ([3], [3, 1]),
    6: ([6, 3], [6, 3, 1]),
    24: ([24, 12, 6, 3], [24, 12, 6, 3, 1]),
    28: ([28, 14, 7, 3], [28, 14, 7, 3, 1]),
    32: ([32, 16, 8, 4, 2], [32, 16, 8, 4, 2, 1]),
}
logits = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=7)
betas = st.floats(0.01, 1.0)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


class TestLadders:
    @pytest.mark.parametrize("layers", SIZES)
    def test_sizes(self, layers: int) -> None:
        order = list(range(layers))[::-1]
        for min_layers, expected in zip((2, 1), SIZES[layers], strict=True):
            assert [len(rung) for rung in halving_subsets(order, min_layers)] == expected

    @given(st.permutations(list(range(13))), st.integers(1, 4))
    def test_rungs_are_nested_beginnings_of_the_order(self, order: list[int], min_layers: int) -> None:
        rungs = halving_subsets(order, min_layers)
        assert rungs[0] == tuple(order)
        for bigger, smaller in pairwise(rungs):
            assert smaller == bigger[: len(bigger) // 2]
        assert all(len(rung) >= min_layers for rung in rungs)

    def test_halving_keeps_the_best_layers_and_all_of_their_edits(self) -> None:
        edits = [Edit(Site(layer), Add(torch.ones(2))) for layer in (0, 1, 2, 3, 1)]
        rungs = ladder(edits, Rejection(min_layers=1), (1, 3, 0, 2))
        assert [[edit.site.layer for edit in rung] for rung in rungs] == [[0, 1, 2, 3, 1], [1, 3, 1], [1, 1]]

    def test_strengths_halve(self) -> None:
        rungs = ladder([Edit(Site(0), Add(torch.ones(2)), strength=2.0)], Rejection(ladder="strength"))
        assert [edit.strength for (edit,) in rungs] == [2, 1, 0.5, 0.25, 0.125]

    def test_half_the_strength_of_a_scaling_is_its_root(self) -> None:
        (edit,) = emphasis(ScaleScores(100.0), [(1, 2)], [0]).edits
        assert [edit.operation.factor(s) for s in (0, 0.5, 1)] == pytest.approx([1, 10, 100])

    def test_one_layer_with_no_rung_raises(self) -> None:
        edits = [Edit(Site(3), Add(torch.ones(2)))]
        with pytest.raises(TrimtabError, match=r"1 layer.*strength"):
            ladder(edits, Rejection(), (3,))
        assert len(ladder(edits, Rejection(min_layers=1), (3,))) == 1

    def test_a_ranking_that_leaves_a_layer_out_raises(self) -> None:
        with pytest.raises(TrimtabError, match="leaves out layer 3"):
            ladder([Edit(Site(3), Add(torch.ones(2)))], Rejection(), (0, 1))


class TestPlausibility:
    def test_the_bar_itself_is_plausible(self) -> None:
        """`z >= tau`, not `>`: a token exactly at the bar opens the gate and is accepted."""
        z = rows([2.0, 2.0, 1.0], [2.0, 2.0 + math.log(0.5), 0.0])
        z[1, 1] = threshold(z[1:], torch.tensor([0.5]))[0]
        tau = threshold(z, torch.tensor([1.0, 0.5]))
        assert gate_open(z, tau).tolist() == [True, True]
        assert plausible(z, tau, torch.tensor([1, 1])).tolist() == [True, True]
        assert plausible(z, tau, torch.tensor([2, 2])).tolist() == [False, False]

    @given(logits, betas)
    def test_the_bar_is_a_share_of_the_best_probability(self, values: list[float], beta: float) -> None:
        z = torch.tensor([values], dtype=torch.float64)
        p = z.softmax(-1)[0]
        allowed = z[0] >= threshold(z, torch.tensor([beta]))[0]
        for share, ok in zip((p / p.max()).tolist(), allowed.tolist(), strict=True):
            if abs(share - beta) > 1e-6:
                assert ok == (share >= beta)
        assert int(allowed.sum()) <= 1 / (beta * float(p.max())) * (1 + 1e-6)

    @given(logits, betas, st.data())
    def test_a_shut_gate_loses_nothing(self, values: list[float], beta: float, data: st.DataObject) -> None:
        """Where it is shut, whatever is proposed, the token is the raw one."""
        z = torch.tensor([values])
        tau = threshold(z, torch.tensor([beta]))
        proposal = data.draw(st.integers(0, len(values) - 1))
        if not bool(gate_open(z, tau)[0]) and bool(plausible(z, tau, torch.tensor([proposal]))[0]):
            assert proposal == int(z.argmax())

    def test_beta_zero_accepts_everything_and_one_only_the_best(self) -> None:
        z = rows([3.0, -200.0, -torch.inf])
        everything = threshold(z, torch.tensor([0.0]))
        assert gate_open(z, everything).tolist() == [True]
        assert plausible(z, everything, torch.tensor([1])).tolist() == [True]
        assert gate_open(z, threshold(z, torch.tensor([1.0]))).tolist() == [False]


class TestRankings:
    CROSSED = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.9, 0.1], [0.1, 0.2, 0.4]])
    RAW = torch.tensor([0.1, 0.2, 0.05])

    def test_the_paper_averages_over_the_observed_layers(self) -> None:
        # rows less twice the raw distances: [.3, -.3, .2], [0, .5, 0], [-.1, -.2, .3]
        scores = sensitivity(self.CROSSED, self.RAW, "paper")
        assert scores.tolist() == pytest.approx([0.2 / 3, 0.5 / 3, 0.0], abs=1e-6)
        assert order_layers(scores, [0, 1, 2]) == (1, 0, 2)

    def test_the_released_code_averages_over_the_steered_ones(self) -> None:
        crossed = self.CROSSED.clone()
        crossed[2, 0] = -0.3  # clamped
        scores = sensitivity(crossed, self.RAW, "repo")
        assert scores.tolist() == pytest.approx([0.7 / 3, 1.2 / 3, 0.8 / 3], abs=1e-6)
        assert order_layers(scores, [0, 1, 2]) == (1, 2, 0)

    def test_ties_go_to_the_lower_layer(self) -> None:
        assert order_layers(torch.tensor([1.0, 2.0, 1.0, 2.0]), [5, 9, 3, 1]) == (1, 9, 3, 5)

    def test_distances(self) -> None:
        pre = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        post = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0]])
        crossed, raw = disturbance(pre, post)
        # row 1: dist([1,0], [0,-1]) + dist([0,1], [0,1]) = 1 + 0; row 2 is the raw one: 1 + 1
        assert crossed.tolist() == pytest.approx([1.0, 2.0])
        assert float(raw) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 1.5}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"min_layers": 0}, "min_layers"),
        ({"ladder": "third"}, "halve, strength"),
        ({"schedule": "fast"}, "optimistic, fused"),
        ({"ranking": "random"}, "paper, repo"),
        ({"ranking": (1, 1)}, "twice"),
    ],
)
def test_settings_that_make_no_sense_raise(options: dict, named: str) -> None:
    with pytest.raises(TrimtabError, match=named):
        Rejection(**options)


@pytest.mark.parametrize(
    "positions", [Positions.span(0, 2), Positions.prompt(), Positions.span(1, 2) | Positions.span(3, 5)]
)
def test_edits_of_scores_are_plain_data(positions: Positions) -> None:
    edit = Edit(Site(2, "scores"), ScaleScores(), positions)
    assert edit == Edit(Site(2, "scores"), ScaleScores(100.0), positions)
    assert str(edit).startswith("1 * scale_scores @ scores[2]")
    with pytest.raises(TrimtabError, match="can't act at"):
        Edit(Site(2), ScaleScores(), positions)
    with pytest.raises(TrimtabError, match="can't act at"):
        Edit(Site(2, "scores"), Add(torch.ones(2)), positions)
