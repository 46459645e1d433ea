"""The routes, as a FastAPI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from copy import deepcopy
from functools import lru_cache
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab import __version__
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import steering_from_bytes
from trimtab.serve import reference
from trimtab.serve.adding import add_steering, check_may_add, learn_steering, remove_steering
from trimtab.serve.answering import answer
from trimtab.serve.answering import answer_responses_request as respond_to
from trimtab.serve.bounds import check_bounds, check_file
from trimtab.serve.described import steering_info
from trimtab.serve.fields import NAME
from trimtab.serve.guard import Guard
from trimtab.serve.make_response import respond_to_make
from trimtab.serve.monitored import MonitorList
from trimtab.serve.monitored import monitor_list as monitors_described
from trimtab.serve.playground.streams import run_until_drained
from trimtab.serve.policy import Key
from trimtab.serve.refusals import PASSING, ErrorBody, Json, Refusal, no_such_steering
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.schema_output import ChatCompletion, Completion, ModelInfo, ModelList
from trimtab.serve.schema_responses import ResponseObject, ResponsesRequest
from trimtab.serve.schema_steerings import Deleted, LearnRequest, MakeRequest, MakeResponse, SteeringInfo, SteeringList
from trimtab.serve.service import Service
from trimtab.serve.wording import validation_refusal
from trimtab.steering import Steering

DESCRIPTION = """OpenAI's completions with activation steering.

`steering` names steerings of this server and their strengths, `emphasize` the phrases of the prompt to follow, and
`rejection` weakens steering where it is implausible. The response's `trimtab` says what was applied. With OpenAI's
Python client: `client.chat.completions.create(…, extra_body={"steering": [{"name": "json", "strength": 1.2}]})`.
"""

NOWHERE = (
    "no such route; POST /v1/chat/completions, /v1/responses or /v1/completions for an answer, GET /v1/models and"
    " /v1/steerings for lists, and see /docs for all routes"
)
RETRY = {"headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is malformed, or can't be fulfilled."},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    403: {"model": ErrorBody, "description": "Not allowed with this key."},
    404: {"model": ErrorBody, "description": "There is no such model or steering."},
    408: {"model": ErrorBody, "description": "The request's body took too long to arrive."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    429: {"model": ErrorBody, "description": "The server is busy.", **RETRY},
    503: {
        "model": ErrorBody,
        "description": "The server is shutting down, or its audit log can't be written.",
        **RETRY,
    },
}
BUSY: dict[int | str, dict[str, Any]] = {
    429: {"model": ErrorBody, "description": "The queue is full.", **RETRY},
    504: {"model": ErrorBody, "description": "The answer took too long."},
}
# `itemSchema` describes each event; before OpenAPI 3.2, `schema` could mean the stream or an event.
EVENT: dict[str, Any] = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[str, Any] = {
    "text/event-stream": {"itemSchema": EVENT, "example": 'data: {"choices": […]}\n\ndata: [DONE]\n\n'}
}


class Health(BaseModel):
    """Whether the server is alive, or ready."""

    status: Literal["ok", "draining", "dead", "unaudited"]


def make_app(service: Service, *, local: bool = False, playground: bool = False, provider: Any = None) -> ASGIApp:
    """The application. The scheduler starts and stops with it; `local` is passed to `Guard`.

    `playground` adds the page at `/`, which needs gradio. `provider` is an OpenTelemetry tracer provider
    (`tracing.py`).
    """
    page: Any = None
    if playground:
        from trimtab.serve.playground.page import make_page

        page = make_page(service)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if not service.scheduler.alive:
            service.scheduler.start()
        async with page.lifespan() if page else nullcontext():
            yield
        await asyncio.to_thread(service.scheduler.close)
        service.audit.close()
        if provider is not None:
            await asyncio.to_thread(provider.shutdown)  # sends the remaining spans

    app = _api(service, lifespan)
    if provider is not None:
        from trimtab.serve.tracing import trace

        trace(app, provider)

    async def run_page(page: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        await run_until_drained(page, service.scheduler, scope, receive, send)

    return Guard(app, service, local=local, page=page, run_page=run_page)


def openapi() -> dict[str, Any]:
    """The OpenAPI document of a server with learning and uploads enabled. It needs no model."""
    return deepcopy(_api(SimpleNamespace(learn=True, upload=True), None).openapi())


def _api(service: Any, lifespan: Any) -> FastAPI:
    """All routes; only `service.learn` and `service.upload` decide which ones there are."""
    app = FastAPI(
        title="trimtab",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False))],
    )
    _add_error_handlers(app, service)
    _add_health_routes(app, service)
    _add_completion_routes(app, service)
    _add_steering_routes(app, service)
    _set_openapi_document(app, learn=bool(service.learn), upload=bool(service.upload))
    _add_docs_route(app)
    return app


_DOCUMENTS: dict[tuple[bool, bool], dict[str, Any]] = {}
"""The OpenAPI document of each kind of application: generating one takes as long as everything else."""


def _set_openapi_document(app: FastAPI, *, learn: bool, upload: bool) -> None:
    """The OpenAPI document without the 422 that FastAPI adds to each route: this server answers 400, as OpenAI does."""
    if (learn, upload) in _DOCUMENTS:
        app.openapi_schema = _DOCUMENTS[learn, upload]
        return
    _DOCUMENTS[learn, upload] = document = app.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)


def _add_docs_route(app: FastAPI) -> None:
    @lru_cache(maxsize=1)
    def shown() -> str:
        return reference.page(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(shown(), headers=reference.HEADERS)


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        request.state.refused = refusal.without_frames()  # for the audit log
        return refusal.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refuse(request, validation_refusal(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = NOWHERE
        elif error.status_code == 405:
            message = _not_allowed(service, request)
        refusal = Refusal(error.status_code, message)
        request.state.refused = refusal
        response = refusal.response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(TrimtabError)
    async def bad(request: Request, error: TrimtabError) -> Response:
        return await refuse(request, Refusal(400, str(error)))

    @app.exception_handler(Exception)
    async def broken(_request: Request, _error: Exception) -> Response:
        """The traceback goes to the server's log; the client gets an error in the API's format."""
        return Refusal(500, "something went wrong inside the server; see its log").response


def _not_allowed(service: Service, request: Request) -> str:
    """Why a route doesn't take this method; for steerings, the option of the server that is missing."""
    message = f"{request.url.path} doesn't take {request.method}"
    options = {
        "POST": (service.learn, "--learn"),
        "PUT": (service.upload, "--upload"),
        "DELETE": (service.learn or service.upload, "--learn or --upload"),
    }
    on, option = options.get(request.method, (True, ""))
    on = on or not request.url.path.startswith("/v1/steerings")
    return message if on else f"{message}: this server was started without {option}"


def _add_health_routes(app: FastAPI, service: Service) -> None:
    @app.get(
        "/healthz", tags=["health"], summary="Check whether the server is alive", responses={503: {"model": Health}}
    )
    async def healthz() -> Health:
        return Health(status="ok") if service.scheduler.alive else _unwell("dead")

    @app.get(
        "/readyz",
        tags=["health"],
        summary="Check whether the server accepts requests",
        responses={503: {"model": Health}},
    )
    async def readyz() -> Health:
        if not service.scheduler.alive:
            return _unwell("dead")
        if service.scheduler.draining:
            return _unwell("draining")
        return Health(status="ok") if service.audit.check() else _unwell("unaudited")

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: ERRORS[401]},
    )
    async def metrics() -> Response:
        return Response(
            service.metrics.text(service.scheduler, audited=service.audit.trouble is None),
            media_type="text/plain; version=0.0.4",
        )


def _unwell(status: str) -> Any:
    return Json({"status": status}, 503, {"Retry-After": str(PASSING[503])})


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    answers = {**ERRORS, **BUSY}

    @app.post(
        "/v1/chat/completions",
        tags=["completions"],
        summary="Answer a conversation",
        response_model=ChatCompletion,
        responses={
            **answers,
            200: {"content": STREAM, "description": "The answer; with `stream`, as server-sent events."},
        },
    )
    async def chat(request: Request, body: ChatRequest) -> Any:
        return await answer(service, request, body)

    @app.post(
        "/v1/completions",
        tags=["completions"],
        summary="Continue a text",
        response_model=Completion,
        responses={
            **answers,
            200: {"content": STREAM, "description": "The answer; with `stream`, as server-sent events."},
        },
    )
    async def complete(request: Request, body: CompletionRequest) -> Any:
        return await answer(service, request, body)

    @app.get("/v1/monitors", tags=["completions"], summary="List the monitors", responses={401: ERRORS[401]})
    async def monitors() -> MonitorList:
        return monitors_described(service)

    @app.post(
        "/v1/responses",
        tags=["completions"],
        summary="Answer a conversation (OpenAI's Responses API)",
        response_model=ResponseObject,
        responses={
            **answers,
            200: {"content": STREAM, "description": "The answer; with `stream`, as server-sent events."},
        },
    )
    async def responses(request: Request, body: ResponsesRequest) -> Any:
        return await respond_to(service, request, body)

    @app.get("/v1/models", tags=["completions"], summary="List the model", responses={401: ERRORS[401]})
    async def models() -> ModelList:
        return ModelList(data=[_model(service)])

    @app.get(
        "/v1/models/{model:path}",
        tags=["completions"],
        summary="Describe the model",
        responses={c: ERRORS[c] for c in (401, 404)},
    )
    async def model(model: str) -> ModelInfo:
        if model not in (service.lm.name, "trimtab"):
            raise Refusal(404, service.wrong_model_message(), code="model_not_found")
        return _model(service)


def _model(service: Service) -> ModelInfo:
    return ModelInfo(id=service.lm.name, created=service.started)


def _add_steering_routes(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/steerings", tags=["steerings"], summary="List the steerings you may use", responses={401: ERRORS[401]}
    )
    async def steerings(request: Request) -> SteeringList:
        key: Key = request.state.key
        return SteeringList(data=[steering_info(service.policy, key, loaded) for loaded in service.visible(key)])

    @app.get(
        "/v1/steerings/{name}",
        tags=["steerings"],
        summary="Describe a steering",
        responses={c: ERRORS[c] for c in (400, 401, 404)},
    )
    async def steering(request: Request, name: str) -> SteeringInfo:
        key: Key = request.state.key
        for loaded in service.visible(key):
            if loaded.name == name:
                return steering_info(service.policy, key, loaded)
        raise no_such_steering(name)

    if service.learn:

        @app.post(
            "/v1/steerings",
            tags=["steerings"],
            summary="Learn a steering from pairs",
            response_model=SteeringInfo,
            status_code=201,
            responses=ERRORS,
        )
        async def learn(request: Request, body: LearnRequest) -> SteeringInfo:
            key: Key = request.state.key
            check_may_add(service, key, body.name)
            made = await learn_steering(service, body)
            return steering_info(
                service.policy, key, add_steering(service, _audit_fields(request), body.name, made.steering, "learned")
            )

        @app.post(
            "/v1/steerings/make",
            tags=["steerings"],
            summary="Make a steering from a sentence, a persona or pairs, and measure its effect",
            response_model=MakeResponse,
            status_code=201,
            responses={
                **ERRORS,
                429: {**BUSY[429], "description": "Another steering is being made."},
                200: {
                    "model": MakeResponse,
                    "content": STREAM,
                    "description": "The verdict is negative, so nothing was added; with `stream`, events with the"
                    " progress, and the result at the end.",
                },
                201: {"description": "The steering was made and added."},
            },
        )
        async def make(request: Request, body: MakeRequest) -> Any:
            return await respond_to_make(service, request, _audit_fields(request), body)

    if service.upload:

        @app.put(
            "/v1/steerings/{name}",
            tags=["steerings"],
            summary="Upload a steering: the bytes of a .safetensors file",
            response_model=SteeringInfo,
            status_code=201,
            responses=ERRORS,
        )
        async def upload(
            request: Request,
            name: Annotated[str, Path(pattern=NAME)],
            data: Annotated[bytes, Body(media_type="application/octet-stream")],
        ) -> SteeringInfo:
            key: Key = request.state.key
            check_may_add(service, key, name)
            made = await asyncio.to_thread(_read, data)
            return steering_info(
                service.policy, key, add_steering(service, _audit_fields(request), name, made, "uploaded")
            )

    if service.upload or service.learn:

        @app.delete(
            "/v1/steerings/{name}",
            tags=["steerings"],
            summary="Delete a steering that you added",
            responses={c: ERRORS[c] for c in (400, 401, 403, 404, 503)},
        )
        async def delete(request: Request, name: Annotated[str, Path(pattern=NAME)]) -> Deleted:
            remove_steering(service, _audit_fields(request), request.state.key, name)
            return Deleted(id=name)


def _read(data: bytes) -> Steering:
    check_file(data)
    made = steering_from_bytes(data, "the upload")
    check_bounds(made)
    return made


def _audit_fields(request: Request) -> dict[str, str]:
    return {"request": request.state.request_id, "key": request.state.key.name, "route": request.url.path}
