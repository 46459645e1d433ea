"""Sets of token positions as half-open intervals `(start, stop)`, where a `None` stop means "to the end"."""

from __future__ import annotations

from math import inf

Intervals = tuple[tuple[int, int | None], ...]


def union(*sets: Intervals) -> Intervals:
    """What is in any of them: in order, and none touches the next."""
    joined: list[tuple[int, float]] = []
    for start, stop in sorted((a, inf if b is None else b) for one in sets for a, b in one):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        elif start < stop:
            joined.append((start, stop))
    return tuple((a, None if b == inf else int(b)) for a, b in joined)


def complement(one: Intervals) -> Intervals:
    """The positions from 0 on that aren't in it."""
    found: list[tuple[int, int | None]] = []
    at: int | None = 0
    for start, stop in union(one):
        if at is not None and at < start:
            found.append((at, start))
        at = stop
    if at is not None:
        found.append((at, None))
    return tuple(found)


def intersection(*sets: Intervals) -> Intervals:
    """What is in all of them."""
    return complement(union(*map(complement, sets)))
