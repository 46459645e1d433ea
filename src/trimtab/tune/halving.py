"""Successive halving: many candidates on few items, then the better half of them on twice as many.

It is independent of models: `evaluate` answers items, `judge` scores a candidate. Candidate 0 is "don't steer". It is
never eliminated, so every other candidate is compared with it on the same items.
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
    """A round: the candidates are run on the first `items` items; the best `survivors` and candidate 0 continue."""

    items: int
    survivors: int


@dataclass(frozen=True)
class Standing:
    """A candidate's standing: its score (higher is better), its dose, and the reasons that disqualify it.

    A candidate with a reason in `broken`, or a score that isn't finite, is never chosen.
    """

    score: float
    dose: float = 0.0
    broken: tuple[str, ...] = ()

    @property
    def admissible(self) -> bool:
        return not self.broken and math.isfinite(self.score)


@dataclass(frozen=True)
class HalvingResult(Generic[R]):
    """The result of a search.

    `best` is a candidate's index, 0 for "don't steer". `results[c]` are candidate c's results on the items 0, 1, … that
    it was evaluated on, and `standings[c]` its standing on them (`None` if there were none). `interrupted`: a
    KeyboardInterrupt ended the search; `exhausted`: the budget did. In both cases `best` is the best so far.
    """

    best: int
    results: tuple[tuple[R, ...], ...]
    standings: tuple[Standing | None, ...]
    interrupted: bool
    exhausted: bool


def ladder(candidates: int, items: int, *, first: int = 6, keep: float = 0.5) -> list[Rung]:
    """A schedule: all candidates on the first `first` items, then a share `keep` of them on 1/`keep` times as many.

    Every round costs about the same. `candidates` doesn't count "don't steer". Raises `ValueError` if there are no
    items, or the share is outside 0 … 1.
    """
    if items < 1 or first < 1:
        raise ValueError(f"a search needs items, got {items} and {first} for the first round")
    if not 0 < keep < 1:
        raise ValueError(f"the share that is kept must be between 0 and 1, got {keep}")
    rungs, seen, alive = [], min(first, items), candidates
    while True:
        alive = max(1, math.ceil(alive * keep))
        rungs.append(Rung(seen, alive))
        if seen == items:
            return rungs
        seen = min(items, max(seen + 1, math.floor(seen / keep)))


def count_answers(candidates: int, rungs: Sequence[Rung]) -> int:
    """The total number of answers of a schedule, including those of "don't steer"."""
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
    on_rung: Callable[[int, int, int], None] | None = None,
) -> HalvingResult[R]:
    """Run the schedule over candidates 0 … `candidates`, of which 0 is "don't steer".

    `evaluate(candidates, items)` returns a list of results for each candidate, one per item. It is called once for each
    pair, with as many items at a time as make up to `rows` pairs. `judge(results, baseline)` compares a candidate's
    results with those of "don't steer" on the same items. `afford(pairs)` is called before pairs are evaluated; if not
    even one more item fits the budget, the search ends. `on_rung(rung, alive, best)` is called after a round, with
    its number from 0, the number of candidates in it besides "don't steer", and the best candidate.

    Ties in score go to "don't steer", then to the smaller dose, then to the smaller of `ties` (a layer, say), then to
    the first. Breaking the guard on few items may be bad luck: it ranks a candidate last, but disqualifies it only at
    the end of the search.

    Raises `ValueError` if the rounds' items don't increase.
    """
    if any(a.items >= b.items for a, b in pairwise(rungs)) or not rungs or rungs[0].items < 1:
        raise ValueError(f"each round must have more items than the one before, got {[rung.items for rung in rungs]}")
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
            # "don't steer" is always available, whatever its score
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
                ):  # "don't steer" comes first, so it has been evaluated on the same items
                    if len(new) != step:
                        raise ValueError(f"{step} results were expected, got {len(new)}")
                    results[candidate] += new
            if exhausted:
                break
            if on_rung is not None:
                on_rung(number, len(alive), min([BASELINE, *alive], key=rank))
            if number + 1 < len(rungs):
                alive = sorted(sorted(alive, key=rank)[: rung.survivors])
    except KeyboardInterrupt:
        interrupted = True
    best = min([BASELINE, *alive], key=rank)
    return HalvingResult(
        best=best,
        results=tuple(tuple(row) for row in results),
        standings=tuple(stand(candidate) for candidate in range(candidates + 1)),
        interrupted=interrupted,
        exhausted=exhausted,
    )
