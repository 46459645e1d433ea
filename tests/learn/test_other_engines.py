"""Every learning function on an engine that shows the sizes of its model and nothing else: it works, or it is refused
before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, WIDTH, prompt
from torch import Tensor

import trimtab
from trimtab import LM, Highlight, Site, Steering, UnsupportedError
from trimtab.engines.answer import Generation
from trimtab.engines.contract import FEATURES, Sizes
from trimtab.engines.language_model import LanguageModel
from trimtab.engines.request import AnsweredPrompt, Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.steering import ModelId

ANSWERS = [(prompt(90 + i // 2, 5), prompt(i, 4), prompt(50 + i, 4)) for i in range(8)]
PROMPTS = [(prompt(90 + i, 5), prompt(20 + i, 6)) for i in range(8)]
HARMFUL, HARMLESS = ([prompt(seed + i, 6) for i in range(6)] for seed in (100, 130))
EXAMPLES = [Highlight(f"w{i} w{i + 20} w{i + 40}", f"w{i + 20}", f"w{i}", f"w{i + 40}") for i in range(4)]
GATE = {"when": HARMFUL, "unless": HARMLESS}

ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "learn_actadd": ((), {"positive": "w1 w2", "negative": "w3 w4"}),
    "learn_bipo": ((ANSWERS,), {"steps": 1}),
    "learn_caa": ((ANSWERS,), {}),
    "learn_cap": ((ANSWERS,), {}),
    "learn_cast": ((ANSWERS,), GATE),
    "learn_condition": ((HARMFUL, HARMLESS), {}),
    "learn_distill": ((), {"instruction": "w5 w6"}),
    "learn_hpr": ((ANSWERS,), {}),
    "learn_icv": ((ANSWERS,), {}),
    "learn_inferaligner": ((HARMFUL,), {"harmless": HARMLESS}),
    "learn_instruct": ((PROMPTS,), {}),
    "learn_iti": ((ANSWERS,), {"heads": 2}),
    "learn_length": (("concise",), {"base": ["w1 w2", "w3"]}),
    "learn_loreft": ((ANSWERS,), {"steps": 1}),
    "learn_many": (({"one": PROMPTS},), {}),
    "learn_probe": ((ANSWERS,), {}),
    "learn_random": ((), {}),
    "learn_repe": ((ANSWERS,), {}),
    "learn_reps": ((ANSWERS,), {"steps": 1}),
    "learn_sadi": ((ANSWERS,), {"k": 2}),
    "learn_safety": ((HARMFUL,), {"harmless": HARMLESS}),
    "learn_seka": ((EXAMPLES,), {}),
    "learn_steermoe": ((ANSWERS,), {}),
    "learn_sttp": ((ANSWERS,), {}),
    "learn_tda": (([prompt(1, 5), prompt(2, 7)],), {}),
    "learn_word": (("w7",), {"base": ["w1 w2", "w3"]}),
    "learn_word_logit": (("w7",), {}),
}
REFUSED = {"bipo", "distill", "loreft", "reps", "seka", "steermoe", "tda", "word_logit"}
HEADS = {"iti", "sadi"}


class Elsewhere(LanguageModel):
    """A model in another process, so to speak: any of its sites can be read, its modules can't be reached."""

    engine = "elsewhere"
    cannot = dict.fromkeys(FEATURES, "the model is elsewhere")

    def __init__(self, lm: LM, heads: int | None) -> None:
        self.name, self.tokenizer, self._lm = "elsewhere", lm.tokenizer, lm
        self.layout = Sizes(LAYERS, WIDTH, 128, heads)
        self.runs = 0

    @property
    def identity(self) -> ModelId:
        return self._lm.identity

    @property
    def runs_in(self) -> dict[str, str]:
        return self._lm.runs_in

    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        self._lm.check(steering, transfer=transfer)

    def check_sites(self, sites: Sequence[Site]) -> None:
        self._lm.check_sites(sites)

    def admit(self, requests: Sequence[Request], decoding: Decoding) -> Decoding:
        return self._lm.admit(requests, decoding)

    def run(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Generation]]:
        self.runs += 1
        return self._lm.run(requests, decoding)

    def _read(
        self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], tokens: int, steering: Steering | None
    ) -> Iterator[Batch]:
        self.runs += 1
        return self._lm._read(groups, sites, tokens, steering)

    def _next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int, progress: Any
    ) -> list[NextToken]:
        self.runs += 1
        return self._lm._next_logprobs(choices, steerings, batch_size, progress)

    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        self.runs += 1
        return self._lm.answer_nlls(texts)

    def _answer_logits(self, texts: Sequence[AnsweredPrompt], steerings: Sequence[Steering | None]) -> list[Tensor]:
        self.runs += 1
        return self._lm._answer_logits(texts, steerings)


@pytest.fixture(scope="module")
def alone() -> LM:
    return tiny.tiny("llama")


def learned(name: str, lm: LanguageModel) -> Any:
    arguments, options = ARGUMENTS[name]
    return getattr(trimtab, name)(lm, *arguments, **options)


def test_no_function_is_left_out() -> None:
    assert set(ARGUMENTS) == {name for name in trimtab.__all__ if name.startswith("learn_")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_learns_the_same_or_is_refused_before_anything_runs(name: str, alone: LM) -> None:
    lm = Elsewhere(alone, heads=4)
    if name.removeprefix("learn_") not in REFUSED:
        assert same(learned(name, lm), learned(name, alone))
        return
    with pytest.raises(
        UnsupportedError, match=r"the elsewhere engine doesn't support learning .*; the transformers engine can"
    ):
        learned(name, lm)
    assert lm.runs == 0


@pytest.mark.parametrize("name", sorted(HEADS))
def test_heads_of_an_unknown_number_are_refused_before_anything_runs(name: str, alone: LM) -> None:
    lm = Elsewhere(alone, heads=None)
    with pytest.raises(UnsupportedError, match=r"number of attention heads .* isn't known.*steer the residual stream"):
        learned(f"learn_{name}", lm)
    assert lm.runs == 0


def same(left: Any, right: Any) -> bool:
    """Whether two results of learning are equal; of `learn_many`, their mean differences."""
    if not isinstance(left, dict):
        return bool(left == right)
    layers = [(name, layer) for name, moments in left.items() for layer in moments]
    return layers == [(name, layer) for name, moments in right.items() for layer in moments] and all(
        torch.equal(left[name][layer].difference, right[name][layer].difference) for name, layer in layers
    )
