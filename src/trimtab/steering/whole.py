"""Whole numbers as users have them: Python's, numpy's, and those in a tensor without dimensions."""

from __future__ import annotations

from operator import index
from typing import Any


def whole(value: Any) -> int | None:
    """The number; `None` for anything that isn't a whole one."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None
