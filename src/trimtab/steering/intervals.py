"""Sets of token positions as half-open intervals `(start, stop)`, where a `None` stop means "to the end"."""

from __future__ import annotations

from math import inf

Intervals = tuple[tuple[int, int | None], ...]


def union(*sets: Intervals) -> Intervals:
    """The union of the sets, in order, with adjacent intervals merged."""
    joined: list[tuple[int, float]] = []
    for start, stop in sorted((a, inf if b is None else b) for intervals in sets for a, b in intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        elif start < stop:
            joined.append((start, stop))
    return tuple((a, None if b == inf else int(b)) for a, b in joined)


def complement(intervals: Intervals) -> Intervals:
    """The positions from 0 on that aren't in the set."""
    gaps: list[tuple[int, int | None]] = []
    gap_start: int | None = 0
    for start, stop in union(intervals):
        if gap_start is not None and gap_start < start:
            gaps.append((gap_start, start))
        gap_start = stop
    if gap_start is not None:
        gaps.append((gap_start, None))
    return tuple(gaps)


def intersection(*sets: Intervals) -> Intervals:
    """The intersection of the sets."""
    return complement(union(*map(complement, sets)))
