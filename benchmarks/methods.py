"""Every method of the registry against unsteered generation: time per token, and peak memory.

Each is learned from a handful of short texts, with its own defaults: the cost of a steering doesn't depend on its
quality. Gates are forced open (or shut) whatever they read, so that both are measured; reading costs the same.

Targets, relative to the unsteered throughput: 0.98 for the residual stream and the outputs of attention and MLPs, 0.95
for heads, neurons and attention scores, 0.98 for gates. A gate on the prompt needs an extra forward pass over it,
however long the answer is: with few new tokens this weighs more.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.memory import forget_peak, own_peak, peak_of
from benchmarks.static import MEMORY, PROMPTS
from trimtab.data import instruction_pairs, queries
from trimtab.engines.contract import query_heads
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import load_steering, save_steering
from trimtab.lm import LM
from trimtab.methods.instaboost import BIAS as BOOST
from trimtab.methods.pasta import ALPHA as PASTA_ALPHA
from trimtab.methods.recipe import Recipe, recipes
from trimtab.steering import Always, BiasScores, Gate, Positions, ScaleScores, Steering, TargetMass, Threshold, emphasis
from trimtab.text.pairs import Pair

RESIDUAL, INSIDE, GATED = Target(0.98), Target(0.95), Target(0.98)
TARGETS = {"residual": RESIDUAL, "heads, neurons": INSIDE, "scores": INSIDE, "gate": GATED}
QUERIES = 12
TOGETHER = 3
"""The number of steered runs that share one unsteered run, adjacent in time."""
MEMORY_TOKENS = 8
"""The peak occurs in the prompt, and a few tokens show whether it grows."""
FAR = 1e30
STEPS = 3
"""Steps of gradient descent; the cost of a steering doesn't depend on how long it was learned."""
HEADS = 48
"""The number of heads that ITI steers in the paper; a small model may have fewer."""
FROM_A_PROMPT: Mapping[str, Mapping[str, Any]] = {
    "distill": {
        "instruction": "Answer in all lowercase letters.",
        "queries": queries("learn")[:QUERIES],
        "check": lambda *_: True,
        "tokens": 4,
        "steps": STEPS,
    }
}
"""Methods that learn from a prompt alone; the answers don't matter here."""
GATES, SCORES = "gate", "scores"
"""Names in `only` for the cases about gates and about attention to a span, which aren't methods of the registry."""
SPAN = (5, 10)

ASKED = queries("learn")[:QUERIES]
OTHERS = queries("tune")[:QUERIES]
INSTRUCTION = ("Answer in all lowercase letters.", "Use no capital letters in your answer.")
ENDS = ("Gladly, here is what you asked for.", "No, and please don't ask me again.")
GENERATED = Positions.from_last_prompt_token()
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sadi": {
        "heads at generated tokens": {"positions": GENERATED},
        "neurons at generated tokens": {"site": "neurons", "positions": GENERATED},
    },
    "hpr": {"a fixed angle": {"turn": "fixed"}},
    "sttp": {"a mirror": {"move": "mirror"}},
}
"""Other forms whose costs differ from the default."""


@dataclass(frozen=True)
class Case:
    """A steering to measure; `method` is its recipe's name, `GATES` or `SCORES`."""

    method: str
    name: str
    steering: Steering

    @property
    def kind(self) -> str:
        """The key of its target."""
        if any(edit.gate != Always() for edit in self.steering.edits):
            return "gate"
        if any(edit.site.kind == "scores" for edit in self.steering.edits):
            return "scores"
        inside = any(edit.site.kind in ("heads", "neurons") for edit in self.steering.edits)
        return "heads, neurons" if inside else "residual"

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


def run(batches: Sequence[int], rounds: int, tokens: int, only: Sequence[str], memory: bool) -> Report:
    """All cases, or those of the methods in `only`, for each batch size; with 0 rounds, only their memory."""
    known = [*recipes(), GATES, SCORES]
    if unknown := [name for name in only if name not in known]:
        raise TrimtabError(f"there is no method {unknown[0]!r} to measure; there are {', '.join(known)}")
    lm = LM.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with so few pairs, warnings are expected
        cases = cases_of(lm, only)
        results = [result for batch in batches if rounds for result in speed(lm, cases, batch, rounds, tokens)]
    if memory:
        results += [result for batch in batches for result in memories(cases, batch)]
    return Report("methods", machine(), versions(), tuple(results))


def peak(file: Path | None, batch: int, tokens: int) -> float:
    """The peak memory in MiB of generating under the steering in a file, or without one."""
    lm = LM.load()
    steering = None if file is None else load_steering(file)
    lm.generate("Hello", max_new_tokens=2)
    forget_peak()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _generate(lm, batch, steering, tokens)
    return own_peak()


# ---- cases -------------------------------------------------------------------------------------------------


OF_MIXTURES = ("steermoe",)
"""Methods for mixtures of experts, which neither of the models here is: left out unless requested by name."""


def cases_of(lm: LM, only: Sequence[str] = ()) -> list[Case]:
    """Each method in its default form and its variants; gates on the prompt and at each token; attention to a span."""
    cases = []
    for name, recipe in recipes().items():
        if name not in only if only else name in OF_MIXTURES:
            continue
        for variant, options in {"": {}, **VARIANTS.get(name, {})}.items():
            steering = opened(_learned(lm, recipe, options))
            cases.append(Case(name, f"{name}, {variant}" if variant else name, steering))
    if not only or GATES in only:
        caa = _learned(lm, recipes()["caa"], {})
        (edit,) = caa.edits
        direction = edit.operation.direction
        prompt = Threshold(edit.site, direction, 0.0)
        token = Threshold(edit.site, direction, float(direction.norm()), each_token=True)
        cases += [
            Case(GATES, "one addition, gate open", opened(caa.when(prompt))),
            Case(GATES, "one addition, gate shut", opened(caa.when(prompt), to=False)),
            Case(GATES, "one addition, a gate at each token", caa.when(token)),
        ]
    if not only or SCORES in only:
        layers = range(lm.layout.layers)
        operations = {
            "scaled keys": ScaleScores(),
            "PASTA": BiasScores(math.log(PASTA_ALPHA), outside=True),
            "SpotLight": TargetMass(),
            "InstABoost": BiasScores(BOOST),
        }
        cases += [Case(SCORES, name, emphasis(operation, [SPAN], layers)) for name, operation in operations.items()]
    return cases


def opened(steering: Steering, to: bool = True) -> Steering:
    """The steering with gates that read the same as before, but are always open (or always shut)."""
    return replace(steering, edits=tuple(replace(edit, gate=_forced(edit.gate, to)) for edit in steering.edits))


def _forced(gate: Gate, to: bool) -> Gate:
    if gate == Always():
        return gate
    direction = next(iter(_thresholds(gate))).direction
    line = -FAR if to else FAR
    if not gate.readings:
        return Threshold(min(gate.token_sites), direction, line, each_token=True)
    reading = min(gate.readings, key=str)
    return Threshold(reading.site, direction, line, positions=reading.positions, pool=reading.pool)


def _thresholds(gate: Gate) -> list[Threshold]:
    if isinstance(gate, Threshold):
        return [gate]
    inner = getattr(gate, "gates", None) or (gate.gate,)  # type: ignore[attr-defined]
    return [threshold for part in inner for threshold in _thresholds(part)]


def _learned(lm: LM, recipe: Recipe, options: Mapping[str, Any]) -> Steering:
    data: dict[str, list[Any]] = {"pairs": [_pairs(recipe)], "texts": [ASKED], "nothing": []}
    needed = {name: value for name, value in _needed(lm).items() if name in {option.name for option in recipe.options}}
    needed |= FROM_A_PROMPT.get(recipe.name, {})
    learned: Steering = recipe.load()(lm, *data[recipe.takes], None, **needed, **options)
    return learned


def _needed(lm: LM) -> Mapping[str, Any]:
    """Required arguments of methods, besides their pairs or texts, by name."""
    texts = {"positive": ASKED[0], "negative": ASKED[1], "when": ASKED, "unless": OTHERS, "harmless": OTHERS}
    return {**texts, "heads": min(HEADS, lm.layout.layers * query_heads(lm.layout)), "steps": STEPS}


def _pairs(recipe: Recipe) -> list[Pair]:
    if "answers" in recipe.shapes:
        return [Pair(*ENDS, query, "answers") for query in ASKED]
    return list(instruction_pairs(ASKED, INSTRUCTION))


# ---- measuring ---------------------------------------------------------------------------------------------


def speed(lm: LM, cases: Sequence[Case], batch: int, rounds: int, tokens: int) -> list[Result]:
    """Time per token of the whole batch in milliseconds, and the throughput relative to the adjacent unsteered run."""
    runs: dict[str, Callable[[], float]] = {}
    beside = {}
    for number, case in enumerate(cases):
        plain = f"unsteered {number // TOGETHER}"
        runs.setdefault(plain, _timed(lm, batch, None, tokens))
        runs[case.name] = _timed(lm, batch, case.steering, tokens)
        beside[case.name] = plain
    for case in cases:  # instead of a full warm-up round
        _generate(lm, batch, case.steering, 2)
    values = interleave(runs, rounds, warm_ups=0)
    plain_values = [value for name in dict.fromkeys(beside.values()) for value in values[name]]
    results = [summarized(f"unsteered, batch {batch}", "time a token", "ms", plain_values)]
    for case in cases:
        where = f"{case}, batch {batch}"
        mine, theirs = values[case.name], values[beside[case.name]]
        results.append(summarized(where, "time a token", "ms", mine))
        results.append(summarized(where, "throughput / unsteered", "ratio", ratios(theirs, mine), TARGETS[case.kind]))
    return results


def memories(cases: Sequence[Case], batch: int) -> list[Result]:
    """The peak memory of each case, in its own process, against that of unsteered generation."""
    common = ("methods", "--batch", str(batch), "--tokens", str(MEMORY_TOKENS))
    plain = peak_of(*common)
    results = [Result(f"unsteered, batch {batch}", "peak memory", plain, "MiB")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steering.safetensors"
        for case in cases:
            save_steering(case.steering, file)
            ours = peak_of(*common, "--file", str(file))
            metric = "peak memory / unsteered"
            results.append(Result(f"{case}, batch {batch}", metric, ours / plain, "ratio", target=MEMORY))
    return results


def _timed(lm: LM, batch: int, steering: Steering | None, tokens: int) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        _generate(lm, batch, steering, tokens)
        return 1000 * (time.perf_counter() - start) / tokens

    return run


def _generate(lm: LM, batch: int, steering: Steering | None, tokens: int) -> Any:
    return lm.generate(PROMPTS[:batch], steering, max_new_tokens=tokens, min_new_tokens=tokens)
