"""Successive halving: many candidates on few items, then the better half of them on twice as many.

It knows nothing of models: `evaluate` answers items, `judge` says where a candidate stands. Candidate 0 is "don't
steer". It is always there and never eliminated, so every other candidate is compared with it on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

R = TypeVar("R")
BASELINE = 0


@dataclass(frozen=True)
class Rung:
    """The candidates see the first `items` items; then the best `survivors` go on, and candidate 0 with them."""

    items: int
    survivors: int


@dataclass(frozen=True)
class Standing:
    """Where a candidate stands: a score (higher is better), how hard it pushes, and what forbids it.

    A candidate with a reason in `broken`, or a score that is no finite number, is never chosen.
    """

    score: float
    dose: float = 0.0
    broken: tuple[str, ...] = ()

    @property
    def admissible(self) -> bool:
        return not self.broken and math.isfinite(self.score)


@dataclass(frozen=True)
class Halved(Generic[R]):
    """What came of it.

    `best` is a candidate's index, 0 for "don't steer". `results[c]` are candidate c's results on the items 0, 1, …
    as far as it came, and `standings[c]` where it stood there (`None` if it saw none). `interrupted`: a
    KeyboardInterrupt ended it; `exhausted`: the budget did. In both cases the best is of what was done until then.
    """

    best: int
    results: tuple[tuple[R, ...], ...]
    standings: tuple[Standing | None, ...]
    interrupted: bool
    exhausted: bool


def ladder(candidates: int, items: int, *, first: int = 6, keep: float = 0.5) -> list[Rung]:
    """A schedule: all candidates on the first `first` items, then a share `keep` of them on 1/`keep` as many.

    Every rung costs about the same. `candidates` counts those besides "don't steer". Raises `ValueError` for
    no items or a share outside 0 … 1.
    """
    if items < 1 or first < 1:
        raise ValueError(f"a search needs items, got {items} and {first} for the first rung")
    if not 0 < keep < 1:
        raise ValueError(f"the share that goes on lies between 0 and 1, got {keep}")
    rungs, seen, alive = [], min(first, items), candidates
    while True:
        alive = max(1, math.ceil(alive * keep))
        rungs.append(Rung(seen, alive))
        if seen == items:
            return rungs
        seen = min(items, max(seen + 1, math.floor(seen / keep)))


def rows_of(candidates: int, rungs: Sequence[Rung]) -> int:
    """How many answers a schedule needs in all, those of "don't steer" among them."""
    total, seen, alive = 0, 0, candidates
    for rung in rungs:
        total += (rung.items - seen) * (alive + 1)
        seen, alive = rung.items, min(alive, rung.survivors)
    return total


def halve(
    candidates: int,
    rungs: Sequence[Rung],
    evaluate: Callable[[list[int], list[int]], list[list[R]]],
    judge: Callable[[Sequence[R], Sequence[R]], Standing],
    *,
    ties: Sequence[float] | None = None,
    rows: int = 64,
    afford: Callable[[int], bool] = lambda _: True,
    after: Callable[[int, int, int], None] | None = None,
) -> Halved[R]:
    """Run the schedule over candidates 0 … `candidates`, of which 0 is "don't steer".

    `evaluate(candidates, items)` gives a list of results for each candidate, one an item; it is asked for each
    pair once, and for as many items at a time as make up to `rows` pairs. `judge(results, baseline)` compares a
    candidate's results with those of "don't steer" on the same items. `afford(pairs)` is asked before pairs are
    evaluated: when not even one more item can be paid for, the search ends. `after(rung, alive, best)` is told when a
    rung is done: its number from 0, how many candidates were in it besides "don't steer", and which is best.

    Scores that tie go to "don't steer", then to the smaller dose, then to the smaller of `ties` (a layer, say),
    then to the first. A broken guard on few items may be bad luck: it sends a candidate to the end of the line,
    and only at the end of the search out of it.

    Raises `ValueError` for rungs whose items don't grow.
    """
    if any(a.items >= b.items for a, b in pairwise(rungs)) or not rungs or rungs[0].items < 1:
        raise ValueError(f"each rung sees more items than the one before, got {[rung.items for rung in rungs]}")
    results: list[list[R]] = [[] for _ in range(candidates + 1)]
    last = [0.0] * (candidates + 1) if ties is None else list(ties)
    alive = list(range(1, candidates + 1))
    interrupted = exhausted = False

    def stand(candidate: int) -> Standing | None:
        seen = results[candidate]
        return judge(seen, results[BASELINE][: len(seen)]) if seen else None

    def rank(candidate: int) -> tuple[bool, float, bool, float, float, int]:
        standing = stand(candidate)
        if standing is None or not standing.admissible:
            # "don't steer" is always to be had, whatever its score is worth
            return candidate != BASELINE, math.inf, True, math.inf, last[candidate], candidate
        dose = float(f"{standing.dose:.3g}") if math.isfinite(standing.dose) else math.inf
        return False, -round(standing.score, 9), candidate != BASELINE, dose, last[candidate], candidate

    try:
        for number, rung in enumerate(rungs):
            while (seen := len(results[BASELINE])) < rung.items and not exhausted:
                evaluated = [BASELINE, *alive]
                step = min(rung.items - seen, max(1, rows // len(evaluated)))
                while step and not afford(step * len(evaluated)):
                    step //= 2
                if not step:
                    exhausted = True
                    break
                outcomes = evaluate(evaluated, list(range(seen, seen + step)))
                for candidate, new in zip(
                    evaluated, outcomes, strict=True
                ):  # "don't steer" first: it has seen what they have
                    if len(new) != step:
                        raise ValueError(f"{step} items were asked for and {len(new)} results came")
                    results[candidate] += new
            if exhausted:
                break
            if after is not None:
                after(number, len(alive), min([BASELINE, *alive], key=rank))
            if number + 1 < len(rungs):
                alive = sorted(sorted(alive, key=rank)[: rung.survivors])
    except KeyboardInterrupt:
        interrupted = True
    best = min([BASELINE, *alive], key=rank)
    return Halved(
        best=best,
        results=tuple(tuple(row) for row in results),
        standings=tuple(stand(candidate) for candidate in range(candidates + 1)),
        interrupted=interrupted,
        exhausted=exhausted,
    )
