"""A batch of requests, each with its own steering, compiled into banks of rows that a block indexes.

At any token a request is in one *state*: which steering it has, and which of that steering's position rules
hold there. State 0 is "nothing". Each site keeps, for each of its stages, a bank with one row of parameters
a state; a forward pass carries one state a token. What a site's hook does then doesn't depend on how many
different steerings the batch mixes.

Neighbours of a request at a site that act together (`TOGETHER`: additions add up, projections are solved for) become
one row beforehand, from those that are active in the state. Where a site only adds, the rows of inactive states are
*negative* zeros: `x + -0.0` is `x` to the bit, for every `x`; where it only scales, they are ones (`NEUTRAL`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import place
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Positions, ScoreOperation, Site, Steering
from trimtab.steering.operations import NEUTRAL, TOGETHER, Kernel, Operation, Rows, add

Slot = tuple[Edit, ...]  # one operation, or neighbours that act together


@dataclass(frozen=True)
class Stage:
    """One kernel call at one site: `rows[name]` is `[states, size]`, `active` is `[states]`."""

    kernel: Kernel
    keep_norm: bool
    rows: dict[str, Tensor]
    active: Tensor

    @property
    def only_adds(self) -> bool:
        return self.kernel is add and not self.keep_norm

    @property
    def in_place(self) -> bool:
        """Whether it is one addition or multiplication, with rows that do nothing where it is inactive."""
        return self.kernel in NEUTRAL and not self.keep_norm


@dataclass(frozen=True)
class Plan:
    """`segments[r]` are request r's `(start, stop, state)`, in order, without gaps in state 0 filled in."""

    segments: tuple[tuple[tuple[int, int | None, int], ...], ...]
    stages: dict[Site, tuple[Stage, ...]]
    touches: dict[Site, frozenset[int]]  # site -> the states in which it does something


def check_edits(steering: Steering, layout: Layout) -> None:
    """Raises `TrimtabError` unless every edit, and what every gate reads, fits the model."""
    for edit in steering.edits:
        scores = isinstance(edit.operation, ScoreOperation)  # checked with the model's attention, see `scores`
        if not scores and not isinstance(edit.operation, Operation):
            raise UnsupportedError(f"the transformers engine can't run {type(edit.operation).__name__}")
        for site in (*(() if scores else (edit.site,)), *edit.gate.sites):
            if site.kind == "scores":
                raise UnsupportedError("attention scores are steered, not read; a gate reads activations")
            if site.layer >= layout.layers:
                raise TrimtabError(
                    f"the steering acts at layer {site.layer}; this model has layers 0 to {layout.layers - 1}"
                )
            size = place(layout, site).size
            if site == edit.site and not scores and edit.operation.width != size:
                where = "" if site.kind == "residual" else f" at {site}"
                raise TrimtabError(f"the steering's width{where} is {edit.operation.width}, this model's is {size}")
    _check_together(steering)


def _check_together(steering: Steering) -> None:
    """Raises `TrimtabError` for edits that always act together and can't; what depends on a prompt comes later."""
    possible = tuple(e for e in steering.edits if e.strength != 0 and not isinstance(e.operation, ScoreOperation))
    possible = tuple(e for e in possible if not hasattr(e.operation, "settled"))
    for site in sorted({edit.site for edit in possible}):
        for slot in _slots(possible, site):
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
    stages: dict[Site, tuple[Stage, ...]] = {}
    touches: dict[Site, frozenset[int]] = {}
    programs_in_order = list(programs)
    acting = {
        state: tuple(edit for edit in programs_in_order[program] if edit.positions in rules)
        for (program, rules), state in states.items()
    }
    for site in sorted({edit.site for edits in programs for edit in edits}):
        slots = {state: _slots(edits, site) for state, edits in acting.items()}
        stages[site] = tuple(_stages(slots, dtype))
        touches[site] = frozenset(
            state for stage in stages[site] for state in stage.active.nonzero().flatten().tolist()
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


def _slots(edits: tuple[Edit, ...], site: Site) -> list[Slot]:
    slots: list[Slot] = []
    for edit in edits:
        if edit.site != site:
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
    nothing = NEUTRAL.get(kernel, -0.0)
    sizes = {name: value.shape[0] for row in rows_of.values() for name, value in row.items()}
    rows = {name: torch.full((count, size), nothing, dtype=compute) for name, size in sizes.items()}
    active = torch.zeros(count, dtype=torch.bool)
    for state, row in rows_of.items():
        active[state] = True
        for name, value in row.items():
            rows[name][state] = value.to(compute)
    return Stage(kernel, keep_norm, rows, active)
