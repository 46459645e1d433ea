"""llama.cpp against transformers: whether the texts are the same, and the cost of steering there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.dequantized import dequantized
from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.static import DOSE
from trimtab.engines.transformers import default_model
from trimtab.lm import LM
from trimtab.steering import Add, Edit, Positions, Site, Steering

PROMPTS = tuple(
    f"{ask} {what}"
    for ask in ("Tell me about", "What is the use of")
    for what in ("rain", "bread", "music", "trees", "clocks", "rivers", "glass", "horses", "salt", "paper")
)
COMPARED = 32  # new tokens
THROUGHPUT = Target(0.97)
AGREEMENT = Target(0.9)


def run(rounds: int, tokens: int) -> Report:
    """The share of equal texts with equal weights, and the throughput of the stored (4-bit) model, steered or not."""
    lm = LM.load(dtype="float32", device="cpu")
    steering = _steering(lm, (9, 18))
    results = [*_agreement(lm, steering), *_speed(lm, rounds, tokens)]
    return Report("llamacpp", machine(), {**versions(), "xllamacpp": version("xllamacpp")}, tuple(results))


def _steering(lm: LM, layers: Any, dose: float = 1 / 3) -> Steering:
    """Random directions, each `dose` of the activation's norm, from the last prompt token on."""
    sites = [Site(layer) for layer in layers]
    (captured,) = lm.capture(PROMPTS[0], sites)
    edits = []
    for site in sites:
        vector = torch.randn(lm.layout.width, generator=torch.Generator().manual_seed(site.layer))
        edits.append(Edit(site, Add(vector * float(dose * captured[site].norm() / vector.norm()))))
    return Steering(tuple(edits))


def _agreement(lm: LM, steering: Steering) -> list[Result]:
    case = f"the same weights in float32, {len(PROMPTS)} prompts, {COMPARED} new tokens"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        file = dequantized(default_model.default_gguf(), Path(folder) / "f32.gguf")
        llama: Any = LM.load(file, engine="llamacpp", cache="float32")
        for name, steered in (("unsteered", None), ("steered", steering)):
            ours = llama.generate(PROMPTS, steered, max_new_tokens=COMPARED)
            theirs = lm.generate(PROMPTS, steered, max_new_tokens=COMPARED)
            same = sum(a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True))
            results.append(Result(case, f"equal greedy texts, {name}", same / len(PROMPTS), "share", target=AGREEMENT))
        everywhere = steering.at(Positions.all())
        layers = [*everywhere.layers, lm.layout.layers - 1]
        with lm.steered(everywhere):
            expected = lm.capture(PROMPTS[:5], layers, Positions.all())
        captured = llama.capture(PROMPTS[:5], layers, Positions.all(), steering=everywhere)
        llama.close()
    off = [
        float(((a[site] - b[site]).norm(dim=-1) / b[site].norm(dim=-1)).max())
        for a, b in zip(captured, expected, strict=True)
        for site in map(Site, layers)
    ]
    metric = "largest relative difference of an activation, steered"
    return [*results, Result(case, metric, max(off), "ratio", target=Target(1e-3, at_least=False))]


def _speed(lm: LM, rounds: int, tokens: int) -> list[Result]:
    llama: Any = LM.load(engine="llamacpp")
    every = range(1, lm.layout.layers)
    runs = {
        "transformers, unsteered": _timed(lambda: lm.generate(PROMPTS[0], max_new_tokens=tokens)),
        "unsteered": _timed(lambda: llama.generate(PROMPTS[0], max_new_tokens=tokens)),
    }
    for name, steering in {
        "one block": _steering(lm, (12,), DOSE),
        "every block": _steering(lm, every, DOSE / len(every)),
    }.items():
        runs[name] = _timed(partial(llama.generate, PROMPTS[0], steering, max_new_tokens=tokens))
    values = interleave(runs, rounds)
    case = "as it is stored (Q4_1), one prompt at a time"
    results = [summarized(case, name, "tokens/s", values[name]) for name in runs]
    for name in ("one block", "every block"):
        relative = ratios(values[name], values["unsteered"])
        results.append(summarized(case, f"{name} / unsteered", "ratio", relative, THROUGHPUT))
    relative = ratios(values["unsteered"], values["transformers, unsteered"])
    return [*results, summarized(case, "unsteered / transformers in float32", "ratio", relative)]


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        return sum(len(answer.token_ids) for answer in work()) / (time.perf_counter() - start)

    return run
