"""The owner of an API key, and error messages for the page."""

from __future__ import annotations

import logging

from pydantic import ValidationError

from trimtab.errors import TrimtabError
from trimtab.serve import wording
from trimtab.serve.guard import new_request_id
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.scheduler import Draining, QueueFull
from trimtab.serve.service import Service

ROUTE = "/"
"""The page's route in the audit log."""

log: logging.Logger = logging.getLogger("trimtab")


def caller(service: Service, secret: str | None) -> Key:
    """The owner of the typed key. Raises `Refusal` if nobody has it; without keys, everybody may send requests."""
    key = service.policy.caller((secret or "").strip() or None)
    if key is None:
        typed = bool((secret or "").strip())
        raise Refusal(401, "this API key isn't known to the server" if typed else "enter your API key first")
    return key


def new_request_identity(key: Key) -> dict[str, str]:
    """The identity of a request, for the audit log."""
    return {"request": new_request_id(), "key": key.name, "route": ROUTE}


def in_words(error: Exception) -> str:
    """The error message for a user. Unexpected errors go to the server's log, not to the page."""
    if isinstance(error, Refusal):
        return error.message
    if isinstance(error, (TrimtabError, QueueFull, Draining)):
        return str(error)
    if isinstance(error, ValidationError):
        return wording.validation_refusal(error.errors(include_input=False, include_url=False), None).message
    log.error("the playground failed", exc_info=error)
    return "something went wrong inside the server; see its log"
