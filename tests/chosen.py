"""Which cases are long, and which family of models a case is about: read from how it is parametrised."""

from __future__ import annotations

import inspect
from typing import Any

import pytest


def parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def is_long(item: pytest.Item) -> bool:
    """Whether a `long_unless` of the case, its class or its module names parameters of it and doesn't hold for them."""
    values = parameters(item)
    for mark in item.iter_markers("long_unless"):
        (which,) = mark.args
        names = inspect.signature(which).parameters
        if all(name in values for name in names) and not which(*(values[name] for name in names)):
            return True
    return False


def family(item: pytest.Item) -> str | None:
    """The family of tiny models that a case is about, where it is about one."""
    from tiny import FAMILIES

    for value in parameters(item).values():
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, str) and first in FAMILIES:
            return first
    return None
