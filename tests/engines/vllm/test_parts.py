"""The parts of the vLLM engine that need no vLLM: programs, keys, slots, waiting, requests, and what a rig does."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from batches import steering
from other_programs import has_vllm
from tiny import LAYERS, WIDTH, direction, naive_holds, naive_together, read_write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trimtab import (
    Ablate,
    Add,
    Positions,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
    UntestedVersionWarning,
    save,
)
from trimtab.engines.vllm import emphasized, operator
from trimtab.engines.vllm.attach import Place, attach
from trimtab.engines.vllm.bank import Bank, Slots
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.core import Failure, SlotQueue, block_keys, patch_core, patch_scheduler
from trimtab.engines.vllm.counting import RECEIPT, Receipt
from trimtab.engines.vllm.endpoint import Endpoint
from trimtab.engines.vllm.frontend import Link, Names, drop_unused, link_from, parse, send
from trimtab.engines.vllm.identity import identify
from trimtab.engines.vllm.patched import patch_engines
from trimtab.engines.vllm.program import compile_program, next_border, state_runs
from trimtab.engines.vllm.requests import patch_request
from trimtab.engines.vllm.rpc import run
from trimtab.engines.vllm.settings import Settings, settings_from_environment
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager
from trimtab.engines.vllm.versions import SUPPORTED, check_version
from trimtab.engines.vllm.wire import RESOLVED_KEY, Part, Reading, Wire, content_of, identified_edits, wire_of
from trimtab.engines.vllm.worker import _wrap_runner, config_problems, runner_problems
from trimtab.files.steering_file import steering_from_bytes, steering_to_bytes
from trimtab.steering import Card, Rotate, SetProjection, by_keys
from trimtab.steering.identity import fingerprint, sampled_rows

RULES = [
    Positions.all(),
    Positions.prompt(),
    Positions.generated(),
    Positions.from_last_prompt_token(),
    Positions.window(1, 4),
    Positions.span(1, 3),
    Positions.opening(3),
    Positions.tokens([1, -1]),
]


def placed(acting: Steering, prompt_length: int, static: bool = False) -> tuple[Wire, Steering]:
    """The wire of a steering for a prompt of this length, and its content."""
    digest, content, strengths = content_of(acting)
    part = Wire.from_plain({"parts": [[digest, list(strengths)]], "reading": None, "prompt_length": 0, "spans": []})
    segments = compile_program(identified_edits(part.parts[0], content), prompt_length)
    wire = part.with_spans(segments, prompt_length, static=static)
    assert Wire.from_plain(wire.to_plain()) == wire
    return wire, content


def rig(slots: int = 8, static: bool = False, dtype: torch.dtype = torch.float64) -> SteeringManager:
    device = torch.device("cpu")
    bank = Bank(range(LAYERS), WIDTH, slots, 64, dtype, device)
    return SteeringManager({Site(layer): WIDTH for layer in range(LAYERS)}, dtype, device, bank, static)


def start(worker: SteeringManager, request: str, acting: Steering, prompt_length: int) -> None:
    wire, content = placed(acting, prompt_length)
    worker.steerings[wire.parts[0].digest] = content
    worker.start(request, wire)


class TestPrograms:
    def test_runs_cut_where_the_state_changes(self) -> None:
        wire, content = placed(steering((1, Add(direction(1)), RULES[4]), (1, Add(direction(2)), RULES[3])), 5)
        segments = compile_program(identified_edits(wire.parts[0], content), 5)
        assert [(s.start, s.stop) for s in segments] == [(4, 6), (6, 9), (9, None)]
        assert segments[0].state is segments[2].state
        cut = [(n, state.key if state else None) for n, state in state_runs(segments, 3, 5)]
        first, second = segments[0].state.key, segments[1].state.key
        assert cut == [(1, None), (2, first), (2, second)]
        assert list(state_runs(segments, 0, 3)) == [(3, None)]
        assert [n for n, _ in state_runs(segments, 20, 2)] == [2]
        assert [next_border(segments, p) for p in (0, 5, 7, 10)] == [4, 6, 9, None]

    def test_a_key_tells_content_and_strength(self) -> None:
        pushed = steering((1, Add(direction(1)), RULES[0]))
        keys = [placed(s, 4)[0].spans[0].key for s in (pushed, 2.0 * pushed, 1.0 * pushed, pushed.at(RULES[3]))]
        assert keys[0] == keys[2] != keys[1]
        assert content_of(pushed)[0] == content_of(2.0 * pushed)[0]

    def test_what_only_stages_needs_no_slot(self) -> None:
        assert placed(steering((1, Ablate(direction(1)), RULES[0])), 4)[0].slots == frozenset()
        assert (
            len(placed(steering((1, Ablate(direction(1)), RULES[1]), (2, Add(direction(1)), RULES[0])), 4)[0].slots)
            == 2
        )


class TestKeys:
    def test_only_what_acts_on_a_block_keys_it(self) -> None:
        wire, _ = placed(steering((1, Add(direction(1)), RULES[3])), 40)
        assert block_keys(wire, 0, 16) == block_keys(wire, 16, 32) == block_keys(None, 32, 48) == []
        ((_, key),) = block_keys(wire, 32, 48)
        assert key == f"7:16:{wire.spans[0].key}"
        assert block_keys(wire, 48, 64) == [("trimtab", f"0:16:{wire.spans[0].key}")]

    def test_another_place_in_the_block_is_another_key(self) -> None:
        a, _ = placed(steering((1, Add(direction(1)), Positions.span(2, 5))), 40)
        b, _ = placed(steering((1, Add(direction(1)), Positions.span(3, 5))), 40)
        assert block_keys(a, 0, 16) != block_keys(b, 0, 16)


class TestSlots:
    def test_they_are_counted_and_used_again(self) -> None:
        slots = Slots(3)
        assert slots.acquire("a") == (1, True)
        assert slots.acquire("b") == (2, True)
        assert slots.acquire("a") == (1, False)
        with pytest.raises(TrimtabError, match="all 2 slots"):
            slots.acquire("c")
        slots.release("a")
        with pytest.raises(TrimtabError, match="all 2 slots"):
            slots.acquire("c")  # it still has a user
        slots.release("a")
        assert slots.acquire("a") == (1, False)  # nobody has needed it meanwhile
        slots.release("a")
        assert slots.acquire("c") == (1, True)
        assert slots.used == 2


class Scheduler:
    """As vLLM's, as far as requests that come and go are concerned."""

    def __init__(self, slots: int) -> None:
        self.vllm_config = SimpleNamespace(additional_config={"trimtab": {"slots": slots}})
        self.requests: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def _free_request(self, request: Any) -> None:
        del self.requests[request.request_id]

    def finish_requests(self, request_ids: Any, _status: Any) -> list[Any]:
        gone = [self.requests[r] for r in request_ids if r in self.requests]
        for request in gone:
            self._free_request(request)
        return gone

    def update_from_output(self, scheduled: Any, output: Any) -> dict[int, Any]:
        """A token for each request that is still here."""
        here = [name for name in scheduled.num_scheduled_tokens if name in self.requests]
        return {0: Sent([SimpleNamespace(request_id=name, new_token_ids=[output.token]) for name in here])}


@dataclass
class Sent:
    outputs: list[Any] = field(default_factory=list)


FAILURE = Failure("failed", "error", SimpleNamespace, Sent)


def request(name: str, acting: Steering | None, static: bool = False) -> Any:
    extra = {RESOLVED_KEY: placed(acting, 4, static)[0].to_plain()} if acting else None
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(request_id=name, sampling_params=params, client_index=0)


class TestWaiting:
    @pytest.fixture
    def scheduler(self) -> Any:
        kind = type("Patched", (Scheduler,), {})
        patch_scheduler(kind, FAILURE)
        return kind(slots=2)

    def test_requests_wait_for_a_slot_in_order(self, scheduler: Any) -> None:
        first, second = (steering((1, Add(direction(i)), RULES[0])) for i in (1, 2))
        for name, acting in (("a", first), ("b", first), ("c", second), ("d", first), ("e", None)):
            scheduler.add_request(request(name, acting))
        assert list(scheduler.requests) == ["a", "b", "e"]  # d could run, but c has waited longer
        scheduler._free_request(scheduler.requests["a"])
        assert "c" not in scheduler.requests
        scheduler._free_request(scheduler.requests["b"])
        assert list(scheduler.requests) == ["e", "c"]
        scheduler._free_request(scheduler.requests["c"])
        assert list(scheduler.requests) == ["e", "d"]

    def test_requests_wait_for_a_map_too(self, scheduler: Any) -> None:
        """Where captured graphs are replayed; there are fewer of these, and additions don't wait for them."""
        scheduler.vllm_config.additional_config["trimtab"] |= {"slots": 9, "maps": 2}
        mapped = [steering((1, Ablate(direction(i)), RULES[0])) for i in (1, 2)]
        for name, acting in (("a", mapped[0]), ("b", steering((1, Add(direction(3)), RULES[0]))), ("c", mapped[1])):
            scheduler.add_request(request(name, acting, static=True))
        assert list(scheduler.requests) == ["a", "b"]
        scheduler._free_request(scheduler.requests["a"])
        assert list(scheduler.requests) == ["b", "c"]
        scheduler.add_request(request("d", mapped[0]))  # of an engine without graphs
        assert list(scheduler.requests) == ["b", "c", "d"]

    def test_who_gives_up_waits_no_more(self, scheduler: Any) -> None:
        first, second = (steering((1, Add(direction(i)), RULES[0])) for i in (1, 2))
        for name, acting in (("a", first), ("b", second), ("c", second)):
            scheduler.add_request(request(name, acting))
        scheduler.finish_requests("b", None)
        scheduler.finish_requests(["a"], None)
        assert list(scheduler.requests) == ["c"]

    def test_a_room_without_steering_is_never_full(self) -> None:
        room = SlotQueue(1)
        assert all(room.reserve(request(str(i), None)) for i in range(9))


class TestCore:
    def test_what_is_needed_is_kept(self) -> None:
        calls = []

        class Core:
            def __init__(self) -> None:
                self.scheduler = Scheduler(4)

            def collective_rpc(self, method: str, timeout: Any, args: Any, kwargs: Any) -> list[Any]:
                calls.append((method, args))
                return ["done"]

            def preprocess_add_request(self, request: Any) -> str:
                return "taken"

        patch_core(Core)
        core = Core()
        running = request("a", steering((1, Add(direction(1)), RULES[0])))
        core.scheduler.add_request(running)
        digest = parts_of(running.sampling_params)[0].digest
        assert core.collective_rpc("trimtab_drop", None, ([digest, "other"],)) == [[digest]]
        assert calls == [("trimtab_drop", (["other"],))]
        assert core.preprocess_add_request(running) == "taken"
        running.sampling_params.extra_args = {"steering": "shout"}
        with pytest.raises(TrimtabError, match="a front end without trimtab's plugin"):
            core.preprocess_add_request(running)


class TestRig:
    EDITS = (
        (1, Add(direction(1, 2.0)), RULES[3]),
        (1, SetProjection(direction(2), target=1.5), RULES[0]),
        (1, Add(direction(7)), RULES[2]),
        (2, Add(direction(8)), RULES[0]),
        (2, Add(direction(9)), RULES[5]),
        (3, Rotate(direction(3), one_sided=False), RULES[1]),
        (3, Ablate(direction(6), keep_norm=True), RULES[4]),
        (2, Add(direction(10)), RULES[6]),
        (0, read_write(1, 3, low=0.0), RULES[0]),
        (3, read_write(2, 5, keep_norm=0.5), RULES[3]),
    )
    OTHER = ((0, read_write(3, 2), RULES[1]), (3, read_write(2, 5, keep_norm=0.5), RULES[0]))

    @pytest.mark.parametrize("chunk", [1, 3, 12])
    @pytest.mark.parametrize("pair", [False, True])
    def test_a_mixed_batch_is_the_textbook_formula_token_by_token(self, chunk: int, pair: bool) -> None:
        worker = rig(slots=20)
        steerings = {"a": steering(*self.EDITS), "b": None, "c": 0.5 * steering(*self.EDITS[3:5], *self.OTHER)}
        for name, what in steerings.items():
            if what is not None:
                start(worker, name, what, 5)
        seed = torch.Generator().manual_seed(chunk)
        for first in range(0, 12, chunk):
            worker.begin(Chunks(list(steerings), [first] * 3, [chunk] * 3))
            for layer in range(LAYERS):
                x = torch.randn(3 * chunk + 2, WIDTH, generator=seed, dtype=torch.float64)  # two rows of padding
                residual = torch.randn(x.shape, generator=seed, dtype=torch.float64) if pair else None
                hidden = x.clone()
                worker.apply(Site(layer), hidden, residual)
                stream, new = (x, hidden) if residual is None else (x + residual, hidden + residual)
                for row in range(len(x)):
                    name, t = ("abc"[row // chunk], first + row % chunk) if row < 3 * chunk else ("b", 0)
                    edits = [e for e in (steerings[name].edits if steerings[name] else ()) if e.site.layer == layer]
                    holding = [e for e in edits if naive_holds(e, t, 5)]
                    if holding:
                        torch.testing.assert_close(new[row], naive_together(holding, stream[row]), rtol=1e-9, atol=1e-9)
                    else:
                        assert torch.equal(hidden[row], x[row])
            worker.end()
        worker.finish(list(steerings))
        assert worker.bank.slots.used == 0
        assert not worker.programs

    def test_captured_graphs_read_the_index(self) -> None:
        """Python doesn't run then: what was written to the buffers before the step is all that counts."""
        worker = rig(static=True)
        start(worker, "a", steering((1, Add(direction(1)), RULES[2])), 3)
        worker.begin(Chunks(["b", "a"], [7, 2], [2, 3]))
        x = torch.zeros(8, WIDTH, dtype=torch.float64)
        worker.apply(Site(1), x, None)
        assert x.norm(dim=-1).gt(0).tolist() == [False, False, False, True, True, False, False, False]
        worker.finish(["a"])
        worker.begin(Chunks(["b"], [9], [1]))
        y = torch.zeros(8, WIDTH, dtype=torch.float64)
        worker.apply(Site(1), y, None)
        assert not y.any()

    def test_steady_decoding_notices_borders_and_changes_of_the_batch(self) -> None:
        worker = rig()
        start(worker, "a", steering((1, Add(direction(1)), Positions.window(2, 4))), 3)
        seen = []
        for first in range(3, 10):
            worker.begin(Chunks(["a"], [first], [1]))
            x = torch.zeros(1, WIDTH, dtype=torch.float64)
            worker.apply(Site(1), x, None)
            seen.append(bool(x.any()))
        assert seen == [False, False, True, True, False, False, False]
        start(worker, "b", steering((1, Add(direction(1)), RULES[0])), 1)
        worker.begin(Chunks(["a", "b"], [10, 1], [1, 1]))
        x = torch.zeros(2, WIDTH, dtype=torch.float64)
        worker.apply(Site(1), x, None)
        assert x.norm(dim=-1).gt(0).tolist() == [False, True]

    def test_readings_gather_over_chunks_what_the_steering_made(self) -> None:
        worker = rig()
        wire, content = placed(steering((1, Add(direction(1)), RULES[0])), 6)
        worker.steerings[wire.parts[0].digest] = content
        worker.start("a", Wire(wire.parts, Reading("r", (Site(1), Site(2)), (1, 4)), 6, wire.spans))
        for first in (0, 3):
            worker.begin(Chunks(["b", "a"], [0, first], [1, 3]))
            for layer in (1, 2):
                worker.apply(
                    Site(layer), torch.full((4, WIDTH), float(first), dtype=torch.float64), torch.ones(4, WIDTH)
                )
            worker.end()
        readings = worker.pop_reading("r")
        assert torch.equal(readings[Site(2)][:, 0], torch.tensor([1.0, 4.0], dtype=torch.float64))
        torch.testing.assert_close(readings[Site(1)][1], 4 + direction(1))
        assert worker.pop_reading("r") == {}

    def test_a_request_for_what_was_never_sent_is_an_error(self) -> None:
        with pytest.raises(TrimtabError, match="didn't receive"):
            rig().start("a", placed(steering((1, Add(direction(1)), RULES[0])), 3)[0])


class Recorded(TorchDispatchMode):
    """A captured graph, as CUDA's: what ran while it was recorded runs again at `replay`, without Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        made: dict[int, Any] = {}

        def current(x: Any) -> Any:
            return made.get(id(x), x)

        for func, args, kwargs, out in self.calls:
            arguments, named = tree_map(current, (args, kwargs))
            now = func(*arguments, **named)
            if not any(out is a for a in args):
                made |= {id(old): new for old, new in zip(tree_leaves(out), tree_leaves(now), strict=True)}


class Step(SimpleNamespace):
    """What vLLM's scheduler hands to a worker."""

    def __init__(self, counts: dict[str, int], new: dict[str, tuple[Any, int]] | None = None, **computed: int) -> None:
        arrived = [
            SimpleNamespace(req_id=name, num_computed_tokens=first, sampling_params=params)
            for name, (params, first) in (new or {}).items()
        ]
        cached = SimpleNamespace(
            req_ids=list(computed), num_computed_tokens=list(computed.values()), resumed_req_ids=set()
        )
        super().__init__(
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            finished_req_ids=set(),
            scheduled_new_reqs=arrived,
            scheduled_cached_reqs=cached,
        )


class Later:
    """Sampled tokens that are on their way from the device."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def get_output(self) -> Any:
        return self.output


class Runner:
    """A model runner of vLLM's, V1's or (`second`) V2's: a model of `LAYERS` blocks, behind which the operator is run.

    `without`: blocks behind which it isn't. `hooks`: whether what the plugin hooks into is used. `later`: its output
    comes as one that has yet to be waited for.
    """

    def __init__(self, worker: SteeringManager, second: bool = False, later: bool = False) -> None:
        self.rig, self.later = worker, later
        self.without: set[int] = set()
        self.twice: set[int] = set()
        self.rows: int | None = None
        self.hooks = True
        self.input_batch = SimpleNamespace(req_ids=[])
        if second:
            self.prepare_inputs = self._prepared
        else:
            self._model_forward = self._run

    def _prepared(self, scheduled: Any) -> Any:
        return SimpleNamespace(req_ids=list(scheduled.num_scheduled_tokens))

    def _run(self, rows: int) -> None:
        for layer in range(LAYERS):
            for _ in range((layer not in self.without) + (layer in self.twice)):
                self.rig.apply(Site(layer), torch.zeros(self.rows or rows, WIDTH, dtype=torch.float64), None)

    def execute_model(self, scheduled: Any, dummy_run: bool = False) -> None:
        rows = scheduled.total_num_scheduled_tokens
        self.input_batch.req_ids = list(scheduled.num_scheduled_tokens)
        if hasattr(self, "prepare_inputs"):
            if self.hooks and not dummy_run:
                self.prepare_inputs(scheduled)
            self._run(rows)
        else:
            (self._model_forward if self.hooks else self._run)(rows)

    def sample_tokens(self, _grammar: Any = None) -> Any:
        output = SimpleNamespace(token=5)
        return Later(output) if self.later else output


class TestCounting:
    """Each request is steered at exactly its tokens and blocks, or ended with an error before its token is sent."""

    @pytest.fixture(params=["V1", "V2", "V2, later"])
    def runner(self, request: Any) -> Runner:
        runner = Runner(rig(), second="V2" in request.param, later="later" in request.param)
        _wrap_runner(runner, runner.rig)
        return runner

    @pytest.fixture
    def scheduler(self) -> Any:
        kind = type("Patched", (Scheduler,), {})
        patch_scheduler(kind, FAILURE)
        return kind(slots=8)

    GIVEN = steering((1, Add(direction(1)), RULES[2]), (3, SetProjection(direction(2), 1.0), RULES[0]))

    def arrive(self, scheduler: Any, runner: Runner) -> dict[str, tuple[Any, int]]:
        """Two requests with a prompt of four tokens, one of them steered."""
        for name, acting in (("a", self.GIVEN), ("b", None)):
            scheduler.add_request(request(name, acting))
        digest, content, _ = content_of(self.GIVEN)
        runner.rig.steerings[digest] = content
        return {name: (waiting.sampling_params, 0) for name, waiting in scheduler.requests.items()}

    def step(self, scheduler: Any, runner: Runner, scheduled: Step) -> dict[str, Any]:
        """What is sent of each request after a step: a token, or the reason for its end."""
        runner.execute_model(scheduled)
        output = runner.sample_tokens(None)
        output = output.get_output() if runner.later else output
        (sent,) = scheduler.update_from_output(scheduled, output).values()
        return {
            sent_output.request_id: getattr(sent_output, "stop_reason", None) or sent_output.new_token_ids[0]
            for sent_output in sent.outputs
        }

    def test_right_runs_are_left_alone(self, scheduler: Any, runner: Runner) -> None:
        new = self.arrive(scheduler, runner)
        steps = [
            Step({"b": 4}, {"b": new["b"]}),
            Step({"b": 1, "a": 3}, {"a": new["a"]}, b=4),  # a chunk of its prompt
            Step({"b": 1, "a": 1}, b=5, a=3),
            *(Step({"b": 1, "a": 1}, b=6 + i, a=4 + i) for i in range(3)),
            Step({"a": 1}, a=7),
        ]
        for scheduled in steps:
            assert self.step(scheduler, runner, scheduled) == dict.fromkeys(scheduled.num_scheduled_tokens, 5)
        again = Step({"a": 6}, a=2)  # preempted: with two tokens in the cache it is computed again
        again.scheduled_cached_reqs.resumed_req_ids.add("a")
        assert self.step(scheduler, runner, again) == {"a": 5}
        ahead = Step({"a": 1}, a=9)  # preempted, and others' blocks of the cache have brought it on
        ahead.scheduled_cached_reqs.resumed_req_ids.add("a")
        assert self.step(scheduler, runner, ahead) == {"a": 5}
        if hasattr(runner, "prepare_inputs"):
            runner.execute_model(Step({"none": 3}), dummy_run=True)
        else:
            runner._run(3)
        assert self.step(scheduler, runner, Step({"a": 1}, a=10)) == {"a": 5}

    FAULTS: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
        ("unhooked", lambda r: r.without.add(3), r"behind block 3 .* on 5 tokens, but didn't run"),
        ("twice", lambda r: r.twice.add(3), r"behind block 3 .* ran 2 times, on 10 tokens"),
        ("fewer tokens", lambda r: setattr(r, "rows", 2), r"on 5 tokens, but ran 1 times, on 2"),
        ("hook not called", lambda r: setattr(r, "hooks", False), "the plugin wasn't asked to steer"),
    )

    @pytest.mark.parametrize(("plant", "why"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
    def test_a_planted_fault_ends_the_steered_request_alone(
        self, scheduler: Any, runner: Runner, plant: Callable[[Runner], Any], why: str
    ) -> None:
        new = self.arrive(scheduler, runner)
        assert self.step(scheduler, runner, Step({"b": 4}, {"b": new["b"]})) == {"b": 5}
        plant(runner)
        sent = self.step(scheduler, runner, Step({"b": 1, "a": 4}, {"a": new["a"]}, b=4))
        assert sent["b"] == 5
        assert re.search(why, sent["a"])
        assert sent["a"].startswith("trimtab: ")
        assert list(scheduler.requests) == ["b"]

    @pytest.mark.parametrize("plant", [f[1] for f in FAULTS], ids=[f[0] for f in FAULTS])
    def test_in_steady_decoding_too(self, scheduler: Any, runner: Runner, plant: Callable[[Runner], Any]) -> None:
        new = self.arrive(scheduler, runner)
        self.step(scheduler, runner, Step({"b": 4, "a": 4}, new))
        for i in range(3):
            assert self.step(scheduler, runner, Step({"b": 1, "a": 1}, b=4 + i, a=4 + i)) == {"a": 5, "b": 5}
        plant(runner)
        if runner.rows is not None:
            runner.rows = 1
        sent = self.step(scheduler, runner, Step({"b": 1, "a": 1}, b=7, a=7))
        assert (sent["b"], type(sent["a"])) == (5, str)

    def test_a_step_past_the_plugin_is_noticed(self, scheduler: Any, runner: Runner) -> None:
        """By the next that isn't, and by the scheduler at once, since its tokens come without a receipt."""
        new = self.arrive(scheduler, runner)
        assert self.step(scheduler, runner, Step({"a": 4}, {"a": new["a"]})) == {"a": 5}
        unseen = Step({"a": 1}, a=4)
        receipt = self.counted(runner, Step({"a": 1}, a=5))
        assert "tokens 4 to 4 of this request were computed in a vLLM step" in receipt.resolve_faults()["a"]
        (sent,) = scheduler.update_from_output(unseen, SimpleNamespace(token=5)).values()
        assert "a worker computed 1 steered requests, but accounted for 0" in sent.outputs[0].stop_reason

    def counted(self, runner: Runner, scheduled: Step) -> Receipt:
        runner.execute_model(scheduled)
        output = runner.sample_tokens(None)
        return Receipt(*getattr(output.get_output() if runner.later else output, RECEIPT))

    def test_a_request_that_went_away_meanwhile_is_no_fault(self, scheduler: Any, runner: Runner) -> None:
        new = self.arrive(scheduler, runner)
        scheduled = Step({"b": 4, "a": 4}, new)
        runner.execute_model(scheduled)
        scheduler.finish_requests(["a"], "aborted")
        output = runner.sample_tokens(None)
        output = output.get_output() if runner.later else output
        (sent,) = scheduler.update_from_output(scheduled, output).values()
        assert [sent_output.request_id for sent_output in sent.outputs] == ["b"]

    def test_a_worker_that_nobody_hears_raises(self) -> None:
        """The scheduler gets one worker's output; any other has nobody to send its receipt to."""
        runner = Runner(rig())
        _wrap_runner(runner, runner.rig, reports=False)
        start(runner.rig, "a", self.GIVEN, 4)
        runner.execute_model(Step({"a": 4}, {"a": (None, 0)}))
        runner.without.add(3)
        with pytest.raises(RuntimeError, match="trimtab: behind block 3"):
            runner.execute_model(Step({"a": 1}, a=4))

    def test_a_reading_that_isnt_read(self) -> None:
        worker = rig()
        worker.start("r", Wire(reading=Reading("r", (Site(1), Site(2)), (1, 4)), prompt_length=6))
        worker.expect({"r": 6})
        worker.begin(Chunks(["r"], [0], [6]))
        worker.apply(Site(1), torch.zeros(6, WIDTH, dtype=torch.float64), None)
        receipt = worker.end()
        assert receipt is not None
        assert "behind block 2" in receipt.resolve_faults()["r"]

    def test_a_stage_answers_for_its_own_blocks(self) -> None:
        """Of a pipeline: the other blocks are other workers'."""
        device = torch.device("cpu")
        here = (0, 1)
        sites = {Site(layer): WIDTH for layer in here}
        worker = SteeringManager(sites, torch.float64, device, Bank(here, WIDTH, 8, 64, torch.float64, device))
        wire, content = placed(steering(*((layer, edit, RULES[0]) for layer in (1, 3) for edit in self.BOTH)), 6)
        worker.steerings[wire.parts[0].digest] = content
        worker.start("a", Wire(wire.parts, Reading("r", (Site(0), Site(3)), (1, 4)), 6, wire.spans))
        for missing in (None, 1):
            worker.expect({"a": 6})
            worker.begin(Chunks(["a"], [0], [6]))
            for layer in here:
                if layer != missing:
                    worker.apply(Site(layer), torch.zeros(6, WIDTH, dtype=torch.float64), None)
            receipt = worker.end()
            assert receipt is not None
            assert list(receipt.resolve_faults()) == ([] if missing is None else ["a"])
        assert list(worker.pop_reading("r")) == [Site(0)]

    BOTH = (Add(direction(1)), SetProjection(direction(2), 1.0))

    def test_the_first_that_failed_is_raised_when_all_have_ended(self) -> None:
        kind, asynchronous = type("Patched", (Engine,), {}), type("Async", (Engine,), {})
        patch_engines(kind, asynchronous, Names(), failure=KeyError)

        def output(reason: str | None, said: str | None = None) -> Any:
            completion = SimpleNamespace(finish_reason=reason, stop_reason=said)
            return SimpleNamespace(finished=reason is not None, outputs=[completion])

        engine = kind({})
        for _ in range(2):  # the engine goes on
            engine.outputs = [[output(None)], [output("error", "trimtab: not steered"), output(None)], [output("stop")]]
            assert engine.step()
            assert engine.step()
            with pytest.raises(TrimtabError, match="trimtab: not steered"):
                engine.step()
        engine.outputs = [[output("error")], [output("stop", "trimtab: is a stop string")]]
        assert len([engine.step(), engine.step()]) == 2

        async def ask() -> None:
            streaming = asynchronous({})
            streaming.outputs = [[output(None)], [output("error", "trimtab: not steered")]]
            async for _ in streaming.generate():
                pass

        with pytest.raises(KeyError, match="trimtab: not steered"):
            asyncio.run(ask())


class TestCountingInGraphs:
    """Where captured graphs are replayed, Python doesn't run: they count by themselves."""

    def captured(self, worker: SteeringManager, layers: range = range(LAYERS)) -> tuple[Recorded, torch.Tensor]:
        x = torch.zeros(8, WIDTH, dtype=torch.float64)
        with Recorded() as graph:
            for layer in layers:
                worker.apply(Site(layer), x, None)
        return graph, x

    def replayed(self, worker: SteeringManager, graph: Recorded, first: int) -> dict[str, str]:
        worker.expect({"a": 1})
        worker.begin(Chunks(["b", "a"], [first, first], [1, 1]))
        graph.replay()
        receipt = worker.end()
        assert receipt is not None
        return receipt.resolve_faults()

    def test_replays_are_counted_and_steer(self) -> None:
        worker = rig(static=True)
        graph, x = self.captured(worker)
        start(worker, "a", steering((1, Add(direction(1)), RULES[2]), (3, Add(direction(2)), RULES[0])), 3)
        for first in range(3, 8):
            x.zero_()
            assert self.replayed(worker, graph, first) == {}
            assert x.norm(dim=-1).gt(0).tolist() == [False, True, *[False] * 6]
            graph.replay()  # vLLM's own, between

    @pytest.mark.parametrize("layers", [range(3), range(1, 4)])
    def test_a_graph_that_lacks_a_block_is_noticed(self, layers: range) -> None:
        worker = rig(static=True)
        whole, _ = self.captured(worker)
        part, _ = self.captured(worker, layers)
        start(worker, "a", steering((0, Add(direction(1)), RULES[0]), (3, Add(direction(2)), RULES[0])), 3)
        assert self.replayed(worker, whole, 3) == {}
        (missing,) = set(range(LAYERS)) - set(layers)
        assert f"behind block {missing} the steering should have run once" in self.replayed(worker, part, 4)["a"]
        assert self.replayed(worker, whole, 5) == {}

    def test_a_replay_that_doesnt_happen_or_happens_twice(self) -> None:
        worker = rig(static=True)
        graph, _ = self.captured(worker)
        start(worker, "a", steering((1, Add(direction(1)), RULES[0])), 3)
        nothing = Recorded()
        assert "didn't run" in self.replayed(worker, nothing, 3)["a"]
        nothing.calls = graph.calls * 2
        assert "ran 2 times, on 16 tokens" in self.replayed(worker, nothing, 4)["a"]


class Engine:
    """A front end's engine whose workers answer as told."""

    def __init__(self, answers: dict[str, Any], workers: int = 1) -> None:
        self.answers, self.calls = answers, []
        self.outputs: list[list[Any]] = []
        self.input_processor = SimpleNamespace()
        parallel = SimpleNamespace(world_size=workers, data_parallel_size=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, additional_config={"trimtab": {"slots": 4}})

    def collective_rpc(self, method: str, args: tuple) -> list[Any]:
        self.calls.append((method, args))
        if method not in self.answers:
            raise NotImplementedError(f"Method {method!r} is not implemented.")
        return self.answers[method]

    def add_request(self, _id: str, _prompt: Any, params: Any) -> Any:
        return params

    def step(self) -> list[Any]:
        """What `self.outputs` holds for it."""
        return self.outputs.pop(0)

    def has_unfinished_requests(self) -> bool:
        return bool(self.outputs)

    async def generate(self) -> Any:
        for outputs in self.outputs:
            for output in outputs:
                yield output

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(chat_template=None)


def parts_of(params: Any) -> tuple[Part, ...]:
    """The steerings that a resolved request carries."""
    wire = wire_of(params)
    assert wire is not None
    return wire.parts


HELLO = {
    "reasons": [],
    "unfired": [],
    "rank": 0,
    "layers": LAYERS,
    "width": WIDTH,
    "here": [0, 1, 2, 3],
    "static": False,
    "dtype": "float32",
}


class Words:
    """A tokenizer of words."""

    is_fast = True

    def __call__(self, text: str, **_options: Any) -> dict[str, Any]:
        places = [word.span() for word in re.finditer(r"\S+", text)]
        return {"input_ids": [sum(text[a:b].encode()) for a, b in places], "offset_mapping": places}


class TestFrontEnd:
    @pytest.fixture
    def names(self) -> Names:
        names = Names()
        names.register("shout", steering((1, Add(direction(1)), RULES[0])))
        return names

    def ask(self, engine: Engine, options: Any, names: Names) -> Any:
        kind = type("Patched", (Engine,), {})
        patch_engines(kind, type("Async", (Engine,), {}), names)
        return kind.add_request(engine, "1", "hi", SimpleNamespace(extra_args={"steering": options, "other": 1}))

    def test_a_request_is_resolved_and_its_content_sent_once(self, names: Names) -> None:
        engine = Engine({"trimtab_hello": [HELLO], "trimtab_put": [None]})
        for strength in (1, 2):
            params = self.ask(engine, [{"name": "shout", "strength": strength}], names)
            assert set(params.extra_args) == {RESOLVED_KEY, "other"}
            assert parts_of(params)[0].strengths == (float(strength),)
        methods = [method for method, _ in engine.calls]
        assert methods == ["trimtab_hello", "trimtab_put"]
        digest, data = engine.calls[1][1]
        assert steering_from_bytes(data, "it") == names["shout"]
        assert digest == content_of(names["shout"])[0]

    def test_what_was_asked_before_is_resolved_by_a_look_unless_it_means_something_else_now(
        self, names: Names, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = Engine({"trimtab_hello": [HELLO], "trimtab_put": [None]})
        checked: list[Steering] = []
        check = Link.check
        monkeypatch.setattr(
            Link,
            "check",
            lambda link, checked_steering: (checked.append(checked_steering), check(link, checked_steering))[1],
        )

        def digest() -> str:
            (part,) = parts_of(self.ask(engine, [{"name": "shout"}], names))
            return part.digest

        before = digest()
        count = len(checked)
        assert digest() == before
        assert len(checked) == count
        other = steering((1, Add(direction(2)), RULES[0]))
        names.register("shout", other)
        assert digest() == content_of(other)[0] != before
        assert len(checked) > count
        link = engine._trimtab_link
        del link.sent[content_of(other)[0]]  # the workers have forgotten it
        sent = sum(method == "trimtab_put" for method, _ in engine.calls)
        digest()
        assert sum(method == "trimtab_put" for method, _ in engine.calls) == sent + 1
        names.unregister("shout")
        with pytest.raises(TrimtabError, match="no steering 'shout'"):
            digest()

    def test_what_is_emphasized_is_sent_once_whatever_the_prompt(self, names: Names) -> None:
        """And acts where its phrases stand, with a state that all requests share; without keys there is none."""
        calls = {"trimtab_hello": [{**HELLO, "inside": {"keys": 4}}], "trimtab_put": [None]}
        engine, other = Engine(calls), Engine({**calls, "trimtab_hello": [HELLO]})
        kind, content = type("Patched", (Engine,), {}), emphasized.content(LAYERS)
        for each in (engine, other):
            each.get_tokenizer = Words  # type: ignore[attr-defined]
        patch_engines(kind, type("Async", (Engine,), {}), names)
        keys = []
        for text in ("a sea so wide", "the wide and the wide"):
            prompt = {"type": "token", "prompt": text, "prompt_token_ids": Words()(text)["input_ids"]}
            body = {"emphasize": ["wide"], "steering": [{"name": "shout"}]}
            params = kind.add_request(engine, "1", prompt, SimpleNamespace(extra_args=body))
            assert set(params.extra_args) == {RESOLVED_KEY}
            (_, part), link = parts_of(params), engine._trimtab_link
            spans = [(i, i + 1) for i, word in enumerate(text.split()) if word == "wide"]
            assert list(part.spans) == spans
            edits = identified_edits(part, link.sent[part.digest])
            assert [edit.edit for edit in edits] == list(by_keys(emphasized.emphasis_of_spans(spans, LAYERS)).edits)
            placed = link.wire_for_prompt(wire_of(params), len(text.split()))
            keys.append([span.key for span in placed.spans if span.start == spans[0][0]])
            assert Wire.from_plain(placed.to_plain()) == placed
            with pytest.raises(UnsupportedError, match="TRIMTAB_SITES=keys"):
                kind.add_request(other, "1", prompt, SimpleNamespace(extra_args=body))
        assert keys[0] == keys[1]
        assert [method for method, _ in engine.calls] == ["trimtab_hello", "trimtab_put", "trimtab_put"]
        assert content_of(by_keys(content))[0] == part.digest
        for prompt, why in (("a sea", "not in token ids"), ({"type": "token", "prompt_token_ids": [1]}, "token ids")):
            with pytest.raises(UnsupportedError, match=why):
                kind.add_request(engine, "1", prompt, SimpleNamespace(extra_args={"emphasize": "wide"}))

    def test_what_json_cannot_say_is_refused_and_not_remembered(self, names: Names) -> None:
        engine = Engine({"trimtab_hello": [HELLO], "trimtab_put": [None]})
        with pytest.raises(TrimtabError, match="name, strength and positions"):
            self.ask(engine, [{("name",): "shout"}], names)
        with pytest.raises(TrimtabError, match="strength"):
            self.ask(engine, [{"name": "shout", "strength": torch.tensor([1.0, 2.0])}], names)
        assert not engine._trimtab_link.part_cache

    def test_an_engine_without_the_plugin_is_an_error(self, names: Names) -> None:
        with pytest.raises(UnsupportedError, match="don't know trimtab: its plugin failed to load"):
            self.ask(Engine({}), "shout", names)

    @pytest.mark.parametrize(
        ("hellos", "workers", "why"),
        [
            ([HELLO], 2, "1 of 2 workers"),
            ([{**HELLO, "reasons": ["speculative decoding is on"]}], 1, "can't be steered: speculative decoding"),
            ([{**HELLO, "unfired": ["residual[2]"]}], 1, r"lacks trimtab's operator at residual\[2\]"),
            ([{**HELLO, "here": [0, 1]}, {**HELLO, "here": [3]}], 2, "no worker steers after block 2"),
        ],
    )
    def test_every_worker_must_be_able_to(self, hellos: list[Any], workers: int, why: str) -> None:
        with pytest.raises(UnsupportedError, match=why):
            link_from(hellos, Engine({}, workers).vllm_config)

    @pytest.mark.parametrize(
        ("wish", "why"),
        [
            ("[{", "isn't JSON"),
            ("loud", "no steering 'loud'; registered: shout"),
            ([{"name": "shout", "layer": 1}], "name, strength and positions"),
            ([{"name": "shout", "strength": float("nan")}], "finite"),
            ([{"name": "shout", "positions": "somewhere"}], "positions 'somewhere' are not known"),
            (7, "is a list such as"),
        ],
    )
    def test_requests_that_arent_understood(self, wish: Any, why: str, names: Names) -> None:
        with pytest.raises(TrimtabError, match=why):
            parse(wish, names)

    def test_several_add_up(self, names: Names) -> None:
        wishes = [{"name": "shout", "strength": -1, "positions": "generated"}, {"name": "shout"}]
        shout = names["shout"]
        assert parse(wishes, names) == (-shout).at(Positions.generated()) + shout

    def test_one_learned_on_another_model_is_refused(self, names: Names) -> None:
        """Of the same shape, too: what tells is the fingerprint of the weights."""
        learned = steering((1, Add(direction(1)), RULES[0]))
        config = SimpleNamespace(model_type="llama", vocab_size=32, hidden_size=WIDTH, num_hidden_layers=LAYERS)
        table = torch.randn(32, WIDTH).bfloat16()
        rows = {row: table[row].view(torch.uint8).numpy().tobytes() for row in range(32)}
        engine = Engine({"trimtab_hello": [HELLO], "trimtab_put": [None], "trimtab_rows": [rows]})
        engine.vllm_config.model_config = SimpleNamespace(model="org/this", hf_text_config=config, hf_config=None)
        here = run(identify(engine), engine)
        assert here.name == "org/this"
        assert here.fingerprint == fingerprint("llama", [32, WIDTH], table[sampled_rows(32)])
        for model, refused in ((here, False), (replace(here, name="org/that", fingerprint="0" * 16), True)):
            names.register("calm", replace(learned, card=Card("caa", model=model)))
            if refused:
                with pytest.raises(TrimtabError, match="was learned on org/that, this is org/this"):
                    self.ask(engine, "calm", names)
            else:
                assert wire_of(self.ask(engine, "calm", names))

    def test_what_the_server_makes_of_a_request_cant_be_asked_for(self, names: Names) -> None:
        """Over HTTP any sampling parameters can be given; this one says what acts, unchecked."""
        made = type("Async", (Engine,), {})
        patch_engines(type("Patched", (Engine,), {}), made, names)
        forged = SimpleNamespace(extra_args={RESOLVED_KEY: Wire().to_plain()})
        with pytest.raises(TrimtabError, match="asks for steering as 'steering'"):
            asyncio.run(made.add_request(made({}), "1", "hi", forged))

    def test_a_folder_of_steerings(self, tmp_path: Any) -> None:
        save(steering((1, Add(direction(1)), RULES[0])), tmp_path / "calm.safetensors")
        names = Names()
        names.load(tmp_path)
        assert list(names) == ["calm"]
        gated = steering((1, Add(direction(1)), RULES[0])).when(Threshold(Site(0), direction(2), 0.0))
        with pytest.raises(UnsupportedError, match="a separate forward pass"):
            names.register("gated", gated)
        with pytest.raises(TrimtabError, match="no folder"):
            names.load(tmp_path / "none")

    def test_workers_forget_what_is_no_longer_named(self, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trimtab.engines.vllm.frontend.MAX_UNNAMED", 1)
        monkeypatch.setattr("trimtab.engines.vllm.frontend.GRACE_SECONDS", 0.0)
        engine = Engine({"trimtab_put": [None], "trimtab_drop": [[]]})
        link = Link(4, LAYERS, WIDTH, False)
        run(send(link, names["shout"]), engine)
        others = [steering((1, Add(direction(i)), RULES[0])) for i in (2, 3)]
        for other in others:
            run(send(link, other), engine)
        run(drop_unused(link, names), engine)
        assert engine.calls[-1] == ("trimtab_drop", ([content_of(others[0])[0]],))
        assert list(link.sent) == [content_of(s)[0] for s in (names["shout"], others[1])]


class TestRequests:
    """What vLLM's server is asked, in the shape that trimtab's own server takes."""

    @pytest.fixture
    def kind(self) -> type:
        class Request:
            def __init__(self, xargs: Any = None, **fields: Any) -> None:
                self.vllm_xargs, self.model_extra = xargs, fields

            def to_sampling_params(self) -> Any:
                return SimpleNamespace(extra_args=self.vllm_xargs)

            def to_beam_search_params(self) -> str:
                return "beams"

        patch_request(Request)
        patch_request(Request)
        return Request

    def test_steering_as_a_field_of_its_own(self, kind: type) -> None:
        wishes = [{"name": "shout", "strength": 2.0}]
        assert kind(steering=wishes).to_sampling_params().extra_args == {"steering": wishes}
        assert kind({"other": 1}, steering=wishes).to_sampling_params().extra_args == {"other": 1, "steering": wishes}
        assert kind({"steering": "shout"}).to_sampling_params().extra_args == {"steering": "shout"}
        assert kind(steering=[], emphasize=[], rejection=False).to_sampling_params().extra_args is None
        assert kind().to_beam_search_params() == "beams"

    def test_what_would_be_dropped_is_refused(self, kind: type) -> None:
        wishes = [{"name": "shout"}]
        for fields, why in (
            ({"emphasize": ["in capitals"]}, "ask for rejection: false"),
            ({"emphasize": [{"text": 1}], "rejection": False}, "emphasize takes phrases"),
            ({"emphasize": [], "xargs": {"emphasize": 5}, "rejection": False}, "a list of 1 to 16 phrases"),
            ({"rejection": True, "steering": wishes}, "rejection needs more than one row"),
            ({"xargs": {"steering": "shout"}, "steering": wishes}, "give it once"),
        ):
            with pytest.raises(TrimtabError, match=why):
                kind(**fields).to_sampling_params()
        for fields in ({"steering": wishes}, {"xargs": {"steering": "shout"}}):
            with pytest.raises(UnsupportedError, match="beam search"):
                kind(**fields).to_beam_search_params()


class TestEndpoint:
    """Steerings over HTTP, with the server's own web framework."""

    @pytest.fixture
    def client(self, names: Names, monkeypatch: pytest.MonkeyPatch) -> Any:
        applications = pytest.importorskip("starlette.applications", reason="there is no web framework here")
        testing = pytest.importorskip("starlette.testclient", reason="there is no client for tests here")
        engine = Engine({"trimtab_hello": [HELLO], "trimtab_put": [None], "trimtab_drop": [[]]})
        call = engine.collective_rpc

        async def answer(method: str, args: tuple) -> list[Any]:
            return call(method, args)

        engine.collective_rpc = answer  # type: ignore[method-assign, assignment]
        app = applications.Starlette()
        endpoint = Endpoint(names)
        endpoint.attach_router(app)
        asyncio.run(endpoint.init_state(engine, app.state, SimpleNamespace()))
        monkeypatch.setenv("TRIMTAB_ADMIN_KEY", "secret")
        return testing.TestClient(app)

    @pytest.fixture
    def names(self) -> Names:
        names = Names()
        names.register("shout", steering((1, Add(direction(1)), RULES[0])))
        return names

    def test_steerings_come_and_go(self, client: Any, names: Names) -> None:
        key = {"Authorization": "Bearer secret"}
        assert client.get("/trimtab").json() == {"steerings": ["shout"], "layers": LAYERS, "width": WIDTH}
        calm = steering((2, Add(direction(2)), RULES[2]))
        put = client.put("/trimtab/steerings/calm", content=steering_to_bytes(calm), headers=key)
        assert put.json() == {"steerings": ["calm", "shout"]}
        assert names["calm"] == calm
        assert client.delete("/trimtab/steerings/shout", headers=key).json() == {"steerings": ["calm"]}
        gone = client.delete("/trimtab/steerings/shout", headers=key)
        assert gone.status_code == 400
        assert "there is no steering 'shout'; registered: calm" in gone.json()["error"]

    def test_only_with_the_key(self, client: Any, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
        for headers in ({}, {"Authorization": "Bearer guess"}):
            assert client.delete("/trimtab/steerings/shout", headers=headers).status_code == 401
        monkeypatch.delenv("TRIMTAB_ADMIN_KEY")
        assert client.delete("/trimtab/steerings/shout", headers={"Authorization": "Bearer "}).status_code == 403
        assert list(names) == ["shout"]

    def test_what_doesnt_fit_isnt_taken(self, client: Any, names: Names) -> None:
        key = {"Authorization": "Bearer secret"}
        for content, why in (
            (b"nonsense", "isn't a safetensors file"),
            (steering_to_bytes(steering((LAYERS, Add(direction(1)), RULES[0]))), "this model has layers"),
        ):
            answer = client.put("/trimtab/steerings/bad", content=content, headers=key)
            assert answer.status_code == 400
            assert why in answer.json()["error"]
        assert list(names) == ["shout"]


class TestWorkers:
    @pytest.mark.parametrize("adds_only", [False, True])
    def test_a_block_is_steered_behind_what_it_puts_out(self, adds_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """What adds needs the first of a pair alone; shown the second, the compiler has to keep it."""
        seen: list[Any] = []
        sites = [Site(5), Site(6)]
        shown = SimpleNamespace(apply=lambda *arguments: seen.append(arguments), numbered=sites)
        monkeypatch.setattr(operator, "MANAGERS", [shown])
        hidden, residual = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
        block, plain = torch.nn.Identity(), torch.nn.Identity()
        attach({Site(5): Place(block, WIDTH), Site(6): Place(plain, WIDTH)}, 0, adds_only=sites[: int(adds_only)])
        assert block((hidden, residual)) == (hidden, residual)
        plain(hidden)
        assert [site for site, _, _ in seen] == sites
        assert seen[0][1].equal(hidden)
        assert seen[0][2] is None if adds_only else seen[0][2].equal(residual)
        assert seen[1][1].equal(hidden)
        assert seen[1][2] is None
        with pytest.raises(UnsupportedError, match="neither a tensor nor a pair"):
            block((hidden, residual, hidden))

    def test_engines_that_cant_be_steered_say_why(self) -> None:
        """All reasons, each from the setting that it is about, and none for an ordinary engine."""

        def config(**changes: Any) -> Any:
            part = {"model_config": SimpleNamespace(runner_type="generate", is_encoder_decoder=False)}
            part |= {"compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False))}
            part |= {"parallel_config": SimpleNamespace(enable_dbo=False, prefill_context_parallel_size=1)}
            return SimpleNamespace(**part | {"speculative_config": None, "kv_transfer_config": None} | changes)

        assert config_problems(config()) == []
        parallel = SimpleNamespace(enable_dbo=True, prefill_context_parallel_size=2)
        for options, why in (
            ({"speculative_config": object()}, ["speculative decoding"]),
            ({"kv_transfer_config": object()}, ["KV connector"]),
            ({"compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=True))}, ["sequence"]),
            ({"parallel_config": SimpleNamespace(use_sequence_parallel_moe=True)}, ["sequence"]),
            ({"parallel_config": parallel}, ["DBO", "prefill context"]),
            ({"model_config": SimpleNamespace(runner_type="pooling", is_encoder_decoder=True)}, ["embed", "encoder"]),
        ):
            reasons = config_problems(config(**options))
            assert len(reasons) == len(why)
            assert all(word in reason for word, reason in zip(why, reasons, strict=True))

    def test_a_model_runner_that_nobody_knows_isnt_steered(self) -> None:
        listened = {"execute_model": 0, "sample_tokens": 0, "get_model": 0}
        for own in ("_model_forward", "prepare_inputs"):
            assert runner_problems(SimpleNamespace(**listened, **{own: 0})) == []
            (reason,) = runner_problems(SimpleNamespace(execute_model=0, get_model=0, **{own: 0}))
            assert "its model runner types.SimpleNamespace isn't one of the two" in reason
        assert runner_problems(SimpleNamespace(**listened))


@pytest.mark.skipif(not has_vllm(), reason="vLLM isn't installed here")
class TestPlaces:
    """The places inside vLLM that the plugin relies on, by its source: a GPU's runner can't be imported on a CPU."""

    @pytest.mark.parametrize(
        ("file", "name", "methods"),
        [
            ("v1/worker/gpu_model_runner.py", "GPUModelRunner", {"execute_model", "sample_tokens", "_model_forward"}),
            ("v1/worker/gpu/model_runner.py", "GPUModelRunner", {"execute_model", "sample_tokens", "prepare_inputs"}),
            ("v1/core/sched/scheduler.py", "Scheduler", {"update_from_output", "finish_requests", "_free_request"}),
            ("v1/engine/llm_engine.py", "LLMEngine", {"step", "has_unfinished_requests", "add_request"}),
            ("v1/engine/async_llm.py", "AsyncLLM", {"generate", "add_request"}),
            ("v1/engine/output_processor.py", "OutputProcessor", {"add_request", "process_outputs"}),
            ("v1/engine/input_processor.py", "InputProcessor", {"process_inputs"}),
            ("v1/engine/core.py", "EngineCore", {"collective_rpc", "preprocess_add_request"}),
        ],
    )
    def test_methods(self, file: str, name: str, methods: set[str]) -> None:
        (class_node,) = (node for node in self.tree(file).body if isinstance(node, ast.ClassDef) and node.name == name)
        assert methods <= {
            part.name for part in class_node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
        }

    def test_steps_are_prepared_and_run_where_the_plugin_listens(self) -> None:
        first = ast.unparse(self.tree("v1/worker/gpu_model_runner.py"))
        assert first.count("self._model_forward(") == 1
        second = ast.unparse(self.tree("v1/worker/gpu/model_runner.py"))
        assert second.count("self.prepare_inputs(") == 1
        assert "if not dummy_run:" in second
        assert "dummy_run: bool=False" in second
        assert "dummy_run=True" in second  # by name, as the plugin looks for it

    def test_failures_reach_a_front_end(self) -> None:
        from vllm.exceptions import GenerationError
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.request import RequestStatus

        assert RequestStatus.get_finished_reason(RequestStatus.FINISHED_ERROR) == FinishReason.ERROR
        sent = EngineCoreOutputs()
        sent.outputs.append(EngineCoreOutput("a", [], finish_reason=FinishReason.ERROR, stop_reason="trimtab: why"))
        assert EngineCoreOutputs().outputs == []
        assert str(GenerationError("trimtab: why")) == "trimtab: why"

    def test_doses_reach_a_front_end(self) -> None:
        from vllm.v1.engine import EngineCoreOutput

        assert EngineCoreOutput("a", [1]).kv_transfer_params is None
        read = ast.unparse(self.tree("v1/engine/output_processor.py"))
        for name in ("self.external_req_id = ", "self.request_index = ", "self.parent_req = ", "self.request_states: "):
            assert name in read
        assert "kv_transfer_params = engine_core_output.kv_transfer_params" in read  # and from nowhere else

    def tree(self, file: str) -> ast.Module:
        spec = find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        return ast.parse((Path(spec.origin).parent / file).read_text())


class TestAround:
    def test_versions(self) -> None:
        assert check_version("0.32.0") == "0.32.0"
        with pytest.raises(UnsupportedError, match=r"supports vLLM 0\.31 and 0\.32, and this is 0\.40\.1"):
            check_version("0.40.1")
        with pytest.warns(UntestedVersionWarning, match=r"vLLM 0\.33\.0 is newer than 0\.32, the newest"):
            check_version("0.33.0")

    def test_what_is_installed_with_trimtab_is_a_version_that_is_steered(self) -> None:
        project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
        low, high = (int(minor) for minor in re.search(r'"vllm>=0\.(\d+),<0\.(\d+)"', project).groups())
        assert tuple(f"0.{minor}" for minor in range(low, high)) == SUPPORTED

    def test_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert settings_from_environment() == Settings()
        monkeypatch.setenv("TRIMTAB_SLOTS", "12")
        assert settings_from_environment().slots == 12
        monkeypatch.setenv("TRIMTAB_SLOTS", "one")
        with pytest.raises(TrimtabError, match="TRIMTAB_SLOTS is a whole number from 2, got 'one'"):
            settings_from_environment()
        monkeypatch.delenv("TRIMTAB_SLOTS")
        wanted = Capacity(rank=2, layers=(1,))
        assert settings_from_environment(wanted) == Settings(capacity=wanted.to_plain())
        monkeypatch.setenv("TRIMTAB_KERNEL", "projections")
        assert Capacity.from_plain(settings_from_environment(wanted).capacity) == Capacity(rank=4)
        monkeypatch.setenv("TRIMTAB_MAPS", "1")
        with pytest.raises(TrimtabError, match="TRIMTAB_MAPS is a whole number from 2, got '1'"):
            settings_from_environment()

    def test_a_steering_as_bytes(self) -> None:
        original = steering((1, Add(direction(1)), RULES[0]), (2, Ablate(direction(2)), RULES[1]))
        assert steering_from_bytes(steering_to_bytes(original), "it") == original
        with pytest.raises(TrimtabError, match="it isn't a safetensors file"):
            steering_from_bytes(b"{}", "it")

    @pytest.mark.skipif(has_vllm(), reason="vLLM is installed here")
    def test_the_command_line_says_that_vllm_is_missing(self, trimtab: Any) -> None:
        ran = trimtab("generate", "--engine", "vllm", "--prompt", "What is the sea?")
        assert ran.code == 2
        assert "needs vLLM, which isn't installed here" in ran.err

    def test_an_unknown_engine(self) -> None:
        with pytest.raises(TrimtabError, match="there is no engine 'tgi'; engines: transformers, llamacpp, vllm"):
            tiny.LM.load(engine="tgi")
