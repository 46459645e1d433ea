"""The function that decides whether an answer complies: by name, by IFEval type, or the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError

Check = Callable[[int, str, bool], "bool | float"]


def checker_for(check: str | None, kind: str | None, kwargs: str | None, queries: Sequence[str]) -> Check:
    """The check that the options name, as `tune` calls it: `check(i, answer, cut)` for query i.

    Raises `TrimtabError` if they name none or two, or one that isn't available.
    """
    if kwargs is not None and kind is None:
        raise TrimtabError("--kwargs are the settings of an IFEval type; give --type as well")
    if (check is None) == (kind is None):
        raise TrimtabError(
            "tune needs to know when an answer complies; give one of --check and --type"
            f" (--check takes {', '.join(_named_checks())}, or MODULE:FUNCTION)"
        )
    if kind is not None:
        return _ifeval(kind, kwargs, queries)
    assert check is not None
    named = _named_checks()
    return _adapt_check(named[check] if check in named else _import_check(check), queries)


def _named_checks() -> dict[str, Any]:
    from trimtab.evaluate.constraints import CONSTRAINTS

    return dict(CONSTRAINTS)


def _ifeval(kind: str, kwargs: str | None, queries: Sequence[str]) -> Check:
    try:
        settings = json.loads(kwargs) if kwargs else {}
    except ValueError as error:
        raise TrimtabError(f"--kwargs is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise TrimtabError(f'--kwargs is a JSON object such as {{"num_bullets": 3}}, got {kwargs}')
    try:
        follows = importlib.import_module("trimtab.evaluate.ifeval").follows
    except ImportError as error:
        raise TrimtabError(f"--type needs IFEval's checks: pip install 'trimtab[eval]' ({error})") from None
    follows(kind, settings, "A probe.", prompt=queries[0] if queries else "")  # reports an unknown type at once
    return lambda i, answer, _cut: bool(follows(kind, settings, answer, prompt=queries[i]))


def _import_check(name: str) -> Callable[..., Any]:
    """Import `module:function` or `file.py:function`."""
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function:
        raise TrimtabError(
            f"--check {name!r} is neither {', '.join(_named_checks())} nor MODULE:FUNCTION (or FILE.py:FUNCTION)"
        )
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:  # a user's module may raise anything
        raise TrimtabError(f"--check {name}: can't import {source}: {type(error).__name__}: {error}") from None
    candidate = getattr(module, function, None)
    if not callable(candidate):
        raise TrimtabError(f"--check {name}: {source} has no function {function!r}")
    checker: Callable[..., Any] = candidate
    return checker


def _adapt_check(function: Callable[..., Any], queries: Sequence[str]) -> Check:
    """Adapt a function of the answer, which may also have parameters named `cut` and `prompt`."""
    try:
        takes = frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        takes = frozenset()

    def check(i: int, answer: str, cut: bool) -> bool | float:
        options: dict[str, Any] = {"cut": cut, "prompt": queries[i]}
        verdict = function(answer, **{name: value for name, value in options.items() if name in takes})
        if not isinstance(verdict, (bool, int, float)):
            raise TrimtabError(f"the check returned {verdict!r}; a check returns True, False or a number")
        return verdict

    return check
