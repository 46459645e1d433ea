"""The outermost layer of vLLM's own server: the checks that `trimtab serve` makes before its routes.

vLLM makes it from `--middleware`, passing only the application; the settings are in the environment. A request to a
route that generates gets a request context (`engines.vllm.request_context`), which tells the engine what steers it.
With a policy or an audit log, the server is closed: other routes that generate don't exist, and the engine accepts
nothing that didn't come through this middleware.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.engines.vllm.frontend import LINK, NAMES, Names
from trimtab.engines.vllm.request_context import REQUEST_CONTEXT, RequestContext, is_closed
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import steering_digest
from trimtab.serve.access import AccessLog
from trimtab.serve.audit import Audit, unaudited
from trimtab.serve.bodies import SMALL
from trimtab.serve.choosing import SteeringSelector
from trimtab.serve.described import steering_info
from trimtab.serve.guard import Guard, new_request_id, with_body
from trimtab.serve.library import LoadedSteering
from trimtab.serve.policy import Key, Policy, check_names
from trimtab.serve.refusals import Json, Refusal, no_such_steering
from trimtab.serve.schema_steerings import SteeringList
from trimtab.serve.service import Limits
from trimtab.serve.vllm.outgoing import Outgoing
from trimtab.serve.vllm.record import Record
from trimtab.serve.vllm.request import parse_request
from trimtab.serve.vllm.settings import MiddlewareSettings
from trimtab.steering import Steering

GENERATE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Routes of vLLM that generate and support steering."""
FORWARDED_ROUTES = {
    "GET": ("/health", "/ping", "/v1/models", "/version", "/load", "/metrics", "/docs", "/openapi.json"),
    "POST": ("/tokenize", "/detokenize"),
}
"""Routes of vLLM that don't generate."""
WITHOUT_KEY = ("/health", "/ping", "/healthz", "/readyz")
OWN_ROUTES = ("/healthz", "/readyz", "/trimtab", "/v1/steerings")
ADMIN_PREFIX = "/trimtab/steerings/"
"""Where the holder of the key in TRIMTAB_ADMIN_KEY changes steerings; the endpoint checks that key."""
NOWHERE = (
    "no such route; POST /v1/chat/completions, /v1/responses or /v1/completions for an answer, GET /v1/models and"
    " /v1/steerings for lists"
)


class SteeringMiddleware:
    """The layer around vLLM's application, whose state has `trimtab_engine`, set by trimtab's endpoint plugin.

    Args:
        app: vLLM's application.
        settings: Default: from the environment.
        names: The steerings.
    """

    def __init__(self, app: ASGIApp, settings: MiddlewareSettings | None = None, names: Names = NAMES) -> None:
        self.app = app
        self.names = names
        self.settings = MiddlewareSettings.from_environment(os.environ) if settings is None else settings
        self.policy = self.settings.load_policy(os.environ)
        self.closed = self.settings.closes(self.policy)
        self.limits = Limits(body=self.settings.body, total_bytes=self.settings.held)
        self.draining = False
        self.audit = Audit()
        self.access: AccessLog | None = None
        self._engine: Any = None
        self._loaded: dict[str, LoadedSteering] = {}
        self._selector = SteeringSelector(self.policy, self._find, self._check)
        self._guard = Guard(self._inside, self, local=self.settings.local, public_paths=WITHOUT_KEY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        REQUEST_CONTEXT.set(None)  # a connection's next request may run in the context of the previous one
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] != "http":
            if self.closed:  # vLLM's realtime route, which generates
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
        elif self._engine is None:
            await Refusal(503, "the server isn't ready", code="not_ready", retry=5).response(scope, receive, send)
        elif scope["path"].startswith(ADMIN_PREFIX):
            await self._change(scope, receive, send)
        elif _is_preflight(scope) or not (self.closed or scope["path"] in GENERATE + OWN_ROUTES):
            await self.app(scope, receive, send)
        else:
            await self._guard(scope, receive, send)

    # ---- lifespan ------------------------------------------------------------------------------------------

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._open(scope["app"].state)
        except (TrimtabError, Refusal) as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"trimtab: {error}"})
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self._engine = None
            self.audit.close()

    def _open(self, state: Any) -> None:
        """Prepare for the first request. Raises `TrimtabError` if the settings can't be enforced."""
        engine = getattr(state, "trimtab_engine", None)
        if engine is None:
            raise TrimtabError("vLLM hasn't loaded trimtab's routes; name trimtab in VLLM_PLUGINS")
        if self.closed and not is_closed():
            raise TrimtabError(
                "the server has a policy or an audit log, but its engine would accept requests that bypass them"
            )
        check_names(self.policy, self.names)
        link = getattr(engine, LINK)
        capped = self.policy.max_dose is not None or any(key.max_dose is not None for key in self.policy.keys)
        if capped and link.unmeasured:
            raise TrimtabError(f"doses can't be capped because they can't be measured here: {link.unmeasured}")
        self.names.pinned |= {name: "is always on" for name, _ in self.policy.always}
        settings = self.settings
        self.audit = _audit(settings.audit, settings)
        self.access = None if settings.access_log is None else _access_log(settings.access_log)
        self._engine = engine

    # ---- the guard's interface -----------------------------------------------------------------------------

    def body_limit(self, method: str, path: str, *, known: bool) -> int:
        """The most bytes that a request's body may have on this route."""
        answers = method == "POST" and path in GENERATE + FORWARDED_ROUTES["POST"]
        return self.limits.body if answers else min(SMALL, self.limits.body)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Does nothing: vLLM counts its requests itself."""

    # ---- behind the guard ----------------------------------------------------------------------------------

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        try:
            if path in OWN_ROUTES or path.startswith("/v1/steerings/"):
                await self._serve_own_route(scope, receive, send)
            elif method == "POST" and path in GENERATE:
                await self._answer(scope, receive, send)
            elif path in FORWARDED_ROUTES.get(method, ()):
                await self.app(scope, receive, send)
            else:
                raise Refusal(404, NOWHERE)
        except Refusal as refusal:
            scope["state"]["refused"] = refusal
            await refusal.response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        key: Key = state["key"]
        request = await asyncio.to_thread(parse_request, (await receive())["body"], closed=self.closed)
        state["parsed"] = request
        steerings, steering = await asyncio.to_thread(self._selector.select, key, request.steering)
        if request.beams and (steering is not None or request.marked is not None):
            raise Refusal(400, "vLLM's beam search makes its own requests, which aren't steered; leave it out")
        audit_fields = {"request": state["request_id"], "key": key.name, "route": scope["path"]}
        record = Record(self.audit, audit_fields, request, steerings)

        async def begin() -> None:
            try:
                await record.begin()
            except Refusal as refusal:
                out.refusal = refusal
                raise TrimtabError(refusal.message) from None
            state["record"] = record  # the guard makes sure that it ends

        name = json.dumps([applied.model_dump(exclude={"name"}) for applied in steerings])
        cap = None if steering is None else self.policy.dose_cap(key)
        request_context = record.request_context = RequestContext(steering, name, begin, cap, request.marked)
        out = Outgoing((scope, receive, send), request_context, record, steerings)
        scope["headers"] = _headers(scope, state["request_id"], len(request.body))
        token = REQUEST_CONTEXT.set(request_context)
        try:
            await self.app(scope, with_body(request.body, out.watching(receive)), out)
        finally:
            REQUEST_CONTEXT.reset(token)

    async def _serve_own_route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] != "GET":
            raise Refusal(405, "this route only supports GET")
        if path in ("/healthz", "/readyz"):
            if path == "/readyz" and not self.audit.check():
                await Json({"status": "unaudited"}, 503)(scope, receive, send)
                return
            scope["path"], scope["raw_path"] = "/health", b"/health"
            await self.app(scope, receive, send)
            return
        key: Key = scope["state"]["key"]
        entries = [self._find(name, None) for name in self.names]
        seen = self._selector.visible(key, [entry for entry in entries if entry is not None])
        if path == "/trimtab":
            link = getattr(self._engine, LINK)
            content: Any = {"steerings": [entry.name for entry in seen], "layers": link.layers, "width": link.width}
        elif path == "/v1/steerings":
            content = SteeringList(data=[steering_info(self.policy, key, entry) for entry in seen]).model_dump()
        else:
            chosen = next((entry for entry in seen if path == f"/v1/steerings/{entry.name}"), None)
            if chosen is None:
                raise no_such_steering(path.removeprefix("/v1/steerings/"))
            content = steering_info(self.policy, key, chosen).model_dump()
        await Json(content)(scope, receive, send)

    async def _change(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request that adds, changes or removes a steering, and log it."""
        if not self.audit.check():
            await unaudited().response(scope, receive, send)
            return
        name, request = scope["path"].removeprefix(ADMIN_PREFIX), new_request_id()

        async def send_and_log(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                event = "removed" if scope["method"] == "DELETE" else "added"
                entry = self._find(name, None)
                digest = None if entry is None else entry.digest
                line = {"event": event, "request": request, "key": "admin", "route": scope["path"], event: name}
                with suppress(Refusal):  # it has happened; no request is answered until the log can be written again
                    self.audit.write({**line, "digest": digest, "source": "admin"})
            await send(message)

        await self.app(scope, receive, send_and_log)

    # ---- the steerings -------------------------------------------------------------------------------------

    def _find(self, name: str, _owner: str | None) -> LoadedSteering | None:
        try:
            steering = self.names[name]
        except TrimtabError:
            return None
        entry = self._loaded.get(name)
        if entry is None or entry.steering is not steering:
            entry = self._loaded[name] = LoadedSteering(name, steering, steering_digest(steering), "file")
        return entry

    def _check(self, steering: Steering) -> None:
        getattr(self._engine, LINK).check(steering)


def check(settings: MiddlewareSettings, names: Names) -> Policy:
    """Check, before vLLM is started, whether the middleware can be made with these settings.

    Raises:
        TrimtabError: The policy isn't valid, names what doesn't exist, or needs what vLLM can't do; or a log can't be
            written.
    """
    rules = settings.load_policy(os.environ)
    check_names(rules, names)
    _audit(settings.audit, settings).close()
    if settings.access_log is not None:
        _access_log(settings.access_log)
    return rules


def _audit(path: str | None, settings: MiddlewareSettings) -> Audit:
    return Audit(None if path is None else Path(path), prompts=settings.audit_prompts, sync=settings.audit_sync)


def _access_log(path: str) -> AccessLog:
    """The access log, which is reopened on SIGHUP if there is an event loop to handle the signal."""
    log = AccessLog(Path(path))
    with suppress(RuntimeError, ValueError, AttributeError):  # no event loop, not the main thread, or not POSIX
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reopened, log)
    return log


def _reopened(log: AccessLog) -> None:
    with suppress(TrimtabError):
        log.reopen()


def _is_preflight(scope: Scope) -> bool:
    """Whether it is a CORS preflight request, which has no API key and which vLLM's CORS layer answers."""
    names = {name for name, _ in scope["headers"]}
    return scope["method"] == "OPTIONS" and b"access-control-request-method" in names


def _headers(scope: Scope, request: str, length: int) -> list[tuple[bytes, bytes]]:
    """The headers for vLLM: with this request's id, for vLLM's own ids, and the body's new length."""
    replaced = (b"x-request-id", b"content-length", b"transfer-encoding")
    others = [(name, value) for name, value in scope["headers"] if name not in replaced]
    return [*others, (b"x-request-id", request.encode()), (b"content-length", str(length).encode())]
