"""Curves of thresholds, and the points chosen on them."""

from __future__ import annotations

import json
import random

import pytest

from trimtab import TrimtabError
from trimtab.learn.thresholds import CARD_POINTS, learn_threshold, roc


def shares(meant: list[float], others: list[float], line: float) -> tuple[float, float]:
    return sum(m > line for m in meant) / len(meant), sum(o > line for o in others) / len(others)


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_point_is_the_best_of_all_lines(seed: int) -> None:
    draw = random.Random(seed)
    meant = [round(draw.gauss(1, 1), 1) for _ in range(40)]
    others = [round(draw.gauss(0, 1), 1) for _ in range(30)]
    curve = roc(meant, others)
    pairs = [(m, o) for m in meant for o in others]
    assert curve.area == pytest.approx(sum((m > o) + 0.5 * (m == o) for m, o in pairs) / len(pairs))
    lines = [x / 20 for x in range(-120, 120)]
    for p in curve.points:
        assert (p.hits, p.false_alarms) == pytest.approx(shares(meant, others, p.threshold))
    youden, _ = learn_threshold(meant, others)
    tpr, fpr = shares(meant, others, youden.threshold)
    assert tpr - fpr == pytest.approx(max(a - b for a, b in (shares(meant, others, line) for line in lines)))
    f1, _ = learn_threshold(meant, others, by="f1")

    def score(line: float) -> float:
        hits, alarms = (n * k for n, k in zip(shares(meant, others, line), (40, 30), strict=True))
        return 2 * hits / (2 * hits + alarms + 40 - hits)

    assert score(f1.threshold) == pytest.approx(max(map(score, lines)))
    bounded = curve.best_point(false_alarms=0.1)
    assert bounded.false_alarms <= 0.1 < youden.false_alarms or bounded == youden
    middle, _ = learn_threshold(meant, others, by="midpoint")
    assert middle.threshold == pytest.approx((sum(meant) / 40 + sum(others) / 30) / 2)
    assert (middle.hits, middle.false_alarms) == pytest.approx(shares(meant, others, middle.threshold))


def test_the_line_is_in_the_middle_of_the_widest_gap() -> None:
    point, curve = learn_threshold([5.0, 6.0], [1.0, 2.0])
    assert (point.threshold, point.hits, point.false_alarms, curve.area) == (3.5, 1.0, 0.0, 1.0)


def test_a_card_holds_the_curve() -> None:
    draw = random.Random(1)
    point, curve = learn_threshold([draw.random() for _ in range(500)], [draw.random() for _ in range(500)])
    card = json.loads(json.dumps(curve.for_card(point)))
    assert len(card["curve"]) <= CARD_POINTS + 1
    assert card["chosen"]["threshold"] == pytest.approx(point.threshold)
    assert (card["curve"][0]["hits"], card["curve"][-1]["hits"]) == (1.0, 0.0)


def test_bad_input() -> None:
    with pytest.raises(TrimtabError, match="both sides"):
        roc([1.0], [])
    with pytest.raises(TrimtabError, match="unknown choice"):
        learn_threshold([1.0], [0.0], by="auc")  # type: ignore[arg-type]
