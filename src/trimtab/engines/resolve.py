"""From steerings to the edits that act on each request, once everything that depends on its prompt is known.

Three things depend on the prompt: gates, whose conditions read its activations; operations that are computed from it,
such as a mask of the neurons that were large in it; and positions, which engines resolve themselves. Prompts are read
unsteered. The same computation decides a batch with one gated request and a batch in which all are gated: reading a
prompt doesn't depend on its neighbors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trimtab.engines.contract import TOKENS_PER_BATCH
from trimtab.steering import Edit, Site, Steering
from trimtab.steering.conditional import with_conditional_operation
from trimtab.steering.gates import NEVER, Reading

TOKENS_TO_DECIDE = 1024
"""The number of tokens read together for operations that are computed from prompts.

It is small because the activations of all tokens at all of their sites are kept, and there are many neurons.
"""

PositionsByRequest = Mapping[int, Sequence[int]]
"""Request numbers, with the prompt positions to read for each, in order."""
ReadActivations = Callable[[PositionsByRequest, Sequence[Site], int], Mapping[int, Mapping[Site, Tensor]]]
"""`read(where, sites, tokens)`: the unsteered activations `[positions, width]` of prompts, by request and site.

`tokens` is how many may be read together, if the reader has a choice.
"""


@dataclass(frozen=True)
class Resolved:
    """What acts on each request: its `edits` as an engine runs them, and their `names` in an answer."""

    edits: list[tuple[Edit, ...]]
    names: list[tuple[str, ...]]


def resolve(steerings: Sequence[Steering | None], lengths: Sequence[int], read: ReadActivations) -> Resolved:
    """Decide the gates of requests with prompts of these lengths, then the operations that depend on the prompts.

    Edits with strength 0 or a shut gate are removed. A condition on each token is part of its edit's operation. `read`
    isn't called if there is nothing to decide.
    """
    wanted_readings = [gate_readings(steering) for steering in steerings]
    where = {i: positions_read(readings, lengths[i]) for i, readings in enumerate(wanted_readings) if readings}
    sites = sorted({reading.site for readings in wanted_readings for reading in readings})
    activations = read(where, sites, TOKENS_PER_BATCH) if where else {}
    open_edits = []
    for i, steering in enumerate(steerings):
        readings = pool_readings(wanted_readings[i], lengths[i], where[i], activations[i]) if i in where else {}
        open_edits.append(_apply_gates(steering, readings))
    names = [tuple(str(edit) for edit in edits) for edits in open_edits]
    settled = _resolve_operations(open_edits, lengths, read)
    return Resolved([tuple(with_conditional_operation(edit) for edit in edits) for edits in settled], names)


def active_edits(steering: Steering | None) -> tuple[Edit, ...]:
    """The edits that act if their gates are open: all except those of strength 0."""
    return tuple(edit for edit in steering.edits if edit.strength != 0) if steering is not None else ()


def gate_readings(steering: Steering | None) -> frozenset[Reading]:
    """What a steering's gates read from a prompt."""
    return frozenset(reading for edit in active_edits(steering) for reading in edit.gate.readings)


def depends_on_prompt(edit: Edit) -> bool:
    """Whether the edit's operation depends on the request's prompt."""
    return hasattr(edit.operation, "settled")


def check_prompt(steering: Steering | None, length: int) -> None:
    """Raises `TrimtabError` if an edit or a gate refers to tokens that a prompt of this length doesn't have."""
    for edit in steering.edits if steering is not None else ():
        edit.positions.reach(length)
    for reading in gate_readings(steering):
        reading.tokens(length)


def positions_read(readings: Iterable[Reading], length: int) -> list[int]:
    """The positions of a prompt of this length that any of these readings reads, in order."""
    return sorted({p for reading in readings for p in reading.tokens(length)})


def pool_readings(
    readings: Iterable[Reading], length: int, positions: Sequence[int], values: Mapping[Site, Tensor]
) -> dict[Reading, Tensor]:
    """One prompt's readings, `[width]` each, from its activations `[positions, width]` at these positions."""
    row = {position: at for at, position in enumerate(positions)}
    return {r: r.pooled(values[r.site][[row[p] for p in r.tokens(length)]]) for r in readings}


def _apply_gates(steering: Steering | None, readings: Mapping[Reading, Tensor]) -> tuple[Edit, ...]:
    """The edits whose gates these readings don't shut; conditions to decide at each token stay in their gates."""
    decided = []
    for edit in active_edits(steering):
        left = edit.gate.settled(readings)
        if left != NEVER:
            decided.append(replace(edit, gate=left) if edit.gate.token_sites else edit)
    return tuple(decided)


def _resolve_operations(
    requests: list[tuple[Edit, ...]], lengths: Sequence[int], read: ReadActivations
) -> list[tuple[Edit, ...]]:
    """The edits, with the operations that depend on their prompts replaced by concrete ones."""
    sites = [sorted({edit.site for edit in edits if depends_on_prompt(edit)}) for edits in requests]
    where = {i: range(lengths[i]) for i, row_sites in enumerate(sites) if row_sites}
    if not where:
        return requests
    activations = read(where, sorted({site for row_sites in sites for site in row_sites}), TOKENS_TO_DECIDE)
    return [
        tuple(
            replace(edit, operation=edit.operation.settled(activations[i][edit.site]))
            if depends_on_prompt(edit)
            else edit
            for edit in edits
        )
        for i, edits in enumerate(requests)
    ]
