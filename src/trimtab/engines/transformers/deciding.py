"""Gates decided: what they read of the prompts, in batches, and the edits that are left.

Prompts are read unsteered, in passes that stop at the deepest site that a gate reads. A batch with one gated request,
and one in which all are, are decided by the same rows: a prompt's reading doesn't depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import place
from trimtab.engines.transformers.read import Text, read_groups
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site, Steering
from trimtab.steering.conditional import conditional
from trimtab.steering.gates import NEVER, AllOf, AnyOf, Gate, Not, Reading, Threshold

Read = Callable[[Sequence[int], Sequence[Site]], dict[int, dict[Site, Tensor]]]


def wanted(steering: Steering | None) -> frozenset[Reading]:
    """What a steering's gates read of a prompt."""
    edits = steering.edits if steering else ()
    return frozenset(reading for edit in edits if edit.strength for reading in edit.gate.readings)


def check_gates(steering: Steering, layout: Layout) -> None:
    """Raises `TrimtabError` unless every gate fits the model, and is about its edit's site where it must be."""
    for edit in steering.edits:
        for test in _tests(edit.gate):
            if test.site.kind == "scores":
                raise UnsupportedError("attention scores are steered, not read; a gate reads activations")
            size = place(layout, test.site).size
            if test.direction.shape[0] != size:
                raise TrimtabError(
                    f"a gate's width at {test.site} is {test.direction.shape[0]}, this model's is {size}"
                )
        for site in edit.gate.token_sites:
            if site != edit.site or site.kind == "scores":
                raise TrimtabError(
                    f"a condition on each token is about the activation that the edit finds: this one is about {site},"
                    f" its edit is at {edit.site}"
                )


def check_prompt(steering: Steering | None, length: int) -> None:
    """Raises `TrimtabError` when a gate reads where a prompt of this length has no token."""
    for reading in wanted(steering):
        reading.tokens(length)


def decided(steering: Steering | None, readings: dict[Reading, Tensor]) -> tuple[Edit, ...]:
    """The edits that act: of non-zero strength, and whose gate isn't shut by these readings.

    A condition on each token is left in the edit's gate, for `conditionals`.
    """
    if steering is None:
        return ()
    found = []
    for edit in steering.edits:
        if edit.strength == 0:
            continue
        left = edit.gate.settled(readings)
        if left != NEVER:
            found.append(replace(edit, gate=left) if edit.gate.token_sites else edit)
    return tuple(found)


def conditionals(requests: Iterable[tuple[Edit, ...]]) -> list[tuple[Edit, ...]]:
    """The requests' edits with what is decided at each token put into their operations."""
    return [tuple(conditional(edit) for edit in edits) for edits in requests]


def read_gates(
    layout: Layout, prompts: Sequence[Sequence[int]], asked: Sequence[frozenset[Reading]]
) -> list[dict[Reading, Tensor]]:
    """What each prompt's gates read, `[width]` each; prompts of no reading aren't run."""
    found: list[dict[Reading, Tensor]] = [{} for _ in prompts]
    numbers = [i for i, readings in enumerate(asked) if readings]
    if not numbers:
        return found
    where = [{r: r.tokens(len(prompts[i])) for r in sorted(asked[i], key=str)} for i in numbers]
    read = [sorted({p for tokens in one.values() for p in tokens}) for one in where]
    sites = sorted({reading.site for i in numbers for reading in asked[i]})
    groups = [[Text(prompts[i], positions)] for i, positions in zip(numbers, read, strict=True)]
    for batch in read_groups(layout, groups, sites):
        for n, g in enumerate(batch.groups):
            row = {p: at for at, p in enumerate(read[g])}
            for reading, tokens in where[g].items():
                x = batch.values[reading.site][n][0]
                found[numbers[g]][reading] = reading.pooled(x[[row[p] for p in tokens]])
    return found


def read_gates_with(
    read: Read, lengths: Sequence[int], asked: Sequence[frozenset[Reading]]
) -> list[dict[Reading, Tensor]]:
    """As `read_gates`, where `read(requests, sites)` gives whole prompts' activations `[tokens, width]`."""
    numbers = [i for i, readings in enumerate(asked) if readings]
    activations = read(numbers, sorted({r.site for i in numbers for r in asked[i]})) if numbers else {}
    return [
        {r: r.pooled(activations[i][r.site][r.tokens(lengths[i])]) for r in readings}
        for i, readings in enumerate(asked)
    ]


def _tests(gate: Gate) -> list[Threshold]:
    if isinstance(gate, Threshold):
        return [gate]
    parts = (gate.gate,) if isinstance(gate, Not) else gate.gates if isinstance(gate, (AllOf, AnyOf)) else ()
    return [test for part in parts for test in _tests(part)]
