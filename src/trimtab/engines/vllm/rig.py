"""What a worker holds: the steerings it was given, its requests' programs, the bank, and what the next pass does.

`begin` comes before a forward pass, with the requests and the stretch of tokens of each; the operator in the graph
then calls `apply` after each block; `end` comes when the pass is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.engines.folding import Slot, Stage, stages_of
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.program import Identified, Segment, State, compile_program, next_border, runs
from trimtab.engines.vllm.step import Staged, Step, make_step
from trimtab.engines.vllm.wire import Reading, Wire, identified
from trimtab.errors import TrimtabError
from trimtab.steering import Steering


class Chunks(NamedTuple):
    """What a pass computes: of each of these requests, in this order, `counts` tokens from position `firsts` on."""

    requests: Sequence[str]
    firsts: Sequence[int]
    counts: Sequence[int]


@dataclass(frozen=True)
class Program:
    """What a request wants done, and read."""

    segments: tuple[Segment, ...] = ()
    reading: Reading | None = None
    states: tuple[State, ...] = ()


IDLE = Program()


@dataclass
class Rig:
    """The steering of one worker, for the blocks that it has.

    Where the device replays captured graphs (`static`), Python runs at capture alone: then rows are always gathered
    by the bank's index, and nothing but additions can be honoured.
    """

    layers: tuple[int, ...]
    width: int
    dtype: torch.dtype
    device: torch.device
    bank: Bank
    static: bool = False
    steerings: dict[str, Steering] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    readings: dict[str, dict[int, dict[int, Tensor]]] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)

    _step: Step | None = None
    _reads: dict[int, list[tuple[str, int, int]]] = field(default_factory=dict)
    _staged: Staged = field(default_factory=lambda: Staged({}, {}))
    _last: Sequence[str] = ()
    _lasts: int | None = None  # passes of one token each for which the step still holds; `None`: all
    _filled: bool = False
    _open: bool = False
    _seen: set[int] = field(default_factory=set)

    # ---- what the worker is told -------------------------------------------------------------------------

    def start(self, request: str, wire: Wire) -> None:
        """A request arrives. Raises `TrimtabError` for one that names what the worker wasn't given."""
        if request in self.programs:
            return  # it was preempted, and is resumed
        edits: list[Identified] = []
        for part in wire.parts:
            if part.digest not in self.steerings:
                raise TrimtabError(f"request {request} needs {part.digest[:12]}, which this worker wasn't given")
            edits += identified(part, self.steerings[part.digest])
        segments = compile_program(edits, wire.prompt_length)
        states = tuple({segment.state.key: segment.state for segment in segments}.values())
        for state in states:
            if state.banked:
                self.bank.take(state)
        self.programs[request] = Program(segments, wire.reading, states)
        if any(state.staged and state.key not in self._staged.numbers for state in states):
            self._stage(states)
        self._last = ()

    def finish(self, requests: Iterable[str]) -> None:
        """These requests are done."""
        for request in requests:
            program = self.programs.pop(request, None)
            for state in program.states if program else ():
                if state.banked:
                    self.bank.release(state)
            if program is not None:
                self._last = ()

    def take(self, reading: str) -> dict[int, Tensor]:
        """What was read, `{layer: [positions, width]}`, in the order of positions; it is forgotten here."""
        found = self.readings.pop(reading, {})
        return {layer: torch.stack([rows[p] for p in sorted(rows)]) for layer, rows in found.items()}

    def _stage(self, states: Sequence[State]) -> None:
        """Compile what doesn't merely add anew, for the requests that are here and these states."""
        alive = [state for program in self.programs.values() for state in program.states] + list(states)
        staged = list({state.key: state for state in alive if state.staged}.values())
        numbers = {state.key: i for i, state in enumerate(staged, 1)}
        layers = {}
        for layer in self.layers:
            slots: dict[int, list[Slot]] = {numbers[state.key]: state.staged.get(layer, []) for state in staged}
            if any(slots.values()):
                stages = stages_of(slots, torch.promote_types(self.dtype, torch.float32))
                layers[layer] = [_moved(stage, self.device) for stage in stages]
        self._staged = Staged(numbers, layers)

    # ---- passes ------------------------------------------------------------------------------------------

    def begin(self, chunks: Chunks) -> None:
        """The next pass computes these stretches. Passes outside of `begin` and `end` are vLLM's own, to warm up."""
        self.fired |= self._seen
        self._open = True
        self._seen.clear()
        if not self.programs:
            self._step, self._reads, self._last = None, {}, ()
        elif self._goes_on(chunks):
            return
        else:
            self._step = self._step_for(chunks)
            self._reads = self._reads_in(chunks)
        if self.static and (self._step is not None or self._filled):
            self.bank.fill(*((0, self.bank.index[:0]) if self._step is None else (self._step.low, self._step.index)))
            self._filled = self._step is not None

    def _goes_on(self, chunks: Chunks) -> bool:
        """Whether the last step holds for this pass too: the same requests, a token each, in the same states."""
        if not self._last or self._last != chunks.requests or max(chunks.counts) > 1:
            return False
        if self._lasts is not None:
            self._lasts -= 1
        return self._lasts is None or self._lasts >= 0

    def _step_for(self, chunks: Chunks) -> Step | None:
        found: list[tuple[int, State | None]] = []
        lasts: int | None = None
        for request, first, count in zip(*chunks, strict=True):
            segments = self.programs.get(request, IDLE).segments
            found += runs(segments, first, count)
            border = next_border(segments, first + 1)
            if border is not None:
                lasts = border - first - 1 if lasts is None else min(lasts, border - first - 1)
        self._last = list(chunks.requests) if max(chunks.counts) == 1 else ()
        self._lasts = lasts
        return make_step(found, self.bank, self._staged)

    def _reads_in(self, chunks: Chunks) -> dict[int, list[tuple[str, int, int]]]:
        """For each layer `(reading, row of the pass, position)`."""
        found: dict[int, list[tuple[str, int, int]]] = {}
        offset = 0
        for request, first, count in zip(*chunks, strict=True):
            reading = self.programs.get(request, IDLE).reading
            if reading is not None:
                here = [p for p in reading.positions if first <= p < first + count]
                for layer in reading.layers:
                    found.setdefault(layer, []).extend((reading.id, offset + p - first, p) for p in here)
                self._last = ()
            offset += count
        return {layer: reads for layer, reads in found.items() if reads}

    def apply(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """After block `layer`, whose output is `hidden + residual`: `[tokens, width]` each."""
        self._seen.add(layer)
        if self.static:
            hidden.add_(self.bank.rows[layer].index_select(0, self.bank.index[: hidden.shape[0]]))
            return
        if not self._open:
            return
        if self._step is not None:
            self._step.apply(self.bank, layer, hidden, residual)
        for reading, row, position in self._reads.get(layer, ()):
            x = hidden[row] if residual is None else hidden[row] + residual[row]
            self.readings.setdefault(reading, {}).setdefault(layer, {})[position] = x.clone()

    def end(self) -> None:
        """The pass is done. Raises `RuntimeError` where something was to be done and the graph didn't ask for it."""
        self.fired |= self._seen
        self._open = False
        if self.static:
            return
        wanted = set(self._reads) | (self._wanted() if self._step is not None else set())
        if missing := sorted(wanted & set(self.layers) - self._seen):
            raise RuntimeError(f"trimtab: the model's graph doesn't steer after block {missing[0]}; nothing was served")

    def _wanted(self) -> set[int]:
        assert self._step is not None
        return set(self._step.adds) | set(self._step.staged.layers)

    def describe(self) -> Mapping[str, int]:
        """How full it is."""
        return {
            "steerings": len(self.steerings),
            "requests": len(self.programs),
            "slots_used": self.bank.slots.used,
            "slots": self.bank.slots.capacity,
        }

    @property
    def unfired(self) -> list[int]:
        """The blocks behind which the graph has not called the operator yet."""
        return sorted(set(self.layers) - self.fired - self._seen)


def _moved(stage: Stage, device: torch.device) -> Stage:
    rows = {name: bank.to(device) for name, bank in stage.rows.items()}
    return replace(stage, rows=rows, active=stage.active.to(device))
