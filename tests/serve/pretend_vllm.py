"""vLLM's server without vLLM: its routes as far as a door sees them, and an engine of its kind, with a tiny model.

The engine's class is patched by the plugin, as vLLM's is, and obeys what the plugin makes of a request; trimtab's own
routes are those of its endpoint plugin.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trimtab.engines.vllm.counting import DOSE
from trimtab.engines.vllm.endpoint import Endpoint
from trimtab.engines.vllm.frontend import LINK, Names, connect
from trimtab.engines.vllm.patched import patch_engines
from trimtab.engines.vllm.request_context import REQUEST_CONTEXT
from trimtab.engines.vllm.rpc import run_async
from trimtab.engines.vllm.wire import STEERING_KEY, identified_edits, wire_of
from trimtab.steering import Steering
from trimtab.text.spans import render


class Refused(ValueError):
    """vLLM's `VLLMValidationError`."""


class Broken(Exception):
    """vLLM's `GenerationError`."""


class Engine:
    """vLLM's `AsyncLLM`, whose one worker is a model of transformers'."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.received: list[Any] = []  # what reached the core
        self.late = False  # whether it is after the last token that a dose turns out to be too high
        self.input_processor = SimpleNamespace()
        parallel = SimpleNamespace(world_size=1, data_parallel_size=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, additional_config={})

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        layers, width = self.lm.layout.layers, self.lm.layout.width
        hello = {"reasons": [], "unfired": [], "rank": 0, "layers": layers, "width": width, "static": False}
        hello |= {"here": list(range(layers)), "dtype": "float32", "unmeasured": ""}
        identity = {"trimtab_hello": hello, "trimtab_put": None, "trimtab_drop": []}
        return [identity[method]]

    def get_tokenizer(self) -> Any:
        return self.lm.tokenizer

    async def add_request(self, request_id: str, prompt: Any, params: Any) -> Any:
        self.received.append(params)
        return params

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        params = await self.add_request(request_id, prompt, sampling_params)
        wire, link = wire_of(params), getattr(self, LINK)
        parts = [
            edit for part in (wire.parts if wire else ()) for edit in identified_edits(part, link.sent[part.digest])
        ]
        steering = Steering(tuple(part.edit for part in parts)) if parts else None
        ask = {"max_new_tokens": params.max_tokens, "chat": prompt["chat"]}
        (answer,) = await asyncio.to_thread(self.lm.generate, prompt["messages"], steering, **ask)
        ids = prompt["prompt_token_ids"]
        said = [self.lm.tokenizer.decode(answer.token_ids[: i + 1]) for i in range(len(answer.token_ids))]
        pushes = [(at.layer, at.kind, at.ratio, at.tokens) for at in answer.applied.doses if at.kind != "keys"]
        dose = sum(ratio for _, _, ratio, _ in pushes)
        reason = f"{DOSE}of all sites add up to {dose:.2g}"
        high = wire is not None and wire.cap is not None and dose > wire.cap
        if wire is not None and wire.cap is not None:
            REQUEST_CONTEXT.get().record_doses((request_id, 0), pushes)
        if high and not self.late:
            yield _output(request_id, ids, (), "", "error", reason)
        elif params.output_kind.name == "DELTA":
            before = ""
            for i, (token, text) in enumerate(zip(answer.token_ids, said, strict=True)):
                last = i + 1 == len(said) and not high
                yield _output(request_id, ids, (token,), text.removeprefix(before), "length" if last else None)
                before = text
            if high:
                yield _output(request_id, ids, (), "", "error", reason)
        else:
            yield _output(request_id, ids, answer.token_ids, answer.text, "length")


def _output(name: str, prompt: Any, ids: Any, text: str, finish: str | None, reason: str | None = None) -> Any:
    output = SimpleNamespace(index=0, token_ids=ids, text=text, finish_reason=finish, stop_reason=reason)
    return SimpleNamespace(request_id=name, prompt_token_ids=prompt, outputs=[output], finished=finish is not None)


def make_app(lm: Any, names: Names, door: Any) -> Starlette:
    """vLLM's application with the door in it; `app.state.engine` is the engine."""
    kind = type("AsyncLLM", (Engine,), {})
    patch_engines(type("LLMEngine", (Engine,), {"step": None}), kind, names, Refused, Broken)
    engine, endpoint = kind(lm), Endpoint(names)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield

    async def answer(request: Request) -> Response:
        body = await request.json()
        chat = "messages" in body
        said = body["messages"] if chat else body.get("prompt") or body["input"]
        prompt = {"messages": said, "chat": None if chat else False}
        rendered = render(lm.tokenizer, said, chat=prompt["chat"])
        prompt |= {"type": "token", "prompt": rendered.text, "prompt_token_ids": list(rendered.ids)}
        kind = SimpleNamespace(name="DELTA" if body.get("stream") else "FINAL_ONLY")
        extra = {
            **(body.get("vllm_xargs") or {}),
            **({STEERING_KEY: body[STEERING_KEY]} if STEERING_KEY in body else {}),
        }
        params = SimpleNamespace(extra_args=extra, output_kind=kind, max_tokens=body.get("max_tokens") or 5, n=1)
        name = f"x-{request.headers.get('x-request-id')}"
        coming = engine.generate(prompt, sampling_params=params, request_id=name)
        if body.get("stream"):
            events = _responses(coming) if "input" in body else _chunks(coming, name)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            text = "".join([output.outputs[0].text async for output in coming])
        except (Refused, Broken) as error:
            return JSONResponse(_error(error), _error(error)["error"]["code"])
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse({"id": name, "model": body["model"], "choices": [{"index": 0, **choice}]})

    async def plain(request: Request) -> Response:
        return JSONResponse({"here": request.url.path})

    routes = [Route(path, answer, methods=["POST"]) for path in (*ANSWERING, *UNKNOWN)]
    routes += [Route(path, plain, methods=["GET", "POST"]) for path in PLAIN]
    app = Starlette(routes=routes, middleware=[Middleware(door)], lifespan=lifespan)
    endpoint.attach_router(app)
    app.state.engine = engine
    asyncio.run(_started(engine, endpoint, app.state))
    return app


ANSWERING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PLAIN = ("/health", "/v1/models", "/metrics", "/tokenize")
UNKNOWN = ("/v1/messages", "/inference/v1/generate", "/invocations")


async def _started(engine: Any, endpoint: Endpoint, state: Any) -> None:
    link = await run_async(connect(engine), engine)
    link.identity = engine.lm.identity  # which takes rows of a worker's embeddings to tell
    await endpoint.init_state(engine, state, SimpleNamespace())


def _error(error: Exception) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": "x", "param": None, "code": 500 if type(error) is Broken else 400}}


async def _chunks(coming: Any, name: str) -> AsyncIterator[str]:
    head, first = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "trimtab"}, True
    try:
        async for output in coming:
            for delta in [{"role": "assistant"}] * first + [{"content": output.outputs[0].text}]:
                yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta}]})}\n\n"
            first = False
    except (Refused, Broken) as error:
        yield f"data: {json.dumps(_error(error))}\n\n"
    yield "data: [DONE]\n\n"


async def _responses(coming: Any) -> AsyncIterator[str]:
    """Its first event comes before the engine gets the request, as vLLM's does."""
    yield 'event: response.created\ndata: {"type": "response.created"}\n\n'
    text = "".join([output.outputs[0].text async for output in coming])
    last = {"type": "response.completed", "response": {"output": text}}
    yield f"event: response.completed\ndata: {json.dumps(last)}\n\n"
