"""Splits by base query: the prompts to choose a setting on and those to measure it on share no query."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from trimtab.errors import TrimtabError


@dataclass(frozen=True)
class Split:
    """Indices of the prompts to search on, in the order in which they are used, and of those held out."""

    search: tuple[int, ...]
    held_out: tuple[int, ...]


def split_by_query(groups: Sequence[Hashable], *, held_out: float = 0.5, seed: int = 0) -> Split:
    """Split prompts in two so that prompts of one group (one base query, however worded) stay together.

    `groups[i]` names prompt i's base query. About a share `held_out` of the groups is held out: at least one, and not
    all; with 0, none. The same groups and seed give the same split.

    Raises `TrimtabError` if there are no prompts, or a single group of which a part is to be held out, and `ValueError`
    for a share outside 0 … 1.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"the share that is held out is at least 0 and below 1, got {held_out}")
    names = list(dict.fromkeys(groups))
    if not names:
        raise TrimtabError("there are no prompts to tune on")
    if held_out and len(names) < 2:
        raise TrimtabError("all prompts have the same base query, so none can be held out; give more, or held_out=0")
    random.Random(seed).shuffle(names)
    count = min(len(names) - 1, max(1, round(held_out * len(names)))) if held_out else 0
    rank_of = {name: i for i, name in enumerate(names)}
    order = sorted(range(len(groups)), key=lambda i: (rank_of[groups[i]], i))
    kept = len(names) - count
    return Split(
        search=tuple(i for i in order if rank_of[groups[i]] < kept),
        held_out=tuple(i for i in order if rank_of[groups[i]] >= kept),
    )


def digest_of(groups: Sequence[Hashable], indices: Sequence[int]) -> str:
    """A digest of the base queries of these prompts, independent of their order."""
    names = sorted({str(groups[i]) for i in indices})
    return hashlib.sha256(json.dumps(names, ensure_ascii=False).encode()).hexdigest()[:16]
