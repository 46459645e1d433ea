"""Bounds on a steering that a client uploads: everybody waits for the work that it causes per token and per prompt.

A steering from the server's own folder may be anything that fits the model; its author is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from trimtab.serve.refusals import Refusal
from trimtab.steering import Gate, Steering
from trimtab.steering.gates import AllOf, AnyOf, Not, Threshold

EDITS = 256
"""Nearly the number of sites of three kinds in a model of 80 blocks."""
TESTS = 64
"""Conditions in all gates together. Each reads the prompt; identical ones count once."""
DEPTH = 8
"""The nesting depth of gates."""
INTERVALS = 256
"""Intervals of positions in all edits together."""
NORM = 1e6
"""The largest norm of a vector, strength included: activations have norms of some hundreds, and its square fits into
float32.
"""
HEADER = 512 << 10
"""Bytes of a file's header, which contains edits and gates."""


def check_file(data: bytes) -> None:
    """Raises `Refusal` for a file whose header is too long or too deeply nested to parse while other requests wait."""
    size = int.from_bytes(data[:8], "little")
    if size > HEADER and data[8:9] == b"{":
        raise _too_much(f"its header has {size} bytes; at most {HEADER} are allowed")
    if _nesting(data[8 : 8 + min(size, HEADER)]) > 64:
        raise _too_much("its header is nested too deeply")


def check_bounds(steering: Steering) -> None:
    """Raises `Refusal` for a steering with too many parts, or with a vector whose norm is too large."""
    if len(steering.edits) > EDITS:
        raise _too_much(f"it has {len(steering.edits)} edits; at most {EDITS} are allowed")
    tests: set[int] = set()
    for edit in steering.edits:
        for test in _tests(edit.gate, 0):
            tests.add(id(test) if test.each_token else hash(test))
            if len(tests) > TESTS:
                raise _too_much(f"its gates have more than {TESTS} conditions")
    intervals = sum(max(1, len(part.intervals)) for edit in steering.edits for part in edit.positions.parts)
    if intervals > INTERVALS:
        raise _too_much(f"it acts on {intervals} intervals of tokens; at most {INTERVALS} are allowed")
    for edit in steering.edits:
        for vector in tensors(edit.operation):
            length = float(vector.double().norm()) * max(1.0, abs(edit.strength))
            if not length <= NORM:
                raise _too_much(f"{edit} has a vector of norm {length:.3g}; at most {NORM:g} is allowed")
        if abs(edit.strength) > NORM:
            raise _too_much(f"{edit} has a strength above {NORM:g}")


def size_of(steering: Steering) -> int:
    """The size of its tensors in bytes."""
    sizes = {
        id(t): t.numel() * t.element_size() for edit in steering.edits for t in tensors((edit.operation, edit.gate))
    }
    return sum(sizes.values())


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside a value: in its fields, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def _tests(gate: Gate, depth: int) -> Iterator[Threshold]:
    if depth > DEPTH:
        raise _too_much(f"its gates are nested more than {DEPTH} levels deep")
    if isinstance(gate, Threshold):
        yield gate
    parts = (gate.gate,) if isinstance(gate, Not) else gate.gates if isinstance(gate, (AllOf, AnyOf)) else ()
    if len(parts) > TESTS:
        raise _too_much(f"one of its gates has {len(parts)} parts; at most {TESTS} are allowed")
    for part in parts:
        yield from _tests(part, depth + 1)


def _nesting(header: bytes) -> int:
    """The nesting depth of the JSON text in the header that describes the edits; 0 if the header can't be parsed."""
    try:
        parsed = json.loads(header)
        inside = parsed.get("__metadata__", {}).get("trimtab", "") if isinstance(parsed, dict) else ""
    except (ValueError, RecursionError, AttributeError):
        return 0  # the reader of the file reports that
    text, depth, deepest, quoted, escaped = str(inside), 0, 0, False, False
    for character in text:
        if quoted:
            quoted, escaped = escaped or character != '"', not escaped and character == "\\"
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _too_much(what: str) -> Refusal:
    return Refusal(400, f"an uploaded steering is too large: {what}", code="too_large")
