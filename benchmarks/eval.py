"""A/B evaluation of 5 strengths × 3 layers: one batched sweep against one setting and one item at a time.

The latter is how the papers' scripts do it: their own hook, and a full forward pass on each item, batch 1, for each
setting in turn. Target: the sweep scores at least 5 times as many items per second, with the same scores.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from trimtab.evaluate.ab import ABItem, ab_requests, read_ab, score_ab
from trimtab.lm import LM
from trimtab.methods.caa import PairsWarning, learn_caa
from trimtab.steering import Steering
from trimtab.text.letters import letter_question
from trimtab.text.pairs import read_pairs

DATASET = Path("caa") / "refusal"
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
DEPTHS = (0.3, 0.4, 0.5)
PAIRS = 32
BATCH = 64
SPEED = Target(5)
AGREEMENT = Target(1e-4, at_least=False)

Scores = dict[tuple[int, float, str], float]


def run(data: Path, items: int, rounds: int, model: str | None = None) -> Report:
    """Both on the same questions, steered by the same vectors, in interleaved rounds."""
    lm = LM.load(model)
    chosen, _ = read_ab(data / DATASET / "test_dataset_ab.json", exclude=True, limit=items)
    pairs = read_pairs(data / DATASET / "generate_dataset.json")[:PAIRS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PairsWarning)  # enough pairs to measure speed
        vector = learn_caa(lm, pairs, sorted({round(depth * lm.layout.layers) for depth in DEPTHS}))
    scores: dict[str, Scores] = {}

    def timed(name: str, work: Callable[[LM, Steering, Sequence[ABItem]], Scores]) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            scores[name] = work(lm, vector, chosen)
            return len(scores[name]) / (time.perf_counter() - start)

        return once

    values = interleave({"one at a time": timed("slow", one_at_a_time), "sweep": timed("fast", sweep)}, rounds)
    apart = max(abs(scores["slow"][key] - scores["fast"][key]) for key in scores["slow"])
    case = f"{len(STRENGTHS)} strengths x {len(vector.layers)} layers, {len(chosen)} items"
    results = (
        summarized(case, "one at a time", "items/s", values["one at a time"]),
        summarized(case, "sweep", "items/s", values["sweep"]),
        summarized(case, "sweep / one at a time", "ratio", ratios(values["sweep"], values["one at a time"]), SPEED),
        Result(case, "largest difference of a score", apart, "", target=AGREEMENT),
    )
    return Report("eval", machine(), {**versions(), "model": lm.name}, results)


def sweep(lm: LM, vector: Steering, items: Sequence[ABItem]) -> Scores:
    """All settings of all items as rows of the same batches."""
    settings = {f"{layer} {s:g}": (layer, s) for layer, s in product(vector.layers, STRENGTHS)}
    arms = {name: s * vector.only([layer]) for name, (layer, s) in settings.items()}
    records = score_ab(lm, ab_requests(lm, items, arms), items, batch_size=BATCH)
    return {(*settings[record.arm], record.item): record.scores["matching"] for record in records}


@torch.no_grad()
def one_at_a_time(lm: LM, vector: Steering, items: Sequence[ABItem]) -> Scores:
    """A forward pass over the whole text of each item, for each setting."""
    scores = {}
    for edit in vector.edits:
        for strength, item in product(STRENGTHS, items):
            question = letter_question(lm.tokenizer, item.question, (item.matching, item.other))
            push, start = strength * edit.operation.direction, len(question.prompt) - 1
            handle = lm.layout.blocks[edit.site.layer].register_forward_hook(_adding(push, start))
            try:
                logits = lm.model(input_ids=torch.tensor([question.ids], device=lm.model.device)).logits[0, -1]
            finally:
                handle.remove()
            probabilities = logits.float().softmax(-1)
            matching, other = (float(probabilities[question.letters[letter]]) for letter in (item.matching, item.other))
            scores[edit.site.layer, strength, item.item] = matching / (matching + other)
    return scores


def _adding(push: Tensor, start: int) -> Callable[..., Any]:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden[:, start:] += push.to(hidden)
        return output

    return hook
