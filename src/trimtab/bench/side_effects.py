"""Side effects of a steering: on knowledge, harmless requests, other behaviours, plain text."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.bench.behaviours import SYSTEM, test_items
from trimtab.bench.measures import letters_of, likelihoods, measure_letters
from trimtab.bench.tasks import BATCH
from trimtab.data import queries
from trimtab.engines.doses import DoseWarning
from trimtab.evaluate.ab import ABItem, read_ab
from trimtab.evaluate.divergence import reference
from trimtab.evaluate.lora import original_weights
from trimtab.evaluate.refusal import read_refusal, refuses

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering

TOKENS = 24
TEXTS = 8


@dataclass(frozen=True)
class SideEffect:
    """One side effect: its name, what is measured, and a function that returns each item's value under a steering."""

    name: str
    about: str
    measure: Callable[[LM, Steering | None], list[float]]


def side_effects(data: Path | None, count: int) -> Mapping[str, SideEffect]:
    """The side effects that can be measured with the data folder, on about `count` items each."""
    listed = [SideEffect("text", "log-probability of the unsteered model's own answers, nats per token", _text())]
    if data is not None and (path := data / "mmlu" / "mmlu.json").is_file():
        listed.append(SideEffect("MMLU", "the correct letter's share of two", _letters(path, count)))
    if data is not None and (path := data / "xstest" / "xstest_prompts.csv").is_file():
        listed.append(SideEffect("over-refusal", "harmless requests of XSTest that are refused", _refused(path, count)))
    for name in SYSTEM:
        if data is not None and (folder := data / "caa" / name).is_dir():
            listed.append(
                SideEffect(name, "the matching letter's share, both orders", _behaviour(folder, max(1, count // 2)))
            )
    return {side.name: side for side in listed}


def _text() -> Callable[[LM, Steering | None], list[float]]:
    def measure(lm: LM, steering: Steering | None) -> list[float]:
        with original_weights(lm):
            base = reference(lm, list(queries("test")[:TEXTS]), tokens=TOKENS)
        return likelihoods(lm, base.texts, [steering] * len(base.texts))

    return measure


def _letters(path: Path, count: int) -> Callable[[LM, Steering | None], list[float]]:
    items = read_ab(path, limit=count)[0]
    return lambda lm, steering: _scores(lm, items, steering)


def _behaviour(folder: Path, count: int) -> Callable[[LM, Steering | None], list[float]]:
    items = test_items(folder, count)

    def measure(lm: LM, steering: Steering | None) -> list[float]:
        scores = _scores(lm, items, steering)
        return [(a + b) / 2 for a, b in zip(scores[::2], scores[1::2], strict=True)]

    return measure


def _scores(lm: LM, items: Sequence[ABItem], steering: Steering | None) -> list[float]:
    (result,) = measure_letters(lm, [letters_of(lm, item) for item in items], [[steering] * len(items)])
    return list(result.scores)


def _refused(path: Path, count: int) -> Callable[[LM, Steering | None], list[float]]:
    items = [item for item in read_refusal(path, count) if not item.harmful]

    def measure(lm: LM, steering: Steering | None) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoseWarning)
            answers = lm.generate([item.prompt for item in items], steering, max_new_tokens=TOKENS, batch_size=BATCH)
        return [float(refuses(answer.text)) for answer in answers]

    return measure
