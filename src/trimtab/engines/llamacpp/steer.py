"""Which vectors act on which tokens: a steering's additions as llama.cpp control vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from trimtab.engines.llamacpp.context import Vectors
from trimtab.engines.meanings import NOTHING as NO_MEANING
from trimtab.engines.meanings import Follower, FollowerState, follower
from trimtab.engines.resolve import active_edits
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Add, Always, Edit, Steering
from trimtab.steering.intervals import Intervals

NO_VECTORS: Vectors = {}


def check_additions(steering: Steering, layers: int, width: int) -> None:
    """Raises `UnsupportedError` for edits that a control vector can't express, `TrimtabError` for ones that don't fit.

    A control vector adds directions to the residual stream after any block except the first, at any positions, without
    a gate.
    """
    for edit in active_edits(steering):
        if not isinstance(edit.operation, Add) or edit.operation.keep_norm:
            raise UnsupportedError(f"llama.cpp can only add directions, and this steering has {edit}")
        if edit.site.kind != "residual":
            raise UnsupportedError(f"llama.cpp steers the residual stream only, and this steering has {edit}")
        if not isinstance(edit.gate, Always):
            raise UnsupportedError(f"the llamacpp engine has no gates, and this steering has one: {edit}")
        if edit.site.layer == 0:
            raise UnsupportedError(f"llama.cpp can't steer block 0, and this steering has {edit}")
        if edit.site.layer >= layers:
            raise TrimtabError(f"{edit} is for block {edit.site.layer}, and this model's blocks are 0 to {layers - 1}")
        if edit.operation.width != width:
            raise TrimtabError(f"{edit} has width {edit.operation.width}, and this model has {width}")


@dataclass(frozen=True)
class Schedule:
    """The edits of one request, and the intervals of token positions at which each acts.

    If some edits depend on the generated text, `text` tracks it, and each generated token must be passed to `advance`
    before it is run.
    """

    edits: tuple[Edit, ...]
    intervals: tuple[Intervals, ...]
    prompt_length: int
    text: Follower | None = None
    _read: list[tuple[FollowerState, tuple[int, ...]]] = field(default_factory=list, compare=False)  # generated tokens

    @classmethod
    def of(cls, steering: Steering | None, prompt: Sequence[int], tokenizer: Any) -> Schedule:
        """The schedule of a steering for a prompt. Raises `TrimtabError` for positions that the prompt doesn't have."""
        edits, length = active_edits(steering), len(prompt)
        intervals = tuple(edit.positions.resolve(length, NO_MEANING) for edit in edits)
        return cls(edits, intervals, length, follower(tokenizer, edits, prompt))

    def advance(self, tokens: Iterable[int]) -> None:
        """Take the next generated tokens into account."""
        if self.text is None:
            return
        for token in tokens:
            position = self.prompt_length + len(self._read)
            followed = self.text.after(self._read[-1][0] if self._read else self.text.start, token)
            spans = [edit.positions.resolve(self.prompt_length, followed.holding) for edit in self.edits]
            self._read.append((followed, _within(spans, position)))

    def edits_at(self, position: int) -> tuple[int, ...]:
        """The indices of the edits that act at this token."""
        if self.text is not None and position >= self.prompt_length:
            return self._read[position - self.prompt_length][1]
        return _within(self.intervals, position)

    def edit_ranges(self, length: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Split a text of `length` tokens into ranges `(start, stop, edits)`, each with the same edits throughout."""
        edges = {0, length}
        for spans in self.intervals:
            for start, stop in spans:
                edges |= {start, *(() if stop is None else (stop,))}
        if self.text is not None:
            edges |= set(range(self.prompt_length, length))
        bounds = sorted(edge for edge in edges if 0 <= edge <= length)
        for start, stop in pairwise(bounds):
            yield start, stop, self.edits_at(start)

    def vectors(self, numbers: Sequence[int]) -> Vectors:
        """The sum of these edits at each block, in float32."""
        sums: dict[int, torch.Tensor] = {}
        for i in numbers:
            edit = self.edits[i]
            vector = edit.strength * edit.operation.direction.double()
            sums[edit.site.layer] = sums[edit.site.layer] + vector if edit.site.layer in sums else vector
        return {block: vector.float().numpy() for block, vector in sums.items()} or NO_VECTORS

    def layers(self) -> tuple[int, ...]:
        """The blocks at which any edit acts."""
        return tuple(sorted({edit.site.layer for edit in self.edits}))


def _within(intervals: Sequence[Intervals], position: int) -> tuple[int, ...]:
    """The indices of the interval sets that contain this position."""
    return tuple(
        i
        for i, spans in enumerate(intervals)
        if any(start <= position and (stop is None or position < stop) for start, stop in spans)
    )


def check_counts(steered: Mapping[int, int], schedule: Schedule, length: int) -> None:
    """Raises `TrimtabError` unless each block was steered at exactly as many of a text's `length` tokens as planned."""
    expected: Counter[int] = Counter()
    for start, stop, numbers in schedule.edit_ranges(length):
        expected.update(dict.fromkeys({schedule.edits[i].site.layer for i in numbers}, stop - start))
    for block in sorted({*expected, *steered}):
        actual, wanted = steered.get(block, 0), expected[block]
        if actual != wanted:
            raise TrimtabError(
                f"block {block} should have been steered at {wanted} tokens, and was steered at {actual}"
            )


def doses(activations: dict[int, np.ndarray], schedule: Schedule) -> dict[int, tuple[float, int]]:
    """At each block, the mean `‖edit‖ / ‖activation‖` over the steered tokens of a prompt, and their number.

    `activations` are the steered activations `[tokens, width]` of the prompt.
    """
    by_block = {}
    for block, values in activations.items():
        ratios = []
        for position, x in enumerate(values):
            vector = schedule.vectors(schedule.edits_at(position)).get(block)
            if vector is not None and (norm := float(np.linalg.norm(x - vector))) > 0:
                ratios.append(float(np.linalg.norm(vector)) / norm)
        if ratios:
            by_block[block] = (sum(ratios) / len(ratios), len(ratios))
    return by_block
