"""PASTA against the released code's arithmetic, column by column, and against the paper's formula."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import tiny
import torch

from trimtab import BiasScores, Steering, TrimtabError, pasta

PROMPT = tiny.prompt(7, 12)
WORDS = PROMPT.split()
ONE, TWO = " ".join(WORDS[3:5]), " ".join(WORDS[8:10])
COLUMNS = 16
"""Of them the prompt's twelve, and four that were generated."""


def released(spans: Sequence[tuple[int, int]], alpha: float, position: str) -> list[float]:
    """What `edit_multisection_attention` adds to a row of scores (QingruZhang/PASTA, 3089b0c), in its order."""
    mask, constant = [0.0] * COLUMNS, math.log(alpha)
    for start, stop in spans:
        for j in range(len(WORDS)):
            if (start <= j < stop) == (position == "include"):
                mask[j] += constant
    if position == "include":
        for j in range(len(WORDS)):
            mask[j] -= constant
    return mask


def added(steering: Steering) -> list[float]:
    """The same of a steering's edits, which are one layer's."""
    mask = [0.0] * COLUMNS
    for edit in steering.edits:
        operation = edit.operation
        assert isinstance(operation, BiasScores)
        assert operation.outside
        inside = {j for start, stop in edit.positions.resolve(len(WORDS)) for j in range(start, stop or COLUMNS)}
        for j in range(len(WORDS)):
            mask[j] += 0.0 if j in inside else operation.bias
    return mask


@pytest.fixture(scope="module")
def lm() -> object:
    return tiny.tiny("llama")


def test_one_phrase_is_the_released_code(lm) -> None:
    for alpha, include in ((0.01, False), (100.0, True), (0.3, True)):
        made = pasta(lm, PROMPT, ONE, [1], alpha=alpha, include=include)
        expected = released([(3, 5)], alpha, "include" if include else "exclude")
        assert added(made) == pytest.approx(expected, abs=1e-12)
    assert added(pasta(lm, PROMPT, ONE, [1], alpha=100, include=True)) == pytest.approx(
        added(pasta(lm, PROMPT, ONE, [1]))
    )


def test_two_phrases(lm) -> None:
    """Included they are as released; excluded, the released code's is the sum of one steering each."""
    both = pasta(lm, PROMPT, [ONE, TWO], [1], alpha=100, include=True)
    spans = [(3, 5), (8, 10)]
    assert added(both) == pytest.approx(released(spans, 100.0, "include"), abs=1e-12)
    assert added(pasta(lm, PROMPT, [ONE, TWO], [1])) == pytest.approx(added(both))
    apart = pasta(lm, PROMPT, ONE, [1]) + pasta(lm, PROMPT, TWO, [1])
    assert added(apart) == pytest.approx(released(spans, 0.01, "exclude"), abs=1e-12)


def test_the_bias_is_the_papers_formula(lm) -> None:
    """Weights outside of the phrase times alpha, and all divided by their sum, over the prompt's columns."""
    weights = torch.softmax(torch.randn(len(WORDS), generator=torch.Generator().manual_seed(0)).double(), 0)
    scores = weights.log() + torch.tensor(added(pasta(lm, PROMPT, ONE, [1], alpha=0.2))[: len(WORDS)]).double()
    expected = torch.stack([w * (1 if 3 <= j < 5 else 0.2) for j, w in enumerate(weights)])
    assert torch.allclose(scores.softmax(0), expected / expected.sum())


def test_what_it_refuses(lm) -> None:
    with pytest.raises(TrimtabError, match="above 0"):
        pasta(lm, PROMPT, ONE, alpha=0)
    with pytest.raises(TrimtabError, match="needs heads"):
        pasta(lm, PROMPT, ONE, {})
