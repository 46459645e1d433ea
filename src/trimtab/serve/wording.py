"""Validation errors in the API's own words: where, what, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.serve.fields import ALTERNATIVES, EXPECTED
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import ChatRequest, CompletionRequest, Message, SteeringChoice
from trimtab.serve.schema_responses import ResponsesRequest
from trimtab.serve.schema_steerings import LearnRequest, MakeRequest

MAX_ERRORS = 200
"""The most errors of one request among which the one to report is chosen."""
NAMES = "at most 64 letters, digits, '.', '_' and '-', and begins with a letter or a digit"
KINDS = {
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
MESSAGES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "missing": lambda _: "it is missing",
    "extra_forbidden": lambda _: "it isn't known",
    "literal_error": lambda about: f"it must be {about['expected']}",
    "greater_than": lambda about: f"it must be above {about['gt']}",
    "greater_than_equal": lambda about: f"it must be at least {about['ge']}",
    "less_than": lambda about: f"it must be below {about['lt']}",
    "less_than_equal": lambda about: f"it must be at most {about['le']}",
    "finite_number": lambda _: "it must be a finite number",
    "too_long": lambda about: f"it can have at most {about['max_length']} items",
    "too_short": lambda about: f"it must have at least {about['min_length']} items",
    "string_too_long": lambda about: f"it can have at most {about['max_length']} characters",
    "string_too_short": lambda about: f"it must have at least {about['min_length']} characters",
    "json_invalid": lambda _: "it isn't valid JSON",
}
FIELDS = sorted({name for model in (ChatRequest, CompletionRequest, ResponsesRequest) for name in model.model_fields})
INNER = sorted({name for model in (Message, SteeringChoice, LearnRequest, MakeRequest) for name in model.model_fields})


def validation_refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """pydantic's errors about a body as a refusal with status 400. It reports the most deeply nested one.

    A text that may also be a list has two errors if it is neither; the most deeply nested error is about the type that
    was meant.
    """
    placed = [(_place(error["loc"], body), error) for error in errors[:MAX_ERRORS]]
    where, error = max(placed, key=_weight)
    here = [candidate for place, candidate in placed if place == where]
    problem = _message_for(where, error, here)
    if isinstance(body, bytes) and not where:
        problem = "send it as JSON, with Content-Type: application/json"
    elif error["type"] == "bytes_type":
        problem = "send the bytes of a file, with Content-Type: application/octet-stream"
    dotted = ".".join(map(str, where))
    message = f"{dotted}: {problem}" if dotted else f"the body: {problem}"
    return Refusal(400, message[:1000], param=dotted[:200] or None)


def _weight(pair: tuple[Sequence[Any], Mapping[str, Any]]) -> tuple[int, bool, bool]:
    """How informative an error is: more if nested more deeply; in an object, the one about its `type` wins."""
    place, error = pair
    return len(place), error["type"] not in KINDS, tuple(place[-1:]) == ("type",)


def _place(loc: Sequence[Any], body: Any) -> tuple[Any, ...]:
    """The location in the request, without pydantic's own names of the union types that it tried."""
    parts = list(loc)
    if parts and parts[0] in ("body", "path", "query", "header"):
        if parts[0] != "body":
            return tuple(parts[1:])
        parts = parts[1:]
    if body is None:
        return tuple(part for part in parts if isinstance(part, int) or str(part).isidentifier())
    own: list[Any] = []
    at = body
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        inside = (
            isinstance(part, int) and part < len(at) if isinstance(at, list) else isinstance(at, dict) and part in at
        )
        if inside:
            at = at[part]
        elif not (isinstance(at, dict) and last and isinstance(part, str) and part.isidentifier()):
            continue  # the name of a union type
        own.append(part)
    return tuple(own)


def _message_for(where: Sequence[Any], error: Mapping[str, Any], here: Sequence[Mapping[str, Any]]) -> str:
    name = next((part for part in reversed(where) if isinstance(part, str)), "")
    kind, about = error["type"], error.get("ctx") or {}
    for part in where:
        if part in ALTERNATIVES:
            return ALTERNATIVES[part]
    if kind == "extra_forbidden":
        known = FIELDS if len(where) == 1 else INNER
        near = difflib.get_close_matches(name, known, 1)
        return f"this field isn't known; did you mean {near[0]!r}?" if near else "this field isn't known; see /docs"
    if (kind == "literal_error" and name == "type" and "content" in where) or (
        kind.startswith("union_tag_") and name == "content" and isinstance(where[-1], int)
    ):
        return (
            "only text and images are supported: {'type': 'text', 'text': …} and {'type': 'image_url', 'image_url':"
            " {'url': 'data:image/png;base64,…'}}; leave other parts out"
        )
    if kind == "string_pattern_mismatch" and name == "name":
        if "function" in where or "tools" in where or "tool_choice" in where:
            return "a function's name has letters, digits, '.', '_' and '-', 64 at most"
        return f"a steering's name has {NAMES}"
    if kind.startswith("union_tag_") and name in EXPECTED:
        return f"it must be {EXPECTED[name]}"
    kinds = {other["type"] for other in here}
    if kind == "literal_error" and len(kinds) > 1 and name in EXPECTED:
        return f"it must be {EXPECTED[name]}"
    if kind in KINDS:
        several = name in EXPECTED and (len(kinds) > 1 or not isinstance(where[-1], int))
        return f"it must be {EXPECTED[name] if several else KINDS[kind]}"
    if kind in MESSAGES:
        return MESSAGES[kind](about)
    return str(error["msg"])
