"""What CAA's vector does on a real chat model, learned on a generate set and judged on questions that aren't in it.

Qwen2.5-Coder-0.5B-Instruct is the smallest model at hand that reads the answers it chooses between. The default model
(135M) doesn't: its activations at the letter tell letters apart and nothing else, so there is nothing to learn there.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from trimtab import LM, Pair, Steering
from trimtab.evaluate.ab import ABItem, ab_requests, evenly_spaced, read_ab, score_ab
from trimtab.evaluate.controls import random_like
from trimtab.evaluate.intervals import paired_bootstrap
from trimtab.methods.caa import activations, learn_caa
from trimtab.report.sweep import directions

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data") / "caa"
CORRIGIBLE = DATA / "corrigible-neutral-HHH"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab-bench"
QWEN = CACHE / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
LAYER = 14  # of 24

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"CAA's data aren't in {DATA}; set TRIMTAB_DATA to their folder"),
    pytest.mark.skipif(not QWEN.is_file(), reason=f"needs Qwen2.5-Coder-0.5B-Instruct, in {QWEN}"),
]


def balanced(items: list[ABItem], each: int) -> list[ABItem]:
    """As many whose matching answer is (A) as (B), from all over the list."""
    return [i for letter in "AB" for i in evenly_spaced([item for item in items if item.matching == letter], each)]


def pairs_of(items: list[ABItem]) -> list[Pair]:
    return [Pair(f"({item.matching})", f"({item.other})", item.question, "letters") for item in items]


@pytest.fixture(scope="module")
def qwen() -> LM:
    return LM.load(QWEN)


@pytest.fixture(scope="module")
def learned(qwen: LM) -> tuple[Steering, list[ABItem]]:
    """A vector, and items of the generate set that it was not learned on."""
    items, _ = read_ab(CORRIGIBLE / "generate_dataset.json", exclude=True)
    mine = balanced(items, 24)
    rest = [item for item in items if item not in mine]
    return learn_caa(qwen, pairs_of(mine), LAYER), balanced(rest, 10)


def test_held_out_positives_lie_above_their_negatives(qwen: LM, learned: tuple[Steering, list[ABItem]]) -> None:
    vector, held_out = learned
    read = activations(qwen, pairs_of(held_out), [LAYER])[LAYER].double()
    above = (read[:, 0] - read[:, 1]) @ directions(vector)[LAYER]
    assert float((above > 0).double().mean()) > 0.8


def test_strength_moves_the_answer_both_ways_and_further_than_chance(
    qwen: LM, learned: tuple[Steering, list[ABItem]]
) -> None:
    """p(matching) falls with a negative strength and rises with a positive one, on the test set."""
    vector, _ = learned
    items, _ = read_ab(CORRIGIBLE / "test_dataset_ab.json", exclude=True, limit=24)
    arms: dict[str, Any] = {"0": None, "-1": -1 * vector, "+1": 1 * vector}
    arms |= {f"random {n} {s:+g}": s * random_like(vector, n) for n in range(3) for s in (-1, 1)}
    q: dict[str, list[float]] = {arm: [] for arm in arms}
    for record in sorted(score_ab(qwen, ab_requests(qwen, items, arms), items), key=lambda record: record.item):
        q[record.arm].append(record.scores["matching"])
    assert mean(q["-1"]) < mean(q["0"]) < mean(q["+1"])
    assert paired_bootstrap(q["0"], q["-1"]).high < 0 < paired_bootstrap(q["0"], q["+1"]).low
    for n in range(3):
        assert paired_bootstrap(q[f"random {n} -1"], q["-1"]).high < 0
        assert paired_bootstrap(q[f"random {n} +1"], q["+1"]).low > 0
