"""Integers in any form: Python's, numpy's, and those in a tensor without dimensions."""

from __future__ import annotations

from operator import index
from typing import Any


def as_int(value: Any) -> int | None:
    """The value as an `int`; `None` if it isn't an integer."""
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None
