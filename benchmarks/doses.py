"""At which dose does text break? Learned and trained vectors, over few and many layers, at increasing strengths.

As in `tune`'s guard, text counts as broken without a judge: under the unsteered model the answers are far less likely
than unsteered ones, or far more, or they are repetitive. Three ways to combine the doses of several layers are compared
by how well they separate broken text from intact text.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

from benchmarks.choosing import say
from benchmarks.harness import Report, Result
from benchmarks.machine import machine, versions
from trimtab.data import instruction_pairs, instructions, prompts, queries
from trimtab.data.distilled import path_of
from trimtab.engines.transformers.generate import Generation
from trimtab.evaluate.fluency import Fluency, fluencies
from trimtab.lm import LM, DoseWarning
from trimtab.methods.caa import PairsWarning, learn_caa
from trimtab.methods.instruct import learn_instruct
from trimtab.report.pushes import pushes
from trimtab.steering import Steering
from trimtab.text.pairs import read_pairs
from trimtab.tune.guard import Guard, median_perplexity

CAA = Path("caa") / "refusal" / "generate_dataset.json"
SPREADS = (1, 3, 6, 30)
"""The numbers of layers, around the middle."""

ROOTS = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Strengths for learned differences: the root of the summed squares of the expected doses."""

FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0)
"""Strengths for trained steerings."""

PAIRS = 16
GUARD = Guard(empty=None, cut=None)  # with so few tokens, all answers are cut
ADDED: dict[str, Callable[[Sequence[float]], float]] = {
    "largest": max,
    "root of squares": lambda doses: math.sqrt(sum(dose * dose for dose in doses)),
    "sum": sum,
}
"""Ways to combine the doses at several layers into one number."""


@dataclass(frozen=True)
class Arm:
    """A steering, and the prompts that perplexities are conditioned on: with the steering's instruction, if any."""

    name: str
    trained: bool
    layers: int
    steering: Steering
    contexts: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """The result of an arm: its doses by layer, the limits that its answers exceed, and their fluency."""

    arm: Arm
    doses: tuple[float, ...]
    broken: tuple[str, ...]
    perplexity: float
    repeated: float


def run(data: Path, count: int, tokens: int, spreads: Sequence[int] = SPREADS, only: str = "") -> Report:
    """Every arm whose name contains `only` on `count` queries, with `tokens` per answer."""
    lm = LM.load(dtype="float32")
    questions = list(queries("test")[:count])
    arms = [arm for arm in arms_of(lm, data, questions, spreads) if only.lower() in arm.name.lower()]
    cells = measure(lm, arms, questions, tokens)
    return Report("doses", machine(), {**versions(), "model": lm.name}, tuple(results_of(cells)))


def arms_of(lm: LM, data: Path, questions: Sequence[str], spreads: Sequence[int]) -> list[Arm]:
    """Learned differences over a few layers, and the packaged steerings."""
    kinds = instructions()
    prompted = {name: prompts(questions, kinds[name].learn[:1]) for name in ("json", "bullets")}
    every = range(lm.layout.layers)
    json = learn_instruct(lm, instruction_pairs(queries("learn")[:PAIRS], kinds["json"].learn), every, operation="add")
    learned: list[tuple[str, Steering, Sequence[str]]] = [("instruct, JSON", json, prompted["json"])]
    if (data / CAA).is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PairsWarning)
            learned.append(("caa, refusal", learn_caa(lm, read_pairs(data / CAA)[:PAIRS], every), questions))
    else:
        print(f"there is no {data / CAA}; leaving out CAA's vectors")
    arms = []
    for name, steering, contexts in learned:
        for layers in spreads:
            some = steering.only(middle(layers, lm.layout.layers))
            expected = math.sqrt(sum((push.share or 0.0) ** 2 for push in pushes(some)))
            arms += [Arm(name, False, layers, (root / expected) * some, contexts) for root in ROOTS]
    for name in prompted:
        distilled = Steering.load(path_of(name))
        arms += [Arm(f"distill, {name}", True, len(distilled.layers), k * distilled, prompted[name]) for k in FACTORS]
    return arms


def middle(count: int, of: int) -> list[int]:
    """`count` consecutive layers, around the middle of `of`."""
    first = (of - min(count, of)) // 2
    return list(range(first, first + min(count, of)))


def measure(lm: LM, arms: Sequence[Arm], questions: Sequence[str], tokens: int) -> list[Cell]:
    """All arms and the unsteered one, in shared batches."""
    steerings = [None, *(arm.steering for arm in arms)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        answers = lm.generate(
            [prompt for _ in steerings for prompt in questions],
            [steering for steering in steerings for _ in questions],
            max_new_tokens=tokens,
            batch_size=64,
            progress=say("answers"),
        )
    plain, *steered = [answers[i * len(questions) : (i + 1) * len(questions)] for i in range(len(steerings))]
    contexts = [*dict.fromkeys(tuple(arm.contexts) for arm in arms)]
    texts = [(after, plain) for after in contexts] + [
        (arm.contexts, steered_answers) for arm, steered_answers in zip(arms, steered, strict=True)
    ]
    read = fluencies(
        lm,
        [context for after, _ in texts for context in after],
        [answer for _, steered_answers in texts for answer in steered_answers],
        progress=say("texts read"),
    )
    rows = [read[i * len(questions) : (i + 1) * len(questions)] for i in range(len(texts))]
    unsteered = dict(zip(contexts, rows, strict=False))
    return [
        _cell(arm, steered_answers, mine, unsteered[tuple(arm.contexts)])
        for arm, steered_answers, mine in zip(arms, steered, rows[len(contexts) :], strict=True)
    ]


def _cell(arm: Arm, answers: Sequence[Generation], read: Sequence[Fluency], plain: Sequence[Fluency]) -> Cell:
    layers = [[dose.ratio for dose in answer.applied.doses] for answer in answers]
    here, there = median_perplexity(read) or math.inf, median_perplexity(plain) or math.inf
    return Cell(
        arm,
        tuple(mean(column) for column in zip(*layers, strict=True)),
        GUARD.broken(read, plain),
        here / there,
        mean(fluency.repeated for fluency in read),
    )


def results_of(cells: Sequence[Cell]) -> list[Result]:
    """The numbers of each cell, and how well each way of combining doses predicts which cells break."""
    results = []
    for cell in cells:
        layers = f"{cell.arm.layers} layer{'s' * (cell.arm.layers != 1)}"
        case = f"{cell.arm.name}, {layers}, root of squares {ADDED['root of squares'](cell.doses):.2f}"
        verdict = "; ".join(reason.split(":")[0] for reason in cell.broken) or "whole"
        results += [
            Result(case, "sum of doses", sum(cell.doses), ""),
            Result(case, f"perplexity over unsteered ({verdict})", cell.perplexity, ""),
            Result(case, "repeated four-grams", cell.repeated, ""),
        ]
    for kind, trained in (("learned as differences", False), ("trained", True)):
        mine = [cell for cell in cells if cell.arm.trained == trained]
        for name, added in ADDED.items():
            points = [(added(cell.doses), bool(cell.broken)) for cell in mine]
            results.append(Result(f"{kind}, {len(mine)} cells", f"{name}: area under the curve", area(points), ""))
            threshold, errors = best(points)
            results.append(
                Result(f"{kind}, {len(mine)} cells", f"{name}: best threshold ({errors} wrong)", threshold, "")
            )
    return results


def area(points: Sequence[tuple[float, bool]]) -> float:
    """How often a broken cell has a larger dose than an intact one (AUC); ties count half. NaN for a single kind."""
    broken, whole = ([dose for dose, is_broken in points if is_broken == kind] for kind in (True, False))
    if not broken or not whole:
        return math.nan
    return mean((b > w) + 0.5 * (b == w) for b in broken for w in whole)


def best(points: Sequence[tuple[float, bool]]) -> tuple[float, int]:
    """The threshold that classifies the most cells correctly as broken (above) or intact, and its number of errors."""
    doses = sorted({dose for dose, _ in points})
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(doses)), math.inf]
    wrong = {edge: sum((dose > edge) != is_broken for dose, is_broken in points) for edge in edges}
    chosen = min(edges, key=lambda edge: wrong[edge])
    return chosen, wrong[chosen]
