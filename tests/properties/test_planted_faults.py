"""Faults that are easily made, planted one by one: for each a test fails that passes without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from trimtab.decoding import rejection
from trimtab.decoding.ranking import sensitivity
from trimtab.text import spans

TESTS = Path(__file__).parents[1]


def module_of(path: str) -> ModuleType:
    """The tests of another file, as a module of their own: what is planted in it stays in it."""
    spec = importlib.util.spec_from_file_location(f"planted_{Path(path).stem}", TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fails_only_with(plant: Callable[[], None], check: Callable[[], None]) -> None:
    check()
    plant()
    with pytest.raises(AssertionError):
        check()


def test_a_transposed_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("properties/test_rejection.py")
    lm = tiny.tiny("llama")

    def transposed(crossed: Tensor, raw: Tensor, ranking: str) -> Tensor:
        return sensitivity(crossed.T, raw, ranking)

    fails_only_with(
        lambda: monkeypatch.setattr("trimtab.engines.transformers.ranked.sensitivity", transposed),
        lambda: module.TestAgainstTheNaiveReference().test_one_pass_ranks_the_layers_as_separate_passes_do(lm, "paper"),
    )


def test_a_transposed_ranking_of_golden_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("decoding/test_plausibility.py")
    check = module.TestRankings().test_the_released_code_averages_over_the_steered_ones
    fails_only_with(
        lambda: monkeypatch.setattr(module, "sensitivity", lambda c, r, kind: sensitivity(c.T, r, kind)), check
    )


def test_a_span_that_is_one_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("text/test_spans.py")
    tokenizer = module.tokenizer.__wrapped__() if hasattr(module.tokenizer, "__wrapped__") else None
    assert tokenizer is not None
    plain = spans._tokens

    def longer(rendered: Any, start: int, stop: int) -> tuple[int, int]:
        first, after = plain(rendered, start, stop)
        return first, after + 1

    check = module.TestPhrases().test_tokens_are_those_that_hold_its_characters_and_no_others
    fails_only_with(lambda: monkeypatch.setattr(spans, "_tokens", longer), lambda: check(tokenizer))


def test_columns_that_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("properties/test_rejection.py")
    lm = tiny.tiny("llama")
    from trimtab.engines.transformers import scores

    plain = scores._columns

    def longer(positions: Any, row: Any, width: int) -> Tensor:
        columns = plain(positions, row, width)
        return columns | torch.nn.functional.pad(columns[:-1], (1, 0))

    check = module.TestRows().test_scaling_scores_is_scaling_keys
    fails_only_with(lambda: monkeypatch.setattr(scores, "_columns", longer), lambda: check(lm))


def test_a_bar_that_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("decoding/test_plausibility.py")

    def strict(raw: Tensor, tau: Tensor, candidates: Tensor) -> Tensor:
        return rejection.plausible(raw, torch.nextafter(tau, tau + 1), candidates)

    check = module.TestPlausibility().test_the_bar_itself_is_plausible
    fails_only_with(lambda: monkeypatch.setattr(module, "plausible", strict), check)


def test_a_gate_that_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("decoding/test_plausibility.py")

    def strict(raw: Tensor, tau: Tensor) -> Tensor:
        return raw.topk(2, dim=-1).values[:, 1] > tau

    check = module.TestPlausibility().test_the_bar_itself_is_plausible
    fails_only_with(lambda: monkeypatch.setattr(module, "gate_open", strict), check)


def test_maps_that_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token gets the low-rank map of another one."""
    module = module_of("properties/test_read_write.py")
    from trimtab.steering import low_rank

    plain = low_rank.LowRankBank.pick

    def exchanged(self: Any, states: Tensor) -> Any:
        return plain(self, states.flip(0))

    check = module.TestInAModel().test_every_row_is_what_the_naive_loop_gives
    fails_only_with(
        lambda: monkeypatch.setattr(low_rank.LowRankBank, "pick", exchanged), lambda: check(tiny.tiny("llama"))
    )


def test_a_map_that_reads_what_it_should_write(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("properties/test_read_write.py")
    from trimtab.steering import low_rank

    plain = low_rank.LowRank.edit

    def turned(self: Any, x: Tensor, strength: Tensor) -> Tensor:
        return plain(low_rank.LowRank(self.write, self.bias, self.read, self.low, self.high), x, strength)

    fails_only_with(
        lambda: monkeypatch.setattr(low_rank.LowRank, "edit", turned),
        module.test_published_formulas_that_it_is,
    )
