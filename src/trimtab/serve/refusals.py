"""Errors in the format of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

PASSING = {429: 5, 503: 5}
"""Statuses that may change on a retry, and the default number of seconds to wait."""
LONGEST_NAME = 64
"""Characters of a name that a refusal repeats; a request's path can have many more."""


class ErrorDetails(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetails


class Json(Response):
    """JSON in ASCII, which can represent any text in a request, even half a surrogate pair."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


class Refusal(Exception):
    """A request that is answered with an error, with its HTTP status.

    `retry` is the number of seconds after which to try again; it has a default for statuses in `PASSING`.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry = PASSING.get(status) if retry is None else retry

    def without_frames(self) -> Refusal:
        """The same refusal without its traceback, which holds the parsed body, many times the size of its bytes.

        A request keeps its refusal, and the frames in the traceback keep the request: a reference cycle that would wait
        for Python's garbage collector, while the server's memory grows.
        """
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Json:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Json(self.body, self.status, headers)


def no_such_steering(name: str, *, param: str | None = None) -> Refusal:
    """The refusal of a name that the caller can't use: the same if it doesn't exist and if it is somebody else's."""
    shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
    return Refusal(404, f"there is no steering {shown!r}; GET /v1/steerings lists yours", param=param)
