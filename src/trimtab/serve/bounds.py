"""What a steering that a client brings may be: its work at each token, and at each prompt, is everybody's.

A steering of the server's own folder may be anything that fits the model; who wrote it is trusted.
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
"""As many as a model of 80 blocks has sites of three kinds, nearly."""
TESTS = 64
"""Conditions in all gates together, each of which reads the prompt; the same one counts once."""
DEPTH = 8
"""How deep gates may stand in gates."""
INTERVALS = 256
"""Stretches of positions of all edits together."""
NORM = 1e6
"""The longest vector, strength included: activations are some hundreds long, and their squares fit into float32."""
HEADER = 512 << 10
"""Bytes of a file's header: what edits and gates are written in."""


def check_file(data: bytes) -> None:
    """Raises `Refusal` for a file whose header is too long or too deep to be read while others wait."""
    size = int.from_bytes(data[:8], "little")
    if size > HEADER and data[8:9] == b"{":
        raise _too_much(f"its header has {size} bytes, {HEADER} at most")
    if _nesting(data[8 : 8 + min(size, HEADER)]) > 64:
        raise _too_much("its header is nested too deeply")


def check_bounds(steering: Steering) -> None:
    """Raises `Refusal` for a steering of too many parts, or one that is too long to be measured."""
    if len(steering.edits) > EDITS:
        raise _too_much(f"it has {len(steering.edits)} edits, {EDITS} at most")
    tests: set[int] = set()
    for edit in steering.edits:
        for test in _tests(edit.gate, 0):
            tests.add(id(test) if test.each_token else hash(test))
            if len(tests) > TESTS:
                raise _too_much(f"its gates have more than {TESTS} conditions")
    intervals = sum(max(1, len(part.intervals)) for edit in steering.edits for part in edit.positions.parts)
    if intervals > INTERVALS:
        raise _too_much(f"it acts on {intervals} stretches of tokens, {INTERVALS} at most")
    for edit in steering.edits:
        for vector in tensors(edit.operation):
            length = float(vector.double().norm()) * max(1.0, abs(edit.strength))
            if not length <= NORM:
                raise _too_much(f"{edit} has a vector of length {length:.3g}, {NORM:g} at most")
        if abs(edit.strength) > NORM:
            raise _too_much(f"{edit} has a strength above {NORM:g}")


def size_of(steering: Steering) -> int:
    """How many bytes its tensors hold."""
    sizes = {
        id(t): t.numel() * t.element_size() for edit in steering.edits for t in tensors((edit.operation, edit.gate))
    }
    return sum(sizes.values())


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside."""
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
        raise _too_much(f"its gates are nested more than {DEPTH} deep")
    if isinstance(gate, Threshold):
        yield gate
    parts = (gate.gate,) if isinstance(gate, Not) else gate.gates if isinstance(gate, (AllOf, AnyOf)) else ()
    if len(parts) > TESTS:
        raise _too_much(f"a gate of it has {len(parts)} parts, {TESTS} at most")
    for part in parts:
        yield from _tests(part, depth + 1)


def _nesting(header: bytes) -> int:
    """How deep the header's own JSON is, and that of the text in it that says what the edits are."""
    try:
        parsed = json.loads(header)
        inside = parsed.get("__metadata__", {}).get("trimtab", "") if isinstance(parsed, dict) else ""
    except (ValueError, RecursionError, AttributeError):
        return 0  # who reads the file says so
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
    return Refusal(400, f"a steering that is brought here is bounded: {what}", code="too_large")
