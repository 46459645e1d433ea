"""Patches for vLLM's front-end classes, which resolve the steering of requests before they are accepted.

They also process the core's reports: why a request that wasn't steered as planned was ended, and the doses of requests
with a cap.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm import emphasized
from trimtab.engines.vllm.counting import DOSES, FAILURE_PREFIX
from trimtab.engines.vllm.frontend import LINK, NAMES, Link, Names, resolve
from trimtab.engines.vllm.request_context import REQUEST_CONTEXT, RequestContext, request_context_for
from trimtab.engines.vllm.rpc import run, run_async
from trimtab.engines.vllm.wire import RESOLVED_KEY, wire_of
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.spans import Span

FAILURES = "_trimtab_failures"  # attribute of an engine: reasons of failed requests, until one is raised


def failure_reason(output: Any) -> str | None:
    """Why a request that should have been steered and wasn't was ended, or `None`."""
    for choice in output.outputs if output.finished and hasattr(output.outputs, "__iter__") else ():
        if choice.finish_reason == "error" and str(choice.stop_reason).startswith(FAILURE_PREFIX):
            return str(choice.stop_reason)
    return None


def _is_delta(args: Any, kwargs: Any) -> bool:
    """Whether `generate` was called with parameters for which each output has only the new tokens."""
    params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
    return getattr(getattr(params, "output_kind", None), "name", "") == "DELTA"


def patch_engines(
    sync: Any,
    asynchronous: Any,
    names: Names = NAMES,
    refusal: Callable[[str], Exception] = TrimtabError,
    failure: Callable[[str], Exception] = TrimtabError,
) -> None:
    """Make vLLM's `LLMEngine` and `AsyncLLM` resolve the steering of requests before they accept them.

    They also raise for requests that weren't steered as planned, which the scheduler has ended with an error. vLLM's
    server reports any exception as an internal error, except `refusal`, for which it returns the reason to the client;
    `failure` is the equivalent while it generates.
    """
    step, generate = sync.step, asynchronous.generate
    add_sync, add_async = sync.add_request, asynchronous.add_request

    def add_request(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        spans = _spans(self, prompt, params)
        return add_sync(self, request_id, prompt, run(resolve(self, params, names, None, spans), self), *args, **kwargs)

    async def add_request_async(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            request_context = request_context_for(prompt, params)
            spans: tuple[Span, ...] = ()
            if _emphasis_request(params, request_context) is not None:
                spans = await asyncio.to_thread(_spans, self, prompt, params, request_context)
            params = await run_async(resolve(self, params, names, request_context, spans), self)
            if request_context is not None:
                if spans:
                    request_context.record_emphasis(str(request_id), spans, getattr(self, LINK).layers)
                await request_context.start()
            return await add_async(self, request_id, prompt, params, *args, **kwargs)
        except TrimtabError as error:
            raise refusal(str(error)) from error

    def step_and_raise(self: Any) -> Any:
        """Run all requests to their end; then raise for the first one that wasn't steered."""
        outputs = step(self)
        failures = self.__dict__.setdefault(FAILURES, [])
        failures += filter(None, map(failure_reason, outputs))
        if failures and not self.has_unfinished_requests():
            setattr(self, FAILURES, [])
            raise TrimtabError(failures[0])
        return outputs

    async def generate_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        request_context = REQUEST_CONTEXT.get()
        async for output in generate(self, *args, **kwargs):
            if request_context is not None:
                request_context.record_output(output, delta=_is_delta(args, kwargs))
            if reason := failure_reason(output):
                if request_context is not None:
                    request_context.fail(reason)
                raise failure(reason)
            yield output

    sync.add_request = add_request
    sync.step = step_and_raise
    asynchronous.add_request = add_request_async
    asynchronous.generate = generate_and_report


def _emphasis_request(params: Any, request_context: RequestContext | None) -> emphasized.EmphasisRequest | None:
    """What to emphasize, or `None`. Raises `TrimtabError` if it can't be parsed."""
    if request_context is not None and request_context.emphasis is not None:
        return request_context.emphasis
    wanted = (getattr(params, "extra_args", None) or {}).get(emphasized.EMPHASIZED)
    return emphasized.parse_emphasis(wanted) if wanted else None


def _spans(engine: Any, prompt: Any, params: Any, request_context: RequestContext | None = None) -> tuple[Span, ...]:
    """The spans to emphasize in the prompt. Raises `TrimtabError` if a phrase isn't in it."""
    wanted = _emphasis_request(params, request_context)
    return () if wanted is None else emphasized.find(engine, prompt, wanted)


def patch_outputs(processor: Any) -> None:
    """Make vLLM's `OutputProcessor` pass the doses in the core's outputs to the request contexts."""
    add, process = processor.add_request, processor.process_outputs

    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        done = add(self, request, *args, **kwargs)
        state, request_context = self.request_states.get(request.request_id), REQUEST_CONTEXT.get()
        if state is not None and request_context is not None:
            state._trimtab_context = request_context
        return done

    def process_outputs(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            if isinstance(output.kv_transfer_params, dict) and DOSES in output.kv_transfer_params:
                doses, output.kv_transfer_params = output.kv_transfer_params[DOSES], None
                state = self.request_states.get(output.request_id)
                request_context: RequestContext | None = getattr(state, "_trimtab_context", None)
                if state is not None and request_context is not None:
                    parent = state if state.parent_req is None else state.parent_req
                    request_context.record_doses((parent.external_req_id, state.request_index), doses)
        return process(self, outputs, *args, **kwargs)

    processor.add_request = add_request
    processor.process_outputs = process_outputs


def patch_inputs(processor: Any) -> None:
    """Make vLLM's `InputProcessor` compute over which of a request's tokens each steering acts."""
    original = processor.process_inputs

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        wire = wire_of(request.sampling_params)
        if wire is not None:
            if request.prompt_token_ids is None:
                raise UnsupportedError("a prompt of embeddings has no tokens to steer at; give text or token ids")
            extra = request.sampling_params.extra_args
            link: Link = getattr(self, LINK)
            final_wire = link.wire_for_prompt(wire, wire.prompt_length or len(request.prompt_token_ids))
            request.sampling_params.extra_args = {**extra, RESOLVED_KEY: final_wire.to_plain()}
        return request

    processor.process_inputs = process_inputs
