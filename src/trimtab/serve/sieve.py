"""Checks of a body's JSON before validation: bounds on its shape, and removal of `null`.

Validation is fast for requests that are nearly right, and slow for one that is wrong in a hundred thousand places, each
of which becomes an error with a description; and it blocks the event loop. So shapes that no valid request has are
refused here, in a thread, at the first violation. A `null` requests nothing and is removed, since clients send whole
objects that are mostly `null`.
"""

from __future__ import annotations

import json
from typing import Any

from trimtab.serve.refusals import Refusal

FIELDS = 64
"""The most fields of an object."""
ITEMS = 1000
"""The most items of a list, unless it consists of integers: those are token ids."""
DEPTH = 32
TOKENS = "logit_bias"
"""An object that may have a field for each of many tokens; vLLM accepts it."""
NULL_ALLOWED = ("chat_template_kwargs", "tools", "response_format", "text")
"""Parts of a request in which `null` has a meaning."""


def clean_json(body: bytes) -> bytes:
    """The body as ASCII JSON without `null` (except in `NULL_ALLOWED`); an empty body stays empty.

    Raises `Refusal` for what can't be parsed, or is too large in one of its parts.
    """
    if not body:
        return body
    try:
        parsed = json.loads(body, parse_constant=no_constant)
    except RecursionError:
        raise _bad_request(f"the body is nested deeper than {DEPTH} levels") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise _bad_request(f"the body isn't JSON: {str(error)[:200]}") from None
    return json.dumps(_clean(parsed, ""), ensure_ascii=True, separators=(",", ":")).encode()


def _clean(value: Any, where: str, depth: int = 0) -> Any:
    if isinstance(value, str):
        return _whole(value, where)
    if depth > DEPTH:
        raise _bad_request(f"{_short(where)} is nested deeper than {DEPTH} levels", where)
    if isinstance(value, dict):
        most = ITEMS if where == TOKENS else FIELDS
        if len(value) > most:
            raise _bad_request(
                f"{_short(where) or 'the body'} has {len(value)} fields; at most {most} are allowed", where
            )
        keep = where.partition(".")[0] in NULL_ALLOWED
        return {
            _whole(name, where): _clean(inner, f"{where}.{name}" if where else name, depth + 1)
            for name, inner in value.items()
            if keep or inner is not None
        }
    if isinstance(value, list):
        if all(type(inner) is int for inner in value):
            return value
        if len(value) > ITEMS:
            raise _bad_request(
                f"{_short(where) or 'the body'} has {len(value)} items; at most {ITEMS} are allowed", where
            )
        return [_clean(inner, f"{where}.{i}", depth + 1) for i, inner in enumerate(value)]
    return value


def _whole(text: str, where: str) -> str:
    """Returns the text. Raises `Refusal` for one that no tokenizer, grammar or log can take."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = rf"\u{ord(text[error.start]):04x}"
            raise _bad_request(
                f"{_short(where) or 'the body'} has an unpaired surrogate, {half}; send complete characters",
                where,
            ) from None
    return text


def no_constant(name: str) -> Any:
    """For `json.loads`: `NaN` and the infinities aren't JSON."""
    raise ValueError(f"{name} isn't a number in JSON")


def _short(where: str) -> str:
    return where if len(where) <= 100 else f"{where[:99]}…"


def _bad_request(message: str, where: str = "") -> Refusal:
    return Refusal(400, message, param=where[:200] or None)
