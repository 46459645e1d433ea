"""The state of a worker: the steerings that it has received, its requests' programs, the bank, and the next pass.

`expect` is called with each of vLLM's steps. `begin` is called before its forward pass, with the requests and the range
of tokens of each. The operator in the graph then calls `apply` at each site. `end` is called after the pass, and
compares what was done with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engines.folding import Slot, Stage, stages_of
from trimtab.engines.meanings import NOTHING, ActiveMeanings
from trimtab.engines.vllm.bank import Bank, IndexBuffer, to_device
from trimtab.engines.vllm.capacity import ADDITIONS, Capacity
from trimtab.engines.vllm.counting import CALL, FAILURE_PREFIX, GraphCounts, Receipt, count_fault
from trimtab.engines.vllm.doses import Doses
from trimtab.engines.vllm.forms import check_fits, state_forms
from trimtab.engines.vllm.maps import Maps
from trimtab.engines.vllm.program import IdentifiedEdit, Segment, State, next_border, state_runs
from trimtab.engines.vllm.segment_tracker import SegmentTracker, compile_turning
from trimtab.engines.vllm.shards import WHOLE, Shard
from trimtab.engines.vllm.step import Runs, Staged, Step, make_step, slots_of
from trimtab.engines.vllm.wire import Reading, Wire, identified_edits
from trimtab.errors import TrimtabError
from trimtab.steering import Site, Steering


class Chunks(NamedTuple):
    """What a pass computes: for each of these requests, in this order, `counts` tokens from position `firsts` on."""

    requests: Sequence[str]
    firsts: Sequence[int]
    counts: Sequence[int]


class ReadRows(NamedTuple):
    """What one reading takes from a pass: these rows, which are the tokens at these positions, in order."""

    reading: str
    rows: list[int]
    positions: list[int]
    at: Tensor


@dataclass(frozen=True)
class Program:
    """The plan for a request: what acts on it, and what is read."""

    segments: tuple[Segment, ...] = ()
    reading: Reading | None = None
    states: tuple[State, ...] = ()
    tracker: SegmentTracker | None = None  # if the steering depends on the generated text

    @cached_property
    def sites(self) -> frozenset[Site]:
        """The sites at which the request needs the operator."""
        read = self.reading.sites if self.reading is not None else ()
        return frozenset(site for state in self.states for site in state.slots).union(read)


IDLE = Program()
NO_CHUNKS = Chunks((), (), ())
NOT_CALLED = f"{FAILURE_PREFIX}vLLM took a step in which the plugin wasn't asked to steer this request"


@dataclass
class SteeringManager:
    """The steering of one worker, for the sites that it has, with the width of each one's activation.

    If the device replays captured graphs (`static`), Python only runs at capture. The operators at a site are then
    always the same: they read banks on the device, which are filled before each step, and they support what `capacity`
    says. Passes with more tokens than `captured` (`None`: no limit) run in Python, as on other engines.
    """

    sites: Mapping[Site, int]
    dtype: torch.dtype
    device: torch.device
    bank: Bank
    static: bool = False
    capacity: Capacity = ADDITIONS
    maps: Maps | None = None
    captured: int | None = None
    shard: Shard = WHOLE
    fused: Any = None  # a `Fused`, if the operators are one kernel
    steerings: dict[str, Steering] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    readings: dict[str, dict[Site, list[tuple[list[int], Tensor]]]] = field(default_factory=dict)
    fired: set[Site] = field(default_factory=set)
    counts: GraphCounts | None = None
    kept: dict[Site, Tensor] = field(default_factory=dict)  # activations that captured graphs keep, `[tokens, width]`
    tokenizer: Callable[[], Any] | None = None  # the model's, loaded when needed
    doses: Doses = field(default_factory=Doses)

    _step: Step | None = None
    _reads: dict[Site, list[ReadRows]] = field(default_factory=dict)
    _staged: Staged = field(default_factory=lambda: Staged({}, {}))
    _last_requests: Sequence[str] = ()
    _passes_left: int | None = None  # for how many one-token passes the step is still valid; `None`: all
    _adding: IndexBuffer | None = None  # the indices of captured graphs
    _mapping: IndexBuffer | None = None
    _replays: bool = False  # whether this pass replays captured graphs
    _open: bool = False
    _seen: dict[Site, int] = field(default_factory=dict)  # calls and tokens at each site, encoded as in `CALL`
    _expected: Set[str] = frozenset()  # the requests of vLLM's step that have a program
    # the same for `begin`, with their sites
    _sites_by_request: Mapping[str, frozenset[Site]] = field(default_factory=dict)
    _needed: dict[Site, int] = field(default_factory=dict)  # the number of rows on which each site acts or is read
    _pass: Chunks = NO_CHUNKS
    _next: dict[str, int] = field(default_factory=dict)  # each request's next position, not counting the last pass
    _faults: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbered: tuple[Site, ...] = tuple(self.sites)  # as the operator in the graph numbers them
        if not self.static:
            return
        self.counts = GraphCounts(self.sites, self.device)
        self._adding = IndexBuffer(self.bank.index)
        self._mapping = None if self.maps is None else IndexBuffer(self.maps.index)
        if self.capacity.reads:
            rows = len(self.bank.index) if self.captured is None else self.captured
            made: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
            self.kept = {site: torch.zeros(rows, width, **made) for site, width in self.sites.items()}

    # ---- requests ----------------------------------------------------------------------------------------

    def start(self, request: str, wire: Wire, ids: Sequence[int] | None = None) -> None:
        """Add a request, with its tokens. Raises `TrimtabError` if the worker doesn't have a steering that it needs."""
        if request in self.programs:
            self.resume([request])
            return
        edits: list[IdentifiedEdit] = []
        for part in wire.parts:
            if part.digest not in self.steerings:
                raise TrimtabError(
                    f"request {request} needs steering {part.digest[:12]}, which this worker didn't receive"
                )
            edits += identified_edits(part, self.steerings[part.digest])
        if self.shard.split:
            edits = [self.shard.of(edit) for edit in edits]
        tables = compile_turning(edits, wire.prompt_length)
        segments, tracker = tables[NOTHING], self._tracker_for(tables, ids, wire.prompt_length)
        states = tuple({segment.state.key: segment.state for segment in segments}.values())
        if tracker is not None:
            segments, states = tracker.segments, tracker.states
        if self.static:
            for state in states:
                check_fits(state, self.capacity)
            if wire.reading is not None and not self.capacity.reads:
                raise TrimtabError(
                    f"request {request} reads activations, which this worker's captured graphs don't keep"
                )
        for state in states:
            if state.banked:
                self.bank.acquire(state)
            if self.maps is not None and state.mapped:
                self.maps.acquire(state.key, state_forms(state))
        self.programs[request] = Program(segments, wire.reading, states, tracker)
        self.doses.start(request, wire.cap)
        self._next.pop(request, None)
        if not self.static:
            self._stage()
        self._last_requests = ()

    def add_sampled_tokens(self, requests: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        """Take into account the tokens that a pass has sampled; a request whose prompt isn't complete has none."""
        for request, new in zip(requests, tokens, strict=True):
            program = self.programs.get(request, IDLE)
            if program.tracker is None:
                continue
            turned = [program.tracker.advance(int(token)) for token in new]
            if any(turned):
                self.programs[request] = replace(program, segments=program.tracker.segments)
                self._last_requests = ()

    def _tracker_for(
        self, tables: Mapping[ActiveMeanings, tuple[Segment, ...]], ids: Sequence[int] | None, prompt_length: int
    ) -> SegmentTracker | None:
        if len(tables) == 1:
            return None
        if self.tokenizer is None or ids is None:
            raise TrimtabError("positions by meaning need the request's tokens, and this worker didn't receive them")
        return SegmentTracker.of(tables, self.tokenizer(), ids, prompt_length)

    def resume(self, requests: Iterable[str]) -> None:
        """These requests were preempted, and continue at a position that depends on the cache."""
        for request in requests:
            self._record_next_positions()
            self._next.pop(request, None)

    def finish(self, requests: Iterable[str]) -> None:
        """Remove finished requests."""
        for request in requests:
            program = self.programs.pop(request, None)
            self.doses.finish(request)
            self._next.pop(request, None)
            for state in program.states if program else ():
                if state.banked:
                    self.bank.release(state)
                if self.maps is not None and state.mapped:
                    self.maps.release(state.key)
            if program is not None:
                self._last_requests = ()

    def pop_reading(self, reading: str) -> dict[Site, Tensor]:
        """The activations of a reading, `{site: [positions, width]}`, in the order of positions; this removes them."""
        activations = {}
        for site, parts in self.readings.pop(reading, {}).items():
            every = torch.cat([rows for _, rows in parts])
            last = {p: i for i, p in enumerate(p for positions, _ in parts for p in positions)}  # if read twice
            activations[site] = every[[last[p] for p in sorted(last)]]
        return activations

    def _stage(self) -> None:
        """Compile the operations that are more than additions for the current requests, unless that has been done."""
        alive = [state for program in self.programs.values() for state in program.states]
        if all(state.key in self._staged.numbers for state in alive if state.mapped):
            return
        staged = list({state.key: state for state in alive if state.mapped}.values())
        numbers = {state.key: i for i, state in enumerate(staged, 1)}
        sites = {}
        for site in self.sites:
            slots: dict[int, list[Slot]] = {numbers[state.key]: state.staged.get(site, []) for state in staged}
            if any(slots.values()):
                stages = stages_of(slots, torch.promote_types(self.dtype, torch.float32))
                sites[site] = [_moved(stage, self.device) for stage in stages]
        self._staged = Staged(numbers, sites)

    # ---- passes ------------------------------------------------------------------------------------------

    def expect(self, requests: Mapping[str, int]) -> None:
        """vLLM begins a step for these requests; `begin` must be called with the same ones."""
        self._expected = self.programs.keys() & requests.keys()

    def begin(self, chunks: Chunks) -> None:
        """Prepare the pass over these ranges. Passes outside `begin` and `end` are vLLM's own, for warmup."""
        self.fired.update(self._seen)
        self._open = True
        self._seen.clear()
        self._faults = {}
        if not self._can_reuse_step(chunks):
            self._prepare_pass(chunks)
        self._pass = chunks
        self._check_known(chunks)
        if self.counts is not None and self._needed and self._replays:
            self.counts.clear()

    def _prepare_pass(self, chunks: Chunks) -> None:
        """Prepare a pass that differs from the previous one."""
        self._record_next_positions()
        self._replays = self.static and (self.captured is None or sum(chunks.counts) <= self.captured)
        self._step, self._needed = None, {}
        self.doses.plan(chunks, lambda request: self.programs[request].segments, self.device)
        token_runs: Runs = ()
        if self.programs:
            self._sites_by_request = {r: self.programs[r].sites for r in chunks.requests if r in self.programs}
            self._check_order(chunks)
            token_runs = self._runs_of(chunks)
            self._reads = self._reads_in(chunks)
        else:
            self._sites_by_request, self._reads, self._last_requests = {}, {}, ()
        self._needed = {site: max(read.rows[-1] for read in reads) + 1 for site, reads in self._reads.items()}
        if self.static:
            self._fill(token_runs if self._replays else ())
        if not self._replays and self._sites_by_request:
            self._stage()
            self._step = make_step(token_runs, self.bank, self._staged)
            if self._step is not None:
                self._require_rows({*self._step.adds, *self._step.staged.sites}, self._step.high)

    def _fill(self, token_runs: Runs) -> None:
        """Fill the indices of the captured graphs' banks."""
        assert self._adding is not None
        present = {state.key: state for _, state in token_runs if state is not None}.values()
        slots = slots_of(token_runs, self.bank.slots, lambda state: state.banked)
        self._adding.fill(slots)
        self._require_rows({site for state in present for site in state.added}, len(slots))
        if self.maps is not None and self._mapping is not None:
            slots = slots_of(token_runs, self.maps.slots, lambda state: state.mapped)
            self._mapping.fill(slots)
            self._require_rows({site for state in present for site in state.staged}, len(slots))

    def _require_rows(self, sites: Set[Site], tokens: int) -> None:
        """Record that the operator must run on this many tokens at these sites, as far as the worker has them."""
        for site in sites & self.sites.keys():
            self._needed[site] = max(tokens, self._needed.get(site, 0))

    def _record_next_positions(self) -> None:
        """Record where the requests of the last pass continue."""
        for request, first, count in zip(*self._pass, strict=True):
            if request in self.programs:
                self._next[request] = first + count
        self._pass, self._last_requests = NO_CHUNKS, ()

    def _check_known(self, chunks: Chunks) -> None:
        """Record a fault if a request's steering depends on generated tokens that aren't known before the pass."""
        for request, first, count in zip(*chunks, strict=True):
            tracker = self.programs.get(request, IDLE).tracker
            if tracker is not None and first + count > tracker.known:
                self._faults[request] = (
                    f"{FAILURE_PREFIX}token {first + count - 1} of this request was computed before the plugin knew"
                    " which token it is; start the engine with async_scheduling=False"
                )

    def _check_order(self, chunks: Chunks) -> None:
        """Record a fault for requests of which tokens were computed in between without a call to the plugin."""
        for request, first, _ in zip(*chunks, strict=True):
            if request in self._sites_by_request and first > self._next.get(request, first):
                self._faults[request] = (
                    f"{FAILURE_PREFIX}tokens {self._next[request]} to {first - 1} of this request were computed in a"
                    " vLLM step that bypassed the plugin"
                )

    def _can_reuse_step(self, chunks: Chunks) -> bool:
        """Whether the last step is still valid for this pass: each of the same requests' next token, in the same
        state."""
        if not self._last_requests or self._last_requests != chunks.requests or max(chunks.counts) > 1:
            return False
        if list(chunks.firsts) != [first + 1 for first in self._pass.firsts]:
            return False
        if self._passes_left is not None:
            self._passes_left -= 1
        return self._passes_left is None or self._passes_left >= 0

    def _runs_of(self, chunks: Chunks) -> Runs:
        """The states of a pass's tokens. This also sets how many similar passes may follow."""
        token_runs: list[tuple[int, State | None]] = []
        passes_left: int | None = None
        for request, first, count in zip(*chunks, strict=True):
            segments = self.programs.get(request, IDLE).segments
            token_runs += state_runs(segments, first, count)
            border = next_border(segments, first + 1)
            if border is not None:
                passes_left = border - first - 1 if passes_left is None else min(passes_left, border - first - 1)
        self._last_requests = list(chunks.requests) if max(chunks.counts) == 1 else ()
        self._passes_left = passes_left
        return token_runs

    def _reads_in(self, chunks: Chunks) -> dict[Site, list[ReadRows]]:
        """What to read at each site."""
        by_site: dict[Site, list[ReadRows]] = {}
        offset = 0
        for request, first, count in zip(*chunks, strict=True):
            reading = self.programs.get(request, IDLE).reading
            if reading is not None:
                here = sorted({p for p in reading.positions if first <= p < first + count})
                if here:
                    rows = [offset + p - first for p in here]
                    read_rows = ReadRows(reading.id, rows, here, to_device(torch.tensor(rows), self.device))
                    for site in self.sites.keys() & reading.sites:  # each pipeline stage has some of them
                        by_site.setdefault(site, []).append(read_rows)
                self._last_requests = ()
            offset += count
        return by_site

    def apply(self, site: Site, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit and read the activation at a site: `hidden + residual`, or just `hidden`, `[tokens, width]` each."""
        self._seen[site] = self._seen.get(site, 0) + CALL + hidden.shape[0]
        if self.counts is not None and (self._replays or not self._open):
            self._apply_always(site, hidden, residual, self.counts)
            return
        if not self._open or hidden.shape[0] < self._needed.get(site, 0):
            return  # outside a pass, or a fault that `end` will find
        if self._step is not None:
            old = self.doses.activations_before(site, hidden, residual)
            self._step.apply(self.bank, site, hidden, residual)
            self.doses.add_doses(site, hidden, residual, old)
        for read in self._reads.get(site, ()):
            x = hidden.index_select(0, read.at)
            x = x if residual is None else x + residual.index_select(0, read.at)
            self.readings.setdefault(read.reading, {}).setdefault(site, []).append((read.positions, x))

    def _apply_always(self, site: Site, hidden: Tensor, residual: Tensor | None, counts: GraphCounts) -> None:
        """Run the operators that are the same in every pass, as in a captured graph."""
        if self.fused is not None and self.fused.takes(hidden, residual):
            self.fused.act(site, hidden, residual)
            return
        tokens = hidden.shape[0]
        if site in self.bank.rows:
            hidden.add_(self.bank.rows[site].index_select(0, self.bank.index[:tokens]))
        if self.maps is not None and site in self.maps.sites:
            self.maps.act(site, hidden, residual)
        kept = self.kept.get(site)
        if kept is not None:
            rows = min(tokens, len(kept))
            if residual is None:
                kept[:rows].copy_(hidden[:rows])
            else:
                torch.add(hidden[:rows], residual[:rows], out=kept[:rows])
        counts.count(site, tokens)

    def _read_replayed(self) -> None:
        """Read from the activations that the captured graphs have kept."""
        for site, reads in self._reads.items():
            for read in reads:
                x = self.kept[site].index_select(0, read.at)
                self.readings.setdefault(read.reading, {}).setdefault(site, []).append((read.positions, x))

    def end(self) -> Receipt | None:
        """Finish the pass. Returns a receipt, or `None` if no request in it has a program.

        The faults in it are for requests that weren't steered, or read, at exactly the planned tokens and sites.
        """
        self.fired.update(self._seen)
        opened, self._open = self._open, False
        expected, self._expected = self._expected, frozenset()
        if not opened:
            if not expected:
                return None
            self._last_requests, self._pass = (), NO_CHUNKS
            return Receipt(len(expected), dict.fromkeys(expected, NOT_CALLED))
        faults = self._faults
        if not expected <= self._sites_by_request.keys():
            faults |= dict.fromkeys(expected - self._sites_by_request.keys(), NOT_CALLED)
        receipt = Receipt(max(len(expected), len(self._sites_by_request)), faults)
        if self.counts is None or not self._replays:
            faults.update(_miscounted(self._seen, self._needed, self._sites_by_request))
        elif self._needed:
            self._read_replayed()
            read, receipt.ready = self.counts.copy()
            needed, sites_by_request = self._needed, self._sites_by_request
            receipt.deferred_faults = lambda: _miscounted(read(), needed, sites_by_request)
        if self.doses.steered_rows:
            if self._replays:
                self.doses.add_replayed_doses(self.kept, self.bank)
            receipt.deferred_doses = self.doses.deferred_doses()
        return receipt if receipt.requests else None

    def describe(self) -> Mapping[str, int]:
        """How full the manager is."""
        return {
            "steerings": len(self.steerings),
            "requests": len(self.programs),
            "slots_used": self.bank.slots.used,
            "slots": self.bank.slots.capacity,
            "maps_used": 0 if self.maps is None else self.maps.slots.used,
        }

    @property
    def unfired(self) -> list[Site]:
        """The sites at which the graph hasn't called the operator yet."""
        return sorted(self.sites.keys() - self.fired - self._seen.keys())


def _miscounted(
    seen: Mapping[Site, int], needed: Mapping[Site, int], sites_by_request: Mapping[str, frozenset[Site]]
) -> dict[str, str]:
    """The faults of the requests that need the operator at a site where it didn't run as planned."""
    faults: dict[str, str] = {}
    for site, tokens in needed.items():
        reason = count_fault(site, seen.get(site, 0), tokens)
        if reason is not None:
            faults |= {request: reason for request, sites in sites_by_request.items() if site in sites}
    return faults


def _moved(stage: Stage, device: torch.device) -> Stage:
    rows = {name: bank.to(device) for name, bank in stage.rows.items()}
    return replace(stage, rows=rows, active=stage.active.to(device))
