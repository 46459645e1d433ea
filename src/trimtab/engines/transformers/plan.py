"""A batch of requests, each with its own steering, compiled into banks of rows that a block indexes.

At any token a request is in one *state*: which steering it has, and which of that steering's position rules
hold there. State 0 is "nothing". Each layer keeps, for each of its stages, a bank with one row of parameters
a state; a forward pass carries one state a token. What a block does then doesn't depend on how many
different steerings the batch mixes.

Neighbours of a request at a layer that act together (`TOGETHER`: additions add up, projections are solved for) become
one row beforehand, from those that are active in the state. Where a layer only adds, the rows of inactive states are
*negative* zeros: `x + -0.0` is `x` to the bit, for every `x`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Positions, ScoreOperation, Steering
from trimtab.steering.operations import TOGETHER, Kernel, Operation, Rows, add

Slot = tuple[Edit, ...]  # one operation, or neighbours that act together


@dataclass(frozen=True)
class Stage:
    """One kernel call at one layer: `rows[name]` is `[states, size]`, `active` is `[states]`."""

    kernel: Kernel
    keep_norm: bool
    rows: dict[str, Tensor]
    active: Tensor

    @property
    def only_adds(self) -> bool:
        return self.kernel is add and not self.keep_norm


@dataclass(frozen=True)
class Plan:
    """`segments[r]` are request r's `(start, stop, state)`, in order, without gaps in state 0 filled in."""

    segments: tuple[tuple[tuple[int, int | None, int], ...], ...]
    stages: dict[int, tuple[Stage, ...]]
    touches: dict[int, frozenset[int]]  # layer -> the states in which it does something


def effective(steering: Steering | None, readings: dict | None = None) -> tuple[Edit, ...]:
    """The edits that do something: of non-zero strength, and whose gate is open for these readings."""
    if steering is None:
        return ()
    return tuple(edit for edit in steering.edits if edit.strength != 0 and edit.gate.is_open(readings or {}))


def check_edits(steering: Steering, layers: int, width: int) -> None:
    """Raises `TrimtabError` unless every edit fits a model with so many blocks of this width."""
    for edit in steering.edits:
        scores = isinstance(edit.operation, ScoreOperation)  # checked with the model's attention, see `scores`
        if not scores and not isinstance(edit.operation, Operation):
            raise UnsupportedError(f"the transformers engine can't run {type(edit.operation).__name__}")
        for site in (*(() if scores else (edit.site,)), *edit.gate.sites):
            if site.kind != "residual":
                raise UnsupportedError(f"the transformers engine has no site {site}")
            if site.layer >= layers:
                raise TrimtabError(f"the steering acts at layer {site.layer}; this model has layers 0 to {layers - 1}")
        if not isinstance(edit.operation, ScoreOperation) and edit.operation.width != width:
            raise TrimtabError(f"the steering's width is {edit.operation.width}, this model's is {width}")
    _check_together(steering)


def _check_together(steering: Steering) -> None:
    """Raises `TrimtabError` for edits that always act together and can't; what depends on a prompt comes later."""
    possible = tuple(e for e in steering.edits if e.strength != 0 and not isinstance(e.operation, ScoreOperation))
    for layer in sorted({edit.site.layer for edit in possible}):
        for slot in _slots(possible, layer):
            alike: dict[tuple, list[Edit]] = {}
            for edit in slot:
                alike.setdefault((edit.positions, edit.gate), []).append(edit)
            for edits in alike.values():
                if len(edits) > 1:
                    _row(edits)


def compile_plan(requests: Sequence[tuple[Edit, ...]], prompt_lengths: Sequence[int], dtype: torch.dtype) -> Plan:
    """The plan for these requests' effective edits and prompt lengths (in tokens), in the model's dtype.

    Raises `TrimtabError` when a span reaches past a prompt.
    """
    states: dict[tuple[int, frozenset[Positions]], int] = {}
    programs: dict[tuple[Edit, ...], int] = {}
    segments = []
    for edits, length in zip(requests, prompt_lengths, strict=True):
        program = programs.setdefault(edits, len(programs))
        found = []
        for start, stop, active in _sweep(edits, length):
            found.append((start, stop, states.setdefault((program, active), len(states) + 1)))
        segments.append(tuple(found))
    stages: dict[int, tuple[Stage, ...]] = {}
    touches: dict[int, frozenset[int]] = {}
    programs_in_order = list(programs)
    acting = {
        state: tuple(edit for edit in programs_in_order[program] if edit.positions in rules)
        for (program, rules), state in states.items()
    }
    for layer in sorted({edit.site.layer for edits in programs for edit in edits}):
        slots = {state: _slots(edits, layer) for state, edits in acting.items()}
        stages[layer] = tuple(_stages(slots, dtype))
        touches[layer] = frozenset(
            state for stage in stages[layer] for state in stage.active.nonzero().flatten().tolist()
        )
    return Plan(tuple(segments), stages, touches)


def _sweep(edits: tuple[Edit, ...], length: int) -> list[tuple[int, int | None, frozenset[Positions]]]:
    """The stretches of tokens over which the set of a request's active position rules stays the same."""
    resolved = {rule: rule.resolve(length) for rule in {edit.positions for edit in edits}}
    marks = {bound for spans in resolved.values() for span in spans for bound in span if bound is not None}
    borders: list[int | None] = [*sorted(marks), None]
    swept = []
    for start, stop in pairwise(borders):
        assert start is not None
        active = frozenset(
            rule for rule, spans in resolved.items() if any(a <= start and (b is None or start < b) for a, b in spans)
        )
        if active:
            swept.append((start, stop, active))
    return swept


def _slots(edits: tuple[Edit, ...], layer: int) -> list[Slot]:
    slots: list[Slot] = []
    for edit in edits:
        if edit.site.layer != layer:
            continue
        if slots and _acts_together(slots[-1][-1], edit):
            slots[-1] += (edit,)
        else:
            slots.append((edit,))
    return slots


def _acts_together(one: Edit, other: Edit) -> bool:
    a, b = one.operation, other.operation
    return a.kernel is b.kernel and a.kernel in TOGETHER and not (a.keep_norm or b.keep_norm)


def _row(edits: Sequence[Edit]) -> Rows:
    rows = [edit.operation.row(edit.strength) for edit in edits]
    together = TOGETHER.get(edits[0].operation.kernel)
    return rows[0] if together is None else together(rows, [str(edit) for edit in edits])


def _stages(slots: dict[int, list[Slot]], dtype: torch.dtype) -> list[Stage]:
    """Slot i of every state runs in step i; within a step, one stage a kernel."""
    found = []
    for step in range(max(map(len, slots.values()), default=0)):  # a rule may hold nowhere
        groups: dict[tuple[Kernel, bool], dict[int, Rows]] = {}
        for state, one in slots.items():
            if step < len(one):
                first = one[step][0].operation
                groups.setdefault((first.kernel, first.keep_norm), {})[state] = _row(one[step])
        for (kernel, keep_norm), rows_of in groups.items():
            found.append(_bank(kernel, keep_norm, rows_of, len(slots) + 1, dtype))
    return found


def _bank(kernel: Kernel, keep_norm: bool, rows_of: dict[int, Rows], count: int, dtype: torch.dtype) -> Stage:
    """What some rows have more than others (a second projection, say) is negative zero for these: it does nothing."""
    only_adds = kernel is add and not keep_norm
    compute = dtype if only_adds else torch.promote_types(dtype, torch.float32)
    sizes = {name: value.shape[0] for row in rows_of.values() for name, value in row.items()}
    rows = {name: torch.full((count, size), -0.0, dtype=compute) for name, size in sizes.items()}
    active = torch.zeros(count, dtype=torch.bool)
    for state, row in rows_of.items():
        active[state] = True
        for name, value in row.items():
            rows[name][state] = value.to(compute)
    return Stage(kernel, keep_norm, rows, active)
