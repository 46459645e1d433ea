"""A batch of requests, each with its own steering, compiled into banks of parameters that hooks index by state.

At each token a request is in one *state*, which stands for its steering and for the set of the steering's position
rules that apply at the token. State 0 means "nothing". For each of its stages, a site has a bank with one row of
parameters per state; a forward pass has one state per token. So the cost of a site's hook doesn't depend on how many
different steerings are in the batch.

Consecutive edits of a request at a site that act together (`TOGETHER`: additions add up, projections are solved
jointly) are merged in advance into one row, from those that are active in the state. At a site that only adds, the rows
of inactive states are *negative* zeros: `x + -0.0` is `x` bit for bit, for every `x`. At a site that only scales, they
are ones (`NEUTRAL`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.engines.folding import Stage, active_ranges, check_joint_edits, slots_at, stages_of
from trimtab.engines.meanings import NOTHING, ActiveMeanings, meanings_of, possible_subsets
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import place
from trimtab.engines.transformers.positions import Segments
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Positions, ScoreOperation, Site, Steering
from trimtab.steering.operations import Operation


@dataclass(frozen=True)
class Plan:
    """The states of each request's tokens, and the stages of each site.

    `segments[r]` are the `(start, stop, state)` of request r in order; gaps between them are in state 0. If the request
    has positions by meaning, they apply to its prompt, and `turning[r]` has the segments for a generated token by the
    meanings that hold for it.
    """

    segments: tuple[Segments, ...]
    stages: dict[Site, tuple[Stage, ...]]
    effective_states: dict[Site, frozenset[int]]  # site -> the states in which it has an effect
    segments_by_meanings: tuple[Mapping[ActiveMeanings, Segments] | None, ...] = ()

    @property
    def uses_meanings(self) -> bool:
        """Whether a request has positions by meaning, so that its generated tokens must be known."""
        return any(self.segments_by_meanings)

    @property
    def count(self) -> int:
        """The number of states, including state 0."""
        every = [
            *self.segments,
            *(segments for turns in self.segments_by_meanings if turns for segments in turns.values()),
        ]
        return 1 + max((state for segments in every for _, _, state in segments), default=0)

    def at(self, request: int, holding: ActiveMeanings) -> Segments:
        """A request's segments for a generated token for which these meanings hold."""
        turning = self.segments_by_meanings[request] if self.segments_by_meanings else None
        return self.segments[request] if turning is None else turning[holding]


def check_edits(steering: Steering, layout: Layout) -> None:
    """Raise `TrimtabError` unless the sites of all edits and gates fit the model."""
    for edit in steering.edits:
        scores = isinstance(edit.operation, ScoreOperation)  # checked in `scores`, with the model's attention
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
            if site == edit.site and not scores and edit.operation.width not in (0, size):
                where = "" if site.kind == "residual" else f" at {site}"
                raise TrimtabError(f"the steering's width{where} is {edit.operation.width}, this model's is {size}")
    check_joint_edits(steering)


def compile_plan(requests: Sequence[tuple[Edit, ...]], prompt_lengths: Sequence[int], dtype: torch.dtype) -> Plan:
    """Compile the plan for these requests' effective edits and prompt lengths (in tokens), in the model's dtype.

    Raises:
        TrimtabError: A span reaches past the end of its prompt.
    """
    states: dict[tuple[int, frozenset[Positions]], int] = {}
    programs: dict[tuple[Edit, ...], int] = {}

    def segments_of(edits: tuple[Edit, ...], length: int, holding: ActiveMeanings) -> Segments:
        program = programs.setdefault(edits, len(programs))
        swept = active_ranges(edits, length, holding)
        return tuple((a, b, states.setdefault((program, active), len(states) + 1)) for a, b, active in swept)

    segments: list[Segments] = []
    turning: list[Mapping[ActiveMeanings, Segments] | None] = []
    for edits, length in zip(requests, prompt_lengths, strict=True):
        meanings = meanings_of(edits)
        segments.append(segments_of(edits, length, NOTHING))
        turning.append({h: segments_of(edits, length, h) for h in possible_subsets(meanings)} if meanings else None)
    stages: dict[Site, tuple[Stage, ...]] = {}
    touches: dict[Site, frozenset[int]] = {}
    programs_in_order = list(programs)
    acting: dict[int, dict[Site, list[Edit]]] = {}
    for (program, rules), state in states.items():
        by_site = acting[state] = {}
        for edit in programs_in_order[program]:
            if edit.positions in rules:
                by_site.setdefault(edit.site, []).append(edit)
    for site in sorted({edit.site for edits in programs for edit in edits}):
        slots = {state: slots_at(tuple(here.get(site, ())), site) for state, here in acting.items()}
        stages[site] = tuple(stages_of(slots, dtype))
        touches[site] = frozenset(
            state for stage in stages[site] for state in stage.active.nonzero().flatten().tolist()
        )
    return Plan(tuple(segments), stages, touches, tuple(turning))


def activity(plan: Plan) -> Tensor:
    """`[sites, states]`: whether a site has an effect in a state."""
    table = torch.zeros(len(plan.stages), plan.count, dtype=torch.bool)
    for row, site in enumerate(sorted(plan.stages)):
        table[row, list(plan.effective_states[site])] = True
    return table
