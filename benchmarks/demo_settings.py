"""The demo's blocks and strengths: `tune`'s choices for each of its instructions on the default model.

They are learned from the package's `learn` queries, and searched and confirmed on its `tune` queries; the demo answers
the `test` ones. An answer counts if it has the form, isn't repetitive and stays on its query's topic.
"""

from __future__ import annotations

import time

from benchmarks.choosing import say
from benchmarks.harness import BOOTSTRAP, Report, Result
from benchmarks.machine import machine, versions
from trimtab.commands.demo import MAX_NEW_TOKENS, SETTINGS
from trimtab.data import instruction_pairs, instructions, prompts, queries
from trimtab.evaluate import CONSTRAINTS, on_topic, repeated_share
from trimtab.lm import LM
from trimtab.methods.instruct import learn_instruct
from trimtab.text.repetition import REPEATED_LIMIT
from trimtab.tune.candidates import grid
from trimtab.tune.tune import tune

LAYERS = range(9, 25, 3)
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)


def run(limit: int | None) -> Report:
    """Search each of the demo's instructions; `limit` takes fewer queries."""
    lm = LM.load(dtype="float32")
    results = []
    for setting in SETTINGS:
        questions = queries("tune", more=True)[:limit]
        instruction = instructions()[setting.name]
        pairs = instruction_pairs(queries("learn"), instruction.learn)
        check = CONSTRAINTS[setting.name]

        def score(i: int, answer: str, cut: bool, check=check, questions=questions) -> float:  # type: ignore[no-untyped-def]
            fluent = repeated_share(answer) <= REPEATED_LIMIT
            return float(check(answer, cut=cut) and fluent and on_topic(questions[i], answer))

        started = time.perf_counter()
        tuned = tune(
            lm,
            grid({"add": learn_instruct(lm, pairs, layers=list(LAYERS), operation="add")}, STRENGTHS),
            prompts(questions, instruction.test),
            score,
            max_new_tokens=MAX_NEW_TOKENS,
            progress=say(setting.name),
        )
        print(f"{setting.name}: {tuned.setting}: {tuned.reason}", flush=True)
        case = f"{setting.shown} ({tuned.setting or 'not steered'})"
        if tuned.held_out is not None:
            results.append(Result(case, "held out, unsteered", tuned.held_out.unsteered, ""))
            gain = tuned.held_out.difference
            results.append(Result(case, "held out, gain", gain.estimate, "", gain.low, gain.high))
        results.append(Result(case, "search", time.perf_counter() - started, "s"))
    return Report("demo-settings", machine(), versions(), tuple(results), spread=BOOTSTRAP)
