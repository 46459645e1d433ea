"""Steerings that `make` makes from the trait cards: their share of the system prompt's effect, without the prompt.

Measured by log-probabilities of the model's own held-out answers for and against the trait, without a judge, and
compared with random directions of the same norm; the costs of the steering are measured too. Intermediate results are
stored in a folder, so that a run can be resumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import BOOTSTRAP, Report, Result, Target
from benchmarks.machine import machine, versions
from trimtab.data import traits
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import save_steering
from trimtab.lm import LM
from trimtab.making import make
from trimtab.making.idea import idea_from_trait

COUNT = 20
REACHED = 0.7
GOAL = Target(12 / 20)
MINUTES = Target(10, at_least=False)


@dataclass(frozen=True)
class Row:
    """The result for one trait: the verdict as in a card, the chosen candidate, and the time it took.

    `cpu_minutes` counts all threads, so that other programs on the machine hardly change it.
    """

    trait: str
    verdict: dict[str, Any]
    chosen: str
    minutes: float
    cpu_minutes: float


def run(model: str | None, names: Sequence[str] | None, folder: Path, dtype: str, seed: int) -> Report:
    """Make each trait that isn't in the folder yet, and report all of them."""
    lm = LM.load(model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(names) if names else sorted(traits())[:: max(1, len(traits()) // COUNT)][:COUNT]
    rows = [_row(lm, name, folder, seed) for name in chosen]
    results: list[Result] = []
    for row in rows:
        case, verdict = row.trait, row.verdict
        low, high = verdict.get("interval", (float("nan"),) * 2)
        results.append(Result(case, "share of the prompt's effect", verdict.get("share_of_prompt", 0.0), "", low, high))
        results.append(Result(case, "best random direction", max(verdict.get("random", [0.0])), ""))
        results.append(Result(case, "answers in circles", verdict.get("loops", 0.0), ""))
        results.append(Result(case, "perplexity, of the prompt's", verdict.get("perplexity_ratio", 0.0), ""))
        if signs := verdict.get("signs"):
            for arm, share in zip(("unsteered", "prompted", "steered"), signs, strict=True):
                results.append(Result(case, f"answers with its words, {arm}", share, ""))
        results.append(Result(case, "making", row.minutes, "min", target=MINUTES))
        results.append(Result(case, "making, on the processor", row.cpu_minutes, "min"))
    holds = [bool(row.verdict.get("holds")) for row in rows]
    reached = [h and row.verdict["share_of_prompt"] >= REACHED for h, row in zip(holds, rows, strict=True)]
    results.append(Result("all", "traits that hold", sum(holds) / len(rows), ""))
    results.append(
        Result("all", f"traits at {REACHED:.0%} of the prompt or more", sum(reached) / len(rows), "", target=GOAL)
    )
    return Report(
        "traits", machine(), {**versions(), "model": lm.name, "dtype": dtype}, tuple(results), spread=BOOTSTRAP
    )


def _row(lm: LM, name: str, folder: Path, seed: int) -> Row:
    path = folder / f"{name}-{seed}.json"
    if path.is_file():
        return Row(**json.loads(path.read_text()))
    started, spent = time.perf_counter(), time.process_time()

    def minutes() -> tuple[float, float]:
        return (time.perf_counter() - started) / 60, (time.process_time() - spent) / 60

    try:
        made = make(lm, idea_from_trait(traits()[name]), seed=seed)
    except TrimtabError as error:
        row = Row(name, {"holds": False, "why_not": str(error)}, "", *minutes())
    else:
        row = Row(name, made.verdict.as_measured(), made.name, *minutes())
        save_steering(made.steering, folder / f"{name}-{seed}.safetensors")
        examples = [
            [example.question, example.unsteered, example.prompted, example.steered] for example in made.examples
        ]
        (folder / f"{name}-{seed}-answers.json").write_text(json.dumps(examples, indent=1))
        tried = [[candidate.name, candidate.lead, candidate.likelihood] for candidate in made.candidates]
        (folder / f"{name}-{seed}-candidates.json").write_text(json.dumps(tried, indent=1))
    print(f"{name}: {row.verdict} ({row.chosen}, {row.minutes:.1f} min)", flush=True)
    path.write_text(json.dumps(row.__dict__))
    return row
