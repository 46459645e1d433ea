"""What a worker holds: the steerings it was given, its requests' programs, the bank, and what the next pass does.

`expect` comes with each step that vLLM takes, `begin` before its forward pass, with the requests and the stretch of
tokens of each; the operator in the graph then calls `apply` after each block; `end` comes when the pass is done, and
compares what was done with what was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engines.folding import Slot, Stage, stages_of
from trimtab.engines.meanings import NOTHING, Holding
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.counting import CALL, MARK, GraphCounts, Receipt, fault
from trimtab.engines.vllm.program import Identified, Segment, State, next_border, runs
from trimtab.engines.vllm.step import Staged, Step, make_step
from trimtab.engines.vllm.turning import Turning, compile_turning
from trimtab.engines.vllm.wire import Reading, Wire, identified
from trimtab.errors import TrimtabError
from trimtab.steering import Steering


class Chunks(NamedTuple):
    """What a pass computes: of each of these requests, in this order, `counts` tokens from position `firsts` on."""

    requests: Sequence[str]
    firsts: Sequence[int]
    counts: Sequence[int]


class ReadRows(NamedTuple):
    """What one reading takes of a pass: these of its rows, which are tokens at these positions, in order."""

    reading: str
    rows: list[int]
    positions: list[int]
    at: Tensor


@dataclass(frozen=True)
class Program:
    """What a request wants done, and read."""

    segments: tuple[Segment, ...] = ()
    reading: Reading | None = None
    states: tuple[State, ...] = ()
    turning: Turning | None = None  # where what acts depends on what is generated

    @cached_property
    def layers(self) -> frozenset[int]:
        """The blocks behind which it needs the operator."""
        read = self.reading.layers if self.reading is not None else ()
        return frozenset(layer for state in self.states for layer in state.slots).union(read)


IDLE = Program()
NO_CHUNKS = Chunks((), (), ())
NOT_ASKED = f"{MARK}vLLM took a step in which the plugin wasn't asked to steer this request"


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
    readings: dict[str, dict[int, list[tuple[list[int], Tensor]]]] = field(default_factory=dict)
    fired: set[int] = field(default_factory=set)
    counts: GraphCounts | None = None
    tokenizer: Callable[[], Any] | None = None  # the model's, where it is needed

    _step: Step | None = None
    _reads: dict[int, list[ReadRows]] = field(default_factory=dict)
    _staged: Staged = field(default_factory=lambda: Staged({}, {}))
    _last: Sequence[str] = ()
    _lasts: int | None = None  # passes of one token each for which the step still holds; `None`: all
    _filled: bool = False
    _open: bool = False
    _seen: dict[int, int] = field(default_factory=dict)  # calls and tokens behind each block, as `CALL` says
    _due: Set[str] = frozenset()  # the requests with a program that vLLM's step is about
    _here: Mapping[str, frozenset[int]] = field(default_factory=dict)  # those that `begin` was told of, their blocks
    _needed: dict[int, int] = field(default_factory=dict)  # on how many rows each block acts or reads
    _pass: Chunks = NO_CHUNKS
    _next: dict[str, int] = field(default_factory=dict)  # where each request goes on, passes before the last counted
    _faults: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.static:
            self.counts = GraphCounts(self.layers, self.device)

    # ---- what the worker is told -------------------------------------------------------------------------

    def start(self, request: str, wire: Wire, ids: Sequence[int] | None = None) -> None:
        """A request arrives, with these tokens. Raises `TrimtabError` for what the worker wasn't given."""
        if request in self.programs:
            self.resume([request])
            return
        edits: list[Identified] = []
        for part in wire.parts:
            if part.digest not in self.steerings:
                raise TrimtabError(f"request {request} needs {part.digest[:12]}, which this worker wasn't given")
            edits += identified(part, self.steerings[part.digest])
        tables = compile_turning(edits, wire.prompt_length)
        segments, turning = tables[NOTHING], self._turning(tables, ids, wire.prompt_length)
        states = tuple({segment.state.key: segment.state for segment in segments}.values())
        if turning is not None:
            segments, states = turning.segments, turning.states
        for state in states:
            if state.banked:
                self.bank.take(state)
        self.programs[request] = Program(segments, wire.reading, states, turning)
        self._next.pop(request, None)
        if any(state.staged and state.key not in self._staged.numbers for state in states):
            self._stage(states)
        self._last = ()

    def sampled(self, requests: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        """The tokens that a pass has given these requests, none to those whose prompts aren't read yet."""
        for request, new in zip(requests, tokens, strict=True):
            program = self.programs.get(request, IDLE)
            if program.turning is None:
                continue
            turned = [program.turning.read(int(token)) for token in new]
            if any(turned):
                self.programs[request] = replace(program, segments=program.turning.segments)
                self._last = ()

    def _turning(
        self, tables: Mapping[Holding, tuple[Segment, ...]], ids: Sequence[int] | None, prompt_length: int
    ) -> Turning | None:
        if len(tables) == 1:
            return None
        if self.tokenizer is None or ids is None:
            raise TrimtabError("positions by meaning need the request's tokens, and this worker wasn't given them")
        return Turning.of(tables, self.tokenizer(), ids, prompt_length)

    def resume(self, requests: Iterable[str]) -> None:
        """These were preempted, and go on from wherever the cache now lets them."""
        for request in requests:
            self._fold()
            self._next.pop(request, None)

    def finish(self, requests: Iterable[str]) -> None:
        """These requests are done."""
        for request in requests:
            program = self.programs.pop(request, None)
            self._next.pop(request, None)
            for state in program.states if program else ():
                if state.banked:
                    self.bank.release(state)
            if program is not None:
                self._last = ()

    def take(self, reading: str) -> dict[int, Tensor]:
        """What was read, `{layer: [positions, width]}`, in the order of positions; it is forgotten here."""
        found = {}
        for layer, parts in self.readings.pop(reading, {}).items():
            every = torch.cat([rows for _, rows in parts])
            last = {p: i for i, p in enumerate(p for positions, _ in parts for p in positions)}  # of those read twice
            found[layer] = every[[last[p] for p in sorted(last)]]
        return found

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

    def expect(self, requests: Mapping[str, int]) -> None:
        """vLLM takes a step for these requests; `begin` must be told of the same."""
        self._due = self.programs.keys() & requests.keys()

    def begin(self, chunks: Chunks) -> None:
        """The next pass computes these stretches. Passes outside of `begin` and `end` are vLLM's own, to warm up."""
        self.fired.update(self._seen)
        self._open = True
        self._seen.clear()
        self._faults = {}
        if not self._goes_on(chunks):
            self._turn_to(chunks)
        self._pass = chunks
        self._check_known(chunks)
        if self.counts is not None and self._needed:
            self.counts.clear()

    def _turn_to(self, chunks: Chunks) -> None:
        """A pass that isn't like the last one."""
        self._fold()
        if self.programs:
            self._here = {r: self.programs[r].layers for r in chunks.requests if r in self.programs}
            self._check_order(chunks)
            self._step = self._step_for(chunks)
            self._reads = self._reads_in(chunks)
        else:
            self._here, self._step, self._reads, self._last = {}, None, {}, ()
        step = self._step
        self._needed = {layer: max(read.rows[-1] for read in reads) + 1 for layer, reads in self._reads.items()}
        if step is not None:
            for layer in {*step.adds, *step.staged.layers}:
                self._needed[layer] = max(step.high, self._needed.get(layer, 0))
        if self.static and (step is not None or self._filled):
            self.bank.fill(*((0, self.bank.index[:0]) if step is None else (step.low, step.index)))
            self._filled = step is not None

    def _fold(self) -> None:
        """Remember where the requests of the last pass go on."""
        for request, first, count in zip(*self._pass, strict=True):
            if request in self.programs:
                self._next[request] = first + count
        self._pass, self._last = NO_CHUNKS, ()

    def _check_known(self, chunks: Chunks) -> None:
        """Of requests whose steering goes by what is generated, all tokens of a pass must be known before it."""
        for request, first, count in zip(*chunks, strict=True):
            turning = self.programs.get(request, IDLE).turning
            if turning is not None and first + count > turning.known:
                self._faults[request] = (
                    f"{MARK}token {first + count - 1} of this request was computed before the plugin knew what it is;"
                    " start the engine with async_scheduling=False"
                )

    def _check_order(self, chunks: Chunks) -> None:
        """Tokens between this stretch of a request and its last one were computed, and nothing was said of them."""
        for request, first, _ in zip(*chunks, strict=True):
            if request in self._here and first > self._next.get(request, first):
                self._faults[request] = (
                    f"{MARK}tokens {self._next[request]} to {first - 1} of this request were computed in a step of"
                    " vLLM's that the plugin wasn't told of"
                )

    def _goes_on(self, chunks: Chunks) -> bool:
        """Whether the last step holds for this pass too: the same requests, each's next token, in the same states."""
        if not self._last or self._last != chunks.requests or max(chunks.counts) > 1:
            return False
        if list(chunks.firsts) != [first + 1 for first in self._pass.firsts]:
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

    def _reads_in(self, chunks: Chunks) -> dict[int, list[ReadRows]]:
        """What is read after each layer."""
        found: dict[int, list[ReadRows]] = {}
        offset = 0
        for request, first, count in zip(*chunks, strict=True):
            reading = self.programs.get(request, IDLE).reading
            if reading is not None:
                here = sorted({p for p in reading.positions if first <= p < first + count})
                if here:
                    rows = [offset + p - first for p in here]
                    one = ReadRows(reading.id, rows, here, torch.tensor(rows, device=self.device))
                    for layer in self.bank.rows.keys() & reading.layers:  # of a pipeline's stages each has some
                        found.setdefault(layer, []).append(one)
                self._last = ()
            offset += count
        return found

    def apply(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """After block `layer`, whose output is `hidden + residual`: `[tokens, width]` each."""
        self._seen[layer] = self._seen.get(layer, 0) + CALL + hidden.shape[0]
        if self.counts is not None:
            hidden.add_(self.bank.rows[layer].index_select(0, self.bank.index[: hidden.shape[0]]))
            self.counts.count(layer, hidden.shape[0])
            return
        if not self._open or hidden.shape[0] < self._needed.get(layer, 0):
            return  # outside of a pass, or a fault that `end` finds
        if self._step is not None:
            self._step.apply(self.bank, layer, hidden, residual)
        for read in self._reads.get(layer, ()):
            x = hidden.index_select(0, read.at)
            x = x if residual is None else x + residual.index_select(0, read.at)
            self.readings.setdefault(read.reading, {}).setdefault(layer, []).append((read.positions, x))

    def end(self) -> Receipt | None:
        """The pass is done: what is to be said of it, `None` where no request in it has a program.

        Its faults are of requests that weren't steered, or read, at exactly the tokens and blocks that the plan names.
        """
        self.fired.update(self._seen)
        opened, self._open = self._open, False
        due, self._due = self._due, frozenset()
        if not opened:
            if not due:
                return None
            self._last, self._pass = (), NO_CHUNKS
            return Receipt(len(due), dict.fromkeys(due, NOT_ASKED))
        faults = self._faults
        if not due <= self._here.keys():
            faults |= dict.fromkeys(due - self._here.keys(), NOT_ASKED)
        receipt = Receipt(max(len(due), len(self._here)), faults)
        if self.counts is None:
            faults.update(_miscounted(self._seen, self._needed, self._here))
        elif self._needed:
            read, receipt.ready = self.counts.copy()
            needed, here = self._needed, self._here
            receipt.late = lambda: _miscounted(read(), needed, here)
        return receipt if receipt.requests else None

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
        return sorted(set(self.layers) - self.fired - self._seen.keys())


def _miscounted(
    seen: Mapping[int, int], needed: Mapping[int, int], here: Mapping[str, frozenset[int]]
) -> dict[str, str]:
    """Of these requests those that need the operator behind a block where it didn't run as it was to."""
    faults: dict[str, str] = {}
    for layer, tokens in needed.items():
        wrong = fault(layer, seen.get(layer, 0), tokens)
        if wrong is not None:
            faults |= {request: wrong for request, layers in here.items() if layer in layers}
    return faults


def _moved(stage: Stage, device: torch.device) -> Stage:
    rows = {name: bank.to(device) for name, bank in stage.rows.items()}
    return replace(stage, rows=rows, active=stage.active.to(device))
