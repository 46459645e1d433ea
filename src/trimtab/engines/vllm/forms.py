"""Edits in the one form that captured graphs can run: a low-rank map with bounds, a scale, a vector, a norm and a gate.

A form is `x' = factor * x + clamp(x Aᵀ + c + |x| n, low, high) B + vector`, rescaled toward the norm of x by a share,
and only where a condition on x holds. Consecutive edits fold into one form as long as none reads what another has
clamped: any number of projections, additions, scales and maps. Forms are computed once per state, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.folding import Slot, kernel_call
from trimtab.engines.vllm.capacity import ADDITIONS, Capacity, union
from trimtab.engines.vllm.program import State
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Operation, Site, Steering
from trimtab.steering.conditional import Conditional
from trimtab.steering.elements import scale
from trimtab.steering.gates import ALWAYS, AllOf, AnyOf, Gate, Not, Threshold
from trimtab.steering.keys import scale_by_scalar
from trimtab.steering.operations import Kernel, add
from trimtab.steering.projections import Rows, set_projections
from trimtab.steering.read_write import read_write
from trimtab.steering.scaled import by_norm, opposed

BLIND = 1e-7
"""Below this cosine between what one edit reads and another writes, the first counts as not reading the second."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Holds where `x . direction > threshold`.

    With `by_norm`, the threshold is in norms of x; with `absolute`, the absolute value of the projection counts;
    `negated` inverts the condition.
    """

    direction: Tensor
    threshold: float
    by_norm: bool = False
    absolute: bool = False
    negated: bool = False


@dataclass(frozen=True, eq=False)
class Form:
    """One form, in float64 and on the CPU.

    `read` and `write` are `[rank, width]`, the numbers that belong to their rows `[rank]`, `factor` and `vector`
    `[width]`. A `factor` or `vector` of `None` has no effect. A form that only scales all elements by the same factor
    has width 1.
    """

    read: Tensor
    write: Tensor
    bias: Tensor
    per_norm: Tensor
    low: Tensor
    high: Tensor
    factor: Tensor | None = None
    vector: Tensor | None = None
    keep_norm: float = 0.0
    gate: Condition | None = None

    @property
    def linear(self) -> Tensor:
        """Which rows are neither clamped nor measured in norms: booleans `[rank]`."""
        return self.low.isneginf() & self.high.isposinf() & (self.per_norm == 0)

    @property
    def needs(self) -> Capacity:
        """The smallest capacity that can run the form, leaving its layer aside."""
        return Capacity(
            rank=max(len(self.read), int(self.factor is None)),
            scales=self.factor is not None,
            norms=bool(self.keep_norm) or bool(self.per_norm.any()) or bool(self.gate and self.gate.by_norm),
            gates=self.gate is not None,
        )


def forms_of(slots: Sequence[Slot]) -> tuple[Form, ...]:
    """The forms of these slots at one layer, folded into as few as possible.

    Raises:
        UnsupportedError: A slot has no such form.
    """
    forms: list[Form] = []
    for slot in slots:
        form = _form_of(slot)
        folded = _folded(forms[-1], form) if forms else None
        if folded is None:
            forms.append(form)
        else:
            forms[-1] = folded
    return tuple(forms)


@lru_cache(maxsize=512)
def state_forms(state: State) -> dict[Site, tuple[Form, ...]]:
    """A state's forms, at the sites where it does more than add. Cached by the state's key."""
    return _forms(state)


def _forms(state: State) -> dict[Site, tuple[Form, ...]]:
    return {site: forms_of(slots) for site, slots in state.staged.items()}


def needed(state: State) -> Capacity:
    """The smallest capacity that a state fits in. Raises `UnsupportedError` if it fits in none."""
    capacity = ADDITIONS
    for site, forms in _forms(state).items():
        here = replace(union(form.needs for form in forms), steps=len(forms), layers=(site.layer,))
        capacity = capacity | here
    return capacity


def capacity_for(steering: Steering) -> Capacity:
    """The smallest capacity that all of a steering's edits fit in together; `ADDITIONS` if they fit in none."""
    try:
        return needed(State("", tuple(edit for edit in steering.edits if _could_fit(edit))))
    except TrimtabError:
        return ADDITIONS


def _could_fit(edit: Edit) -> bool:
    return isinstance(edit.operation, Operation) and not hasattr(edit.operation, "settled")


def check_fits(state: State, capacity: Capacity) -> None:
    """Raises `UnsupportedError`, with reasons, for a state that exceeds the capacity of the captured graphs."""
    _check(state, state_forms(state), capacity)


def check_edit(edit: Edit, capacity: Capacity) -> None:
    """The same as `check_fits`, for a single edit."""
    alone = State("", (edit,))
    _check(alone, _forms(alone), capacity)


def _check(state: State, by_site: Mapping[Site, Sequence[Form]], capacity: Capacity) -> None:
    for site, forms in by_site.items():
        wanted = union(form.needs for form in forms)
        what = " + ".join(str(edit) for slot in state.staged[site] for edit in slot)
        lacks = {name: f"{word} (TRIMTAB_KERNEL=all)" for name, word in _LACKING.items() if getattr(wanted, name)}
        reasons = [word for name, word in lacks.items() if not getattr(capacity, name)]
        if not capacity.at(site.layer):
            where = "additions after blocks" if not capacity.maps else f"additions at layer {site.layer}"
            reasons = [f"more than {where} (TRIMTAB_KERNEL, TRIMTAB_LAYERS)"]
        elif wanted.rank > capacity.rank:
            reasons.append(f"rank {wanted.rank}, more than {capacity.rank} (TRIMTAB_RANK)")
        if len(forms) > capacity.steps and capacity.at(site.layer):
            reasons.append(f"{len(forms)} steps that don't fold, more than {capacity.steps} (TRIMTAB_STEPS)")
        if reasons:
            raise UnsupportedError(
                f"{what}: this engine replays captured graphs, and this needs {', '.join(reasons)}. Change the settings"
                " in parentheses and start it again, or start it with enforce_eager=True"
            )


_LACKING = {"scales": "scaled elements", "norms": "norms", "gates": "conditions on each token"}


# ---- one slot ------------------------------------------------------------------------------------------------


def _form_of(slot: Slot) -> Form:
    operation = slot[0].operation
    if not isinstance(operation, Conditional):
        kernel, rows = kernel_call(slot)
        return replace(_make_form(kernel, rows, slot), keep_norm=float(operation.keep_norm))
    inner = (replace(slot[0], operation=operation.operation, gate=ALWAYS),)
    return replace(_form_of(inner), gate=condition_of(operation.gate))


def _make_form(kernel: Kernel, rows: Rows, slot: Slot) -> Form:
    maker = MAKERS.get(kernel)
    if maker is None:
        raise UnsupportedError(
            f"{slot[0]}: this engine replays captured graphs, which support only additions, projections, ablations,"
            " scales, maps of low rank and additions in norms; start it with enforce_eager=True, or with"
            " compilation_config={'cudagraph_mode': 'NONE'}"
        )
    made = maker({name: value.double() if isinstance(value, Tensor) else value for name, value in rows.items()})
    for value in (made.read, made.write, made.bias, made.factor, made.vector):
        if value is not None and not bool(value.float().isfinite().all()):
            raise TrimtabError(f"{slot[0]}: it has numbers that float32 can't hold; lower the strength")
    return made


def _rows(read: Tensor, write: Tensor, **fields: Any) -> Form:
    """A form with these rows, and neutral values for all other fields that aren't given."""
    zeros = read.new_zeros(len(read))
    nothing = {"bias": zeros, "per_norm": zeros, "low": zeros - math.inf, "high": zeros + math.inf}
    return Form(read, write, **{**nothing, **fields})


def _none(width: int) -> Tensor:
    return torch.zeros(0, width, dtype=torch.float64)


def _added(rows: Rows) -> Form:
    vector = rows["vector"]
    return _rows(_none(len(vector)), _none(len(vector)), vector=vector)


def _scaled(rows: Rows) -> Form:
    factor = rows["factor"]
    return _rows(_none(len(factor)), _none(len(factor)), factor=factor)


def _projected(rows: Rows) -> Form:
    """`max(target - x.u, floor) w` for each direction."""
    count = sum(name.startswith("direction.") for name in rows)
    read = -torch.stack([rows[f"direction.{i}"] for i in range(count)])
    floor = [float(rows[f"floor.{i}"]) if f"floor.{i}" in rows else -math.inf for i in range(count)]
    return _rows(
        read,
        torch.stack([rows[f"weight.{i}"] for i in range(count)]),
        bias=torch.cat([rows[f"target.{i}"] for i in range(count)]),
        low=read.new_tensor(floor),
    )


def _mapped(rows: Rows) -> Form:
    low_rank_map = rows["map"]
    bounds = {name: value.double() for name in ("low", "high") if (value := getattr(low_rank_map, name)) is not None}
    return _rows(
        low_rank_map.read.double(),
        low_rank_map.write.double() * rows["strength"],
        bias=low_rank_map.bias.double(),
        **bounds,
    )


def _in_norms(rows: Rows) -> Form:
    vector = rows["vector"][None]
    return _rows(torch.zeros_like(vector), vector, per_norm=vector.new_ones(1))


def _against(rows: Rows) -> Form:
    """`(|x| + max(0, -x.direction)) vector`"""
    vector, direction = rows["vector"][None], rows["direction"][None]
    return _rows(
        torch.cat([torch.zeros_like(vector), -direction]),
        torch.cat([vector, vector]),
        per_norm=vector.new_tensor([1.0, 0.0]),
        low=vector.new_tensor([-math.inf, 0.0]),
    )


MAKERS: dict[Kernel, Callable[[Rows], Form]] = {
    add: _added,
    scale: _scaled,
    scale_by_scalar: _scaled,
    set_projections: _projected,
    read_write: _mapped,
    by_norm: _in_norms,
    opposed: _against,
}
"""How to make a form of a kernel's parameters; kernels that aren't listed have none."""


def condition_of(gate: Gate) -> Condition:
    """A gate that is decided at each token, as a condition.

    Raises:
        UnsupportedError: The gate combines several conditions, or measures something other than a projection or a
            projection relative to the norm.
    """
    if isinstance(gate, Not):
        inner = condition_of(gate.gate)
        return replace(inner, negated=not inner.negated)
    if isinstance(gate, (AllOf, AnyOf)):
        parts = [part for part in gate.gates if part != ALWAYS]
        if len(parts) == 1:
            return condition_of(parts[0])
    if not isinstance(gate, Threshold) or gate.measure == "cast":
        raise UnsupportedError(
            f"{gate}: this engine replays captured graphs, in which a condition on each token is one threshold of a"
            " projection, cosine, ratio or probability; start it with enforce_eager=True"
        )
    direction, threshold = gate.direction.double(), gate.threshold
    if gate.measure == "probability":  # sigmoid(x.v + bias) > p where x.v > logit(p) - bias
        inside = 0 < threshold < 1
        threshold = math.log(threshold / (1 - threshold)) - gate.bias if inside else math.copysign(math.inf, threshold)
    if gate.measure in ("cosine", "ratio"):
        direction = direction / direction.norm().clamp_min(1e-300)
    return Condition(direction, threshold, gate.measure in ("cosine", "ratio"), gate.measure == "ratio")


# ---- two forms as one ----------------------------------------------------------------------------------------


def _folded(first: Form, other: Form) -> Form | None:
    """`other` after `first`, folded into one form; `None` if that isn't possible.

    With y = f x + z B + v, what `other` reads is `A y = (A f) x + (A Bᵀ) z + A v`, in which every z that isn't clamped
    is itself read from x.
    """
    if first.keep_norm or first.gate or other.keep_norm or other.gate or bool(other.per_norm.any()):
        return None
    width = max(first.read.shape[1], other.read.shape[1])
    first, other = _as_wide(first, width), _as_wide(other, width)
    coupling = other.read @ first.write.T
    sizes = other.read.norm(dim=-1)[:, None] * first.write.norm(dim=-1)
    linear = first.linear
    if bool((coupling.abs() > BLIND * sizes)[:, ~linear].any()):
        return None
    coupling = coupling[:, linear]
    read, bias = other.read, other.bias
    if first.factor is not None:
        read = read * first.factor
    if first.vector is not None:
        bias = bias + other.read @ first.vector
    read, bias = read + coupling @ first.read[linear], bias + coupling @ first.bias[linear]
    factor, write, vector = first.factor, first.write, first.vector
    if other.factor is not None:
        factor = other.factor if factor is None else factor * other.factor
        write = write * other.factor
        vector = None if vector is None else vector * other.factor
    if other.vector is not None:
        vector = other.vector if vector is None else vector + other.vector
    return Form(
        torch.cat([first.read, read]),
        torch.cat([write, other.write]),
        torch.cat([first.bias, bias]),
        torch.cat([first.per_norm, other.per_norm]),
        torch.cat([first.low, other.low]),
        torch.cat([first.high, other.high]),
        factor,
        vector,
    )


def _as_wide(form: Form, width: int) -> Form:
    """The form for activations of this width, if it applies to any width."""
    if form.read.shape[1] == width or form.factor is None:
        return form
    return replace(form, read=_none(width), write=_none(width), factor=form.factor.expand(width))
