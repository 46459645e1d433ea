"""Warnings before a public name, parameter or option goes: for two minor versions, saying what to use instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

MINOR_VERSIONS = 2
"""How many minor versions warn, the first one included."""
Function = TypeVar("Function", bound=Callable[..., Any])


def warn_deprecated(what: str, instead: str, *, since: str, stacklevel: int = 2) -> None:
    """Warn that something public is going to be removed.

    Args:
        what: What is used, such as `learn_old(…)` or `learn_caa(…, old=…)`.
        instead: What to use instead, in the same form.
        since: The first version that warns, such as "0.2".
        stacklevel: Which caller the warning names: 2 is the caller of the function that calls this.
    """
    major, minor = map(int, since.split(".")[:2])
    removed = f"{major}.{minor + MINOR_VERSIONS}"
    message = f"{what} is deprecated and will be removed in trimtab {removed}; use {instead} instead"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def deprecated(instead: str, *, since: str) -> Callable[[Function], Function]:
    """Decorate a function or method so that each call warns, and does what it did.

    Args:
        instead: What to use instead, such as `learn_new(…)`.
        since: The first version that warns, such as "0.2".

    Returns:
        The decorator.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def warning(*arguments: Any, **keywords: Any) -> Any:
            warn_deprecated(f"{function.__qualname__}(…)", instead, since=since)
            return function(*arguments, **keywords)

        return warning  # type: ignore[return-value]

    return decorate
