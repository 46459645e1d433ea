"""An operation that acts only if a condition on the activation itself holds: the form of a gate with `each_token`.

It is never written by hand or saved. A steering's edit has the operation and the gate, and the engine replaces them
by this operation once the conditions on the prompt are decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trimtab.steering.gates import AllOf, AnyOf, Gate, Not, Threshold, measure_of, thresholds
from trimtab.steering.operations import MERGE_ROWS, Kernel, Operation, Rows, with_norm_of

Shape = tuple  # the structure of a gate: ("dot",), ("not", shape), ("all", shape, …) or ("any", shape, …)


class Conditional(Operation):
    """`x' = operation(x)` if `gate` is open for x; otherwise x, bit for bit."""

    def __init__(self, operation: Operation, gate: Gate) -> None:
        object.__setattr__(self, "operation", operation)
        object.__setattr__(self, "gate", gate)
        object.__setattr__(self, "keep_norm", False)  # the kernel rescales, where the gate is open

    operation: Operation
    gate: Gate

    @property
    def width(self) -> int:
        return self.operation.width

    @property
    def norm(self) -> float:
        return self.operation.norm

    @property
    def kernel(self) -> Kernel:
        return _kernel(self.operation.kernel, self.operation.keep_norm, _shape(self.gate))

    @property
    def settled(self) -> Callable[[Tensor], Conditional]:
        """The inner operation's `settled`, if the prompt decides it; raises `AttributeError` if the prompt doesn't."""
        inner: Any = self.operation
        settle = inner.settled
        return lambda prompt: Conditional(settle(prompt), self.gate)

    def row(self, strength: float) -> Rows:
        rows = dict(self.operation.row(strength))
        merge = MERGE_ROWS.get(self.operation.kernel)
        if merge is not None:
            rows = dict(merge([rows], [repr(self.operation)]))
        for i, test in enumerate(thresholds(self.gate)):
            rows[f"if.{i}.direction"] = test.direction
            rows[f"if.{i}.threshold"] = torch.tensor([test.threshold], dtype=torch.float64)
            rows[f"if.{i}.bias"] = torch.tensor([test.bias], dtype=torch.float64)
        return rows

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Conditional):
            return NotImplemented
        return (self.operation, self.gate) == (other.operation, other.gate)

    def __hash__(self) -> int:
        return hash((self.operation, self.gate))

    def __getstate__(self) -> dict[str, Any]:
        return {"operation": self.operation, "gate": self.gate, "keep_norm": self.keep_norm}

    def __repr__(self) -> str:
        return f"Conditional({self.operation!r}, {self.gate})"


def with_conditional_operation(edit: Any) -> Any:
    """The edit with its gate moved into its operation, if the gate is decided at each token; else the same edit."""
    return replace(edit, operation=Conditional(edit.operation, edit.gate)) if edit.gate.token_sites else edit


def without_conditional_operation(edit: Any) -> Any:
    """The edit as it was before `with_conditional_operation`."""
    inner = getattr(edit.operation, "operation", None)
    return edit if inner is None else replace(edit, operation=inner)


def _shape(gate: Gate) -> Shape:
    if isinstance(gate, Threshold):
        return (gate.measure,)
    if isinstance(gate, Not):
        return ("not", _shape(gate.gate))
    if isinstance(gate, (AllOf, AnyOf)):
        return ("all" if isinstance(gate, AllOf) else "any", *(_shape(part) for part in gate.gates))
    raise TypeError(f"{gate} isn't a condition on a token")


@cache
def _kernel(inner: Kernel, keep_norm: float, shape: Shape) -> Kernel:
    """One kernel for all gates of a shape, so that requests with such gates still run in one call."""

    def conditionally(x: Tensor, rows: Rows) -> Tensor:
        new = inner(x, {name: value for name, value in rows.items() if not name.startswith("if.")})
        if keep_norm:
            new = with_norm_of(x, new, keep_norm)
        return torch.where(_gate_mask(shape, x, rows, iter(range(len(rows))))[..., None], new, x)

    return conditionally


def _gate_mask(shape: Shape, x: Tensor, rows: Rows, numbers: Any) -> Tensor:
    kind, *parts = shape
    if kind == "not":
        return ~_gate_mask(parts[0], x, rows, numbers)
    if parts:
        answers = torch.stack([_gate_mask(part, x, rows, numbers) for part in parts])
        return answers.all(0) if kind == "all" else answers.any(0)
    i = next(numbers)
    value = measure_of(x, rows[f"if.{i}.direction"], kind, rows[f"if.{i}.bias"][..., 0])
    return value > rows[f"if.{i}.threshold"][..., 0]
