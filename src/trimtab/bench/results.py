"""The results of a run: each method's best strength on each task, decided by one test, and a ranking of methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from trimtab.bench.learning import CONTROL
from trimtab.bench.store import HEAD, Store, canonical
from trimtab.bench.tasks import PLAIN, PROMPT, TWICE
from trimtab.errors import TrimtabError
from trimtab.evaluate.decision import BETTER, LEVEL, WORSE, Decision, decide, describe_decision, error_rate_text
from trimtab.evaluate.intervals import Interval, paired_bootstrap
from trimtab.files.atomic_write import write_atomically

RESULTS = "results.json"
LOOPS, EMPTY, UNLIKELY = 0.1, 0.05, 2.0
"""A text counts as broken if its repetition exceeds the unsteered answers' by more than the first, the share of empty
answers by more than the second, or if its median perplexity is more than the third times theirs.
"""
NO_BETTER = "no better than random"
"""Called better by `trimtab.evaluate.decision`, but not better than its control at the same strength."""
UNCONTROLLED = "better than unsteered; no control"
"""Called better by `trimtab.evaluate.decision`, with nothing random to compare it with at the same strength."""


@dataclass(frozen=True)
class Cell:
    """A method at one strength on one task.

    Args:
        nats: The divergence that was requested; `None` if the strength isn't set by nats.
        factor: The factor of the steering.
        reached: The divergence that it had.
        decision: Against the unsteered arm, corrected for the number of strengths.
        random: The p-value of being better than random directions at the same nats; `None` if they weren't run.
        orthogonal: The same for directions orthogonal to its own.
        span: The same for the method itself at a random span of each prompt instead of the phrase.
        beside: Other changes, steered minus unsteered, as means (for perplexities: the ratio of medians).
        sides: Side effects: the change, with its interval; empty if they weren't measured.
        broken: The limits that its text exceeds.
    """

    nats: float | None
    factor: float
    reached: float | None
    decision: Decision
    random: float | None
    orthogonal: float | None
    span: float | None
    beside: Mapping[str, float]
    sides: Mapping[str, Interval]
    broken: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The verdict of `trimtab.evaluate.decision`; instead of `BETTER`, `NO_BETTER` if a control does as well, and
        `UNCONTROLLED` without one.
        """
        if self.decision.verdict != BETTER:
            return self.decision.verdict
        controls = [p for p in (self.random, self.orthogonal, self.span) if p is not None]
        if not controls:
            return UNCONTROLLED
        return BETTER if all(p <= LEVEL for p in controls) else NO_BETTER

    @property
    def rank(self) -> tuple[int, float]:
        """Of the strengths of a row, the best one has the largest: first the verdict counts, then the gain."""
        verdicts = (UNCONTROLLED, BETTER)
        placed = 0 if self.broken or self.verdict not in verdicts else 1 + verdicts.index(self.verdict)
        return placed, self.decision.difference.estimate


@dataclass(frozen=True)
class Row:
    """A method on one task: all its strengths, the best one, and notes. `share` is relative to the prompt's effect."""

    method: str
    cells: tuple[Cell, ...]
    best: int
    share: float | None
    notes: tuple[str, ...]
    predictors: Mapping[str, float] | None

    @property
    def cell(self) -> Cell:
        """The best strength: one that is better without breaking the text, else the one with the largest gain."""
        return self.cells[self.best]


@dataclass(frozen=True)
class TaskResults:
    """One task: its arms without a steering (`prompted`), its rows, and the methods that can't act on it."""

    name: str
    about: str
    unit: str
    items: int
    unsteered: float
    prompted: Mapping[str, Decision]
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Standing:
    """A method over all tasks: the number of tasks that it acts on, and on which it is better, better without a control
    to compare it with, worse, or breaks the text; its place among the methods (1: always first, 0: always last); the
    median share of the prompt's effect.
    """

    method: str
    tasks: int
    better: int
    uncontrolled: int
    worse: int
    broken: int
    place: float
    share: float | None


@dataclass(frozen=True)
class Results:
    """A whole run.

    `agreement` is Spearman's rank correlation of the methods' places between two halves of the items, averaged over
    `SPLITS` random splits.
    """

    about: Mapping[str, Any]
    tasks: tuple[TaskResults, ...]
    methods: tuple[Standing, ...]
    agreement: float | None
    left_out: Mapping[str, str]

    def words(self) -> list[str]:
        """The verdict, as sentences."""
        rows = [(task, row) for task in self.tasks for row in task.rows if row.method != CONTROL]
        better = [(task, row) for task, row in rows if row.cell.verdict == BETTER]
        whole = [(task, row) for task, row in better if not row.cell.broken]
        with_answers = [row for _, row in better if "repeated" in row.cell.beside]
        sentences = []
        if not rows:
            return ["nothing was measured: no method could act on any of the tasks"]
        best = self.methods[0] if self.methods else None
        uncontrolled = [
            f"{row.method} on {task.name}" + (" (text broken)" if row.cell.broken else "")
            for task, row in rows
            if row.cell.verdict == UNCONTROLLED
        ]
        if not better and not uncontrolled:
            sentences.append(f"none of the {len(rows)} rows (a method on a task) can be told from luck")
        elif not better:
            sentences.append(f"none of the {len(rows)} rows (a method on a task) are better than a control")
        else:
            whole_text = sum(not row.cell.broken for row in with_answers)
            text = (
                f"answers were generated for {len(with_answers)} of these, and {whole_text} leave the text intact"
                if with_answers
                else "none of these generates answers, so nothing is known about the text"
            )
            sentences.append(
                f"{len(better)} of {len(rows)} rows (a method on a task) are better than the unsteered model and than"
                " their controls (random directions at the same divergence, or a random span of the prompt);"
                f" {text}"
            )
        if uncontrolled:
            sentences.append(f"better than the unsteered model, but there is no control: {', '.join(uncontrolled)}")
        if best is not None and best.better:
            ties = [standing.method for standing in self.methods if standing.better == best.better]
            sentences.append(f"better on most tasks ({best.better}): {', '.join(ties)}")
        beaten = [f"{row.method} on {task.name}" for task, row in whole if row.share is not None and row.share >= 1]
        with_prompt = [task for task in self.tasks if PROMPT in task.prompted]
        if with_prompt:
            what = ", ".join(beaten) if beaten else "none"
            count = f"{len(with_prompt)} task{'s' * (len(with_prompt) != 1)}"
            sentences.append(f"at least as much as the prompt itself, on the {count} with one: {what}")
            ineffective = [task.name for task in with_prompt if not task.prompted[PROMPT].better]
            if ineffective:
                sentences.append(f"the model doesn't do it when it is asked to, either, on: {', '.join(ineffective)}")
        sentences.append(
            f"{error_rate_text()}: of {len(rows)} rows that do nothing, up to {max(1, round(LEVEL * len(rows)))} would"
            " be called better"
        )
        if len(code := self.about.get("code", ())) > 1:
            sentences.append(f"its parts were computed by different code (digests {', '.join(code)})")
        if self.agreement is not None:
            sentences.append(
                f"the methods' ranks on two halves of the items correlate by {self.agreement:.2f} (Spearman): "
                + ("take the order seriously" if self.agreement >= 0.8 else "the order is uncertain")
                + _more_items(self.agreement)
            )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Plain values, the same for the same run."""
        tasks = [_task_json(task) for task in self.tasks]
        return {
            "about": self.about,
            "verdict": self.words(),
            "error_rate": LEVEL,
            "methods": [asdict(standing) for standing in self.methods],
            "rank_correlation_of_halves": self.agreement,
            "tasks": tasks,
            "left_out": self.left_out,
        }


def results_of(folder: str | Path) -> Results:
    """Summarize the run in a folder, and write `results.json` there.

    Raises:
        TrimtabError: There is no run, or none of its tasks is done.
    """
    folder = Path(folder)
    if not (folder / HEAD).is_file():
        raise TrimtabError(f"{folder} doesn't contain a benchmark ({HEAD} is missing)")
    head = json.loads((folder / HEAD).read_bytes())
    store = Store(folder, head)
    tasks, left_out = [], dict(head["left_out"])
    halves: list[Halves] = [({}, {}) for _ in range(SPLITS)]
    places: dict[str, list[float]] = {}
    for name in head["tasks"]:
        if not store.done("cells", name, "task"):
            continue
        about = _read(store, name, "task")
        if "left_out" in about:
            left_out[name] = about["left_out"]
            continue
        if not store.done("cells", name, PLAIN):
            continue
        by_method = {
            row: _read(store, name, "method", row) for row in head["rows"] if store.done("cells", name, "method", row)
        }
        tasks.append(_task(store, name, about, by_method, halves, places))
    if not tasks and all(name in left_out for name in head["tasks"]):
        why = "; ".join(f"{name}: {left_out[name]}" for name in head["tasks"])
        raise TrimtabError(f"{folder} has no results, as no task could be measured: {why}")
    if not tasks:
        raise TrimtabError(f"{folder} has an unfinished run, in which no task is done yet; run it again to continue")
    results = Results(head, tuple(tasks), _standings(tasks, places), _agreement(halves), left_out)
    write_atomically(folder / RESULTS, canonical(results.to_json()))
    return results


# ---- one task ----------------------------------------------------------------------------------------------------


def _task(
    store: Store,
    name: str,
    about: Mapping[str, Any],
    by_method: Mapping[str, Mapping[str, Any]],
    halves: Sequence[Halves],
    places: dict[str, list[float]],
) -> TaskResults:
    plain, groups = _read(store, name, PLAIN), about["groups"]
    prompted = {
        arm: decide(plain["scores"], _read(store, name, arm)["scores"], groups=groups)
        for arm in (PROMPT, TWICE)
        if store.done("cells", name, arm)
    }
    random = {run["nats"]: run["scores"] for run in by_method.get(CONTROL, {}).get("runs", ())}
    gain = prompted[PROMPT].difference.estimate if PROMPT in prompted else None
    rows, left_out = [], {}
    for method, stored in by_method.items():
        if "left_out" in stored or not stored["runs"]:
            left_out[method] = stored.get("left_out") or stored["lacking"][0]["reason"]
            continue
        rows.append(_row(store, method, stored, plain, groups, random, gain))
    _rank(name, plain, groups, by_method, halves, places)
    unsteered = mean(plain["scores"])
    return TaskResults(
        name, about["about"], about["unit"], len(set(groups)), unsteered, prompted, tuple(rows), left_out
    )


def _row(
    store: Store,
    method: str,
    stored: Mapping[str, Any],
    plain: Mapping[str, Any],
    groups: Sequence[str],
    random: Mapping[float | None, Sequence[float]],
    gain: float | None,
) -> Row:
    runs = stored["runs"]
    cells = tuple(_cell(store, method, run, len(runs), plain, groups, random) for run in runs)
    best = max(range(len(cells)), key=lambda n: (*cells[n].rank, -n))
    notes = [stored["note"]] if "note" in stored else []
    notes += [f"{entry['nats']:g} nats: {entry['reason']}" for entry in stored.get("lacking", ())]
    if stored.get("monotone") is False:
        notes.append("its divergence doesn't grow with the strength everywhere")
    if "no_orthogonal" in stored:
        notes.append(f"no orthogonal control: {stored['no_orthogonal']}")
    if "no_span" in stored:
        notes.append(f"no random span as a control: {stored['no_span']}")
    # if the prompt itself has little effect, a share of it is meaningless
    share = cells[best].decision.difference.estimate / gain if gain is not None and gain > 0.02 else None
    return Row(method, cells, best, share, tuple(notes), stored.get("predictors"))


def _cell(
    store: Store,
    method: str,
    run: Mapping[str, Any],
    strengths: int,
    plain: Mapping[str, Any],
    groups: Sequence[str],
    random: Mapping[float | None, Sequence[float]],
) -> Cell:
    scores, nats = run["scores"], run["nats"]
    against = None if method == CONTROL else random.get(nats)
    orthogonal, span = (run.get(control, {}).get("scores") for control in ("orthogonal", "span"))
    sides = {}
    for side, values in run.get("sides", {}).items():
        sides[side] = paired_bootstrap(_read(store, "sides", side), values)
    beside = {
        name: median(run["beside"][name]) / median(values)
        if name == "perplexity"
        else mean(run["beside"][name]) - mean(values)
        for name, values in plain["beside"].items()
    }
    broken = []
    if beside.get("repeated", 0.0) > LOOPS:
        broken.append("it repeats itself")
    if beside.get("empty", 0.0) > EMPTY:
        broken.append("answers are empty")
    if beside.get("perplexity", 1.0) > UNLIKELY:
        broken.append("its text is unlikely")
    return Cell(
        nats,
        run["factor"],
        run.get("reached"),
        decide(plain["scores"], scores, groups=groups, candidates=strengths),
        None if against is None else decide(against, scores, groups=groups).p,
        None if orthogonal is None else decide(orthogonal, scores, groups=groups).p,
        None if span is None else decide(span, scores, groups=groups).p,
        beside,
        sides,
        tuple(broken),
    )


# ---- ranks -------------------------------------------------------------------------------------------------------


def _rank(
    task: str,
    plain: Mapping[str, Any],
    groups: Sequence[str],
    by_method: Mapping[str, Mapping[str, Any]],
    halves: Sequence[Halves],
    places: dict[str, list[float]],
) -> None:
    """Add the methods' places at each divergence of this task to `places` (on all items) and to `halves`."""
    order = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    everything = list(range(len(groups)))
    by_nats: dict[float, dict[str, Sequence[float]]] = {}
    for method, stored in by_method.items():
        for run in stored.get("runs", ()):
            if run["nats"] is not None:
                by_nats.setdefault(run["nats"], {})[method] = run["scores"]
    for nats, scores_by_method in sorted(by_nats.items()):
        if len(scores_by_method) < 2:
            continue
        for method, place in _places(scores_by_method, plain["scores"], everything).items():
            places.setdefault(method, []).append(place)
        for split, both in enumerate(halves):
            drawn = np.random.default_rng(split).permutation(len(order))
            for n, half in enumerate(both):
                indices = [i for i, group in enumerate(groups) if drawn[order[group]] % 2 == n]
                if indices:
                    for method, place in _places(scores_by_method, plain["scores"], indices).items():
                        half[method, f"{task} {nats:g}"] = place


def _places(
    scores_by_method: Mapping[str, Sequence[float]], plain: Sequence[float], indices: Sequence[int]
) -> dict[str, float]:
    """From 0 (last) to 1 (first) by the mean gain on these items; ties share their places."""
    gains = {method: mean(scores[i] - plain[i] for i in indices) for method, scores in scores_by_method.items()}
    ranks = ranked(list(gains.values()))
    return {method: rank / (len(gains) - 1) for method, rank in zip(gains, ranks, strict=True)}


def ranked(values: Sequence[float]) -> list[float]:
    """The ranks of these values, 0 for the lowest; ties get the mean of their ranks."""
    rounded = [round(value, 9) for value in values]
    return [sum(b < a for b in rounded) + (sum(b == a for b in rounded) - 1) / 2 for a in rounded]


RANKED = 5
"""The minimum number of methods for comparing two orders: with fewer, the same one occurs by chance too often."""


SPLITS = 20
"""The number of random splits into halves: a single one may be lucky."""
Halves = tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]
"""By method, and by task and divergence: its place, on one half of the items and on the other."""
RELIABLE = 0.9


def _agreement(halves: Sequence[Halves]) -> float | None:
    """Spearman's correlation of the methods' mean places between halves, over all splits; `None` for few methods."""
    each = [correlation for both in halves if (correlation := _correlation(*both)) is not None]
    return round(mean(each), 6) if each else None


def _correlation(*halves: Mapping[tuple[str, str], float]) -> float | None:
    both = sorted({method for method, _ in halves[0]} & {method for method, _ in halves[1]})
    if len(both) < RANKED:
        return None
    sides = [[mean(v for (m, _), v in half.items() if m == method) for method in both] for half in halves]
    a, b = (np.array(ranked(side)) for side in sides)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _more_items(agreement: float) -> str:
    """How many times as many items would raise the agreement to `RELIABLE`, by the Spearman–Brown formula."""
    if agreement >= RELIABLE:
        return ""
    if agreement <= 0:
        return "; no more than chance would give"
    times = RELIABLE * (1 - agreement) / (agreement * (1 - RELIABLE))
    return f"; reaching {RELIABLE:g} takes about {times:.2g} times as many --items (Spearman and Brown)"


def _standings(tasks: Sequence[TaskResults], places: Mapping[str, Sequence[float]]) -> tuple[Standing, ...]:
    rows: dict[str, list[Row]] = {}
    for task in tasks:
        for row in task.rows:
            rows.setdefault(row.method, []).append(row)
    standings = []
    for method, method_rows in rows.items():
        verdicts = [row.cell.verdict for row in method_rows]
        shares = [row.share for row in method_rows if row.share is not None]
        standings.append(
            Standing(
                method,
                len(method_rows),
                verdicts.count(BETTER),
                verdicts.count(UNCONTROLLED),
                verdicts.count(WORSE),
                sum(bool(row.cell.broken) for row in method_rows),
                round(mean(places[method]), 6) if method in places else 0.0,
                round(median(shares), 6) if shares else None,
            )
        )
    return tuple(sorted(standings, key=lambda standing: (-standing.better, -standing.place, standing.method)))


# ---- plain values ------------------------------------------------------------------------------------------------


def _task_json(task: TaskResults) -> dict[str, Any]:
    return {
        "task": task.name,
        "about": task.about,
        "unit": task.unit,
        "items": task.items,
        "unsteered": task.unsteered,
        "told": {
            arm: {**asdict(decision), "words": describe_decision(decision, "items")}
            for arm, decision in task.prompted.items()
        },
        "rows": [_row_json(row) for row in task.rows],
        "left_out": task.left_out,
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "verdict": row.cell.verdict,
        "words": describe_decision(row.cell.decision, "items"),
        "at_nats": row.cell.nats,
        "share_of_prompt": row.share,
        "broken": row.cell.broken,
        "cells": [{**asdict(cell), "verdict": cell.verdict} for cell in row.cells],
        "notes": row.notes,
        "predictors": row.predictors,
    }


def _read(store: Store, *names: str) -> Any:
    def raise_missing() -> Any:
        raise TrimtabError(f"a part of the run is missing: {' / '.join(names)}; run it again")

    return store.get_or_create("cells", *names, make=raise_missing)
