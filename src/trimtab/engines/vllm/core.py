"""The plugin in vLLM's engine core: prefix cache keys, waiting for slots, and ending requests that went wrong.

A cache block's key contains what acts on the block's own tokens; what acted on earlier tokens is in its parent's key. A
request that is steered only while it generates therefore shares its prompt's blocks with unsteered requests. Blocks of
steered tokens, generated or in the prompt, are reused only under the same steering.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from trimtab.engines.vllm.counting import DOSES, FAILURE_PREFIX, RECEIPT, Measured
from trimtab.engines.vllm.emphasized import EMPHASIZED
from trimtab.engines.vllm.settings import settings_of
from trimtab.engines.vllm.wire import STEERING_KEY, Wire, wire_of
from trimtab.errors import TrimtabError

Key = tuple[str, str]
NO_RECEIPT: tuple[int, dict[str, str], dict[str, Measured]] = (0, {}, {})


def block_keys(wire: Wire | None, start: int, stop: int) -> list[Key]:
    """The extra keys of a block with tokens `start` to `stop`; empty if nothing acts on it."""
    acting = [
        f"{max(span.start, start) - start}:{(stop if span.stop is None else min(span.stop, stop)) - start}:{span.key}"
        for span in (wire.spans if wire else ())
        if span.start < stop and (span.stop is None or span.stop > start)
    ]
    return [("trimtab", ",".join(acting))] if acting else []


def patch_keys(module: Any) -> None:
    """Make vLLM's `kv_cache_utils` add `block_keys` to a block's extra keys."""
    original = module._gen_prompt_embeds_extra_hash_keys  # the helper that receives the block's bounds

    def keys(request: Any, start_token_idx: int, end_token_idx: int) -> list[Any]:
        original_keys = original(request, start_token_idx, end_token_idx)
        return [*original_keys, *block_keys(_wire(request), start_token_idx, end_token_idx)]

    module._gen_prompt_embeds_extra_hash_keys = keys


def _wire(request: Any) -> Wire | None:
    """A request's wire, parsed from plain data once."""
    try:
        return request._trimtab_wire
    except AttributeError:
        request._trimtab_wire = wire_of(request.sampling_params)
        return request._trimtab_wire


class SlotQueue:
    """The slots that a scheduler's requests occupy, and the requests that wait for one, in order of arrival.

    There are `slots` slots for additions, and `maps` for the other operations of captured graphs; one of each is the
    empty one.
    """

    def __init__(self, slots: int, maps: int = 1) -> None:
        self.most: tuple[int, int] = (slots - 1, maps - 1)
        self.users: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self.waiting: deque[Any] = deque()
        self.held: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self.doses: dict[str, Measured] = {}
        """Doses of capped requests that haven't been attached to an output yet."""
        self.steered: set[str] = set()
        """The requests in the scheduler that have a wire."""

    def reserve(self, request: Any) -> bool:
        """Reserve slots for a request. Returns whether there was room."""
        wire = _wire(request)
        if wire is None:
            return True
        needs = (wire.slots, wire.maps)
        for most, users, wanted in zip(self.most, self.users, needs, strict=True):
            if wanted and len(users) + len(wanted - users.keys()) > most:
                return False
        for users, wanted in zip(self.users, needs, strict=True):
            users.update(wanted)
        self.held[request.request_id] = needs
        self.steered.add(request.request_id)
        return True

    def release(self, request: str) -> None:
        """Release the slots of a finished request."""
        self.steered.discard(request)
        self.doses.pop(request, None)
        for users, held in zip(self.users, self.held.pop(request, ()), strict=False):
            for key in held:
                users[key] -= 1
                if not users[key]:
                    del users[key]

    def needed_digests(self) -> set[str]:
        """The digests that waiting requests need."""
        return {part.digest for request in self.waiting for part in _parts(request)}


def _parts(request: Any) -> tuple[Any, ...]:
    wire = _wire(request)
    return wire.parts if wire else ()


def _slot_queue_of(scheduler: Any) -> SlotQueue:
    try:
        return scheduler._trimtab_room
    except AttributeError:
        settings = settings_of(scheduler.vllm_config)
        scheduler._trimtab_room = SlotQueue(settings.slots, settings.maps)
        return scheduler._trimtab_room


def unsteered_requests(slot_queue: SlotQueue, scheduled: Any, output: Any) -> dict[str, str]:
    """The requests of a step that weren't steered as planned, with reasons, according to the receipt in its output."""
    here = slot_queue.steered & scheduled.num_scheduled_tokens.keys()
    if not here:
        return {}
    held, faults, _ = getattr(output, RECEIPT, NO_RECEIPT)
    if held < len(here):
        message = f"{FAILURE_PREFIX}a worker computed {len(here)} steered requests, but accounted for {held} of them"
        return dict.fromkeys(here, message)
    return {request: reason for request, reason in faults.items() if request in here}


class Failure(NamedTuple):
    """vLLM's classes and constants for ending a request with an error: its status, and what is sent to a front end."""

    status: Any
    reason: Any
    output: Callable[..., Any]
    outputs: Callable[..., Any]


def patch_scheduler(scheduler: Any, failure: Failure) -> None:
    """Make vLLM's `Scheduler` hold back requests for whose steering there is no free slot.

    It also ends requests that should have been steered and weren't with an error, before the step's token is sent.
    """
    add, free, finish = scheduler.add_request, scheduler._free_request, scheduler.finish_requests
    update = scheduler.update_from_output

    def update_from_output(self: Any, scheduled: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        slot_queue = _slot_queue_of(self)
        reasons = unsteered_requests(slot_queue, scheduled, output)
        measured = getattr(output, RECEIPT, NO_RECEIPT)[2]
        slot_queue.doses |= {request: doses for request, doses in measured.items() if request in self.requests}
        doses = dict(slot_queue.doses)  # a copy: `update` drops the doses of requests that end
        failed = [self.requests[request] for request in reasons if request in self.requests]
        if failed:
            self.finish_requests([request.request_id for request in failed], failure.status)
        sent = update(self, scheduled, output, *args, **kwargs)
        for request in failed:
            name = request.request_id
            last = failure.output(
                request_id=name, new_token_ids=[], finish_reason=failure.reason, stop_reason=reasons[name]
            )
            sent.setdefault(request.client_index, failure.outputs()).outputs.append(last)
        for item in (item for several in sent.values() for item in several.outputs if doses):
            if item.request_id in doses:
                item.kv_transfer_params = {DOSES: doses[item.request_id]}  # free: no KV connector uses it
                slot_queue.doses.pop(item.request_id, None)
        return sent

    def add_request(self: Any, request: Any) -> None:
        slot_queue = _slot_queue_of(self)
        if request.request_id in self.requests:  # a session continues
            add(self, request)
        elif (slot_queue.waiting and _parts(request)) or not slot_queue.reserve(request):
            slot_queue.waiting.append(request)
        else:
            add(self, request)

    def _free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        done = free(self, request, *args, **kwargs)
        slot_queue = _slot_queue_of(self)
        slot_queue.release(request.request_id)
        while slot_queue.waiting and slot_queue.reserve(slot_queue.waiting[0]):
            add(self, slot_queue.waiting.popleft())
        return done

    def finish_requests(self: Any, request_ids: str | Iterable[str] | None, finished_status: Any) -> Any:
        slot_queue = _slot_queue_of(self)
        if request_ids is None:
            slot_queue.waiting.clear()
        else:
            removed_ids = {request_ids} if isinstance(request_ids, str) else set(request_ids)
            slot_queue.waiting = deque(
                request for request in slot_queue.waiting if request.request_id not in removed_ids
            )
            request_ids = removed_ids
        return finish(self, request_ids, finished_status)

    scheduler.add_request = add_request
    scheduler._free_request = _free_request
    scheduler.finish_requests = finish_requests
    scheduler.update_from_output = update_from_output


def patch_core(core: Any) -> None:
    """Make vLLM's `EngineCore` keep steerings that requests still need, and refuse unresolved requests for steering."""
    call, preprocess = core.collective_rpc, core.preprocess_add_request

    def collective_rpc(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        if method == "trimtab_drop":
            scheduler = self.scheduler
            alive = {part.digest for request in scheduler.requests.values() for part in _parts(request)}
            kept = [digest for digest in args[0] if digest in alive | _slot_queue_of(scheduler).needed_digests()]
            call(self, method, timeout, ([digest for digest in args[0] if digest not in kept],), kwargs)
            return [kept]
        return call(self, method, timeout, args, kwargs)

    def preprocess_add_request(self: Any, request: Any) -> Any:
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        if extra.get(STEERING_KEY) or extra.get(EMPHASIZED):
            raise TrimtabError("a request for steering came through a front end without trimtab's plugin")
        return preprocess(self, request)

    core.collective_rpc = collective_rpc
    core.preprocess_add_request = preprocess_add_request
