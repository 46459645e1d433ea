"""What users give `generate` and its like: one for all prompts, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.decoding.rejection import Rejection
from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.text.chat import Prompt
from trimtab.text.spans import Emphasis


def marks_for(emphasize: Any, count: int) -> list[Any]:
    """What to emphasize in each prompt, `None` where nothing."""
    if emphasize is None or isinstance(emphasize, Emphasis):
        return [emphasize] * count
    if len(emphasize) != count:
        raise TrimtabError(
            f"{len(emphasize)} things to emphasize for {count} prompts; give one, or one for each (a list of phrases,"
            " or None for none)"
        )
    return list(emphasize)


def rejections_for(rejection: Any, marks: list[Any]) -> list[Rejection | None]:
    """Each prompt's rejection: as given, or by default where something is emphasized."""
    if rejection is None:
        return [Rejection() if mark is not None else None for mark in marks]
    if isinstance(rejection, bool):
        return [Rejection() if rejection else None for _ in marks]
    if isinstance(rejection, Rejection):
        return [rejection] * len(marks)
    if len(rejection) != len(marks):
        raise TrimtabError(f"{len(rejection)} rejections for {len(marks)} prompts; give one, or one for each")
    return list(rejection)


def batches_of(
    order: list[int], size: int, steerings: list[Steering | None], rejections: list[Rejection | None]
) -> list[list[int]]:
    """The prompts in batches of at most `size`, in order; a batch rejects by one schedule, or steers at every token.

    What isn't steered goes with the first of them.
    """
    kinds: dict[str, list[int]] = {}
    for i in order:
        way = rejections[i]
        schedule = "" if way is None else way.schedule
        kinds.setdefault("unsteered" if steerings[i] is None else schedule, []).append(i)
    unsteered = kinds.pop("unsteered", [])
    groups = list(kinds.values()) or [[]]
    place = {i: n for n, i in enumerate(order)}
    groups[0] = sorted(groups[0] + unsteered, key=place.__getitem__)
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list; a list of messages is one prompt. Raises `TrimtabError` for an empty one."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if not listed:
        raise TrimtabError("there are no prompts")
    return [listed] if isinstance(listed[0], dict) else listed


def one_each(
    steering: Steering | str | Sequence[Steering | str | None] | None, count: int, *, named: bool = False
) -> list[Any]:
    """One steering or `None` for all prompts, or one for each; where they have names (`named`), a name will do.

    Raises `TrimtabError` for another count, and for a name where there are none.
    """
    if isinstance(steering, str) and not named:
        raise TrimtabError(f"{steering!r} is no steering; trimtab.load(…) reads one from a file")
    if steering is None or isinstance(steering, (Steering, str)):
        return [steering] * count
    if len(steering) != count:
        raise TrimtabError(f"{len(steering)} steerings for {count} prompts; give one, or one for each (None for none)")
    return list(steering)
