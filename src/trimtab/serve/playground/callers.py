"""Whose key it is, and what went wrong in words."""

from __future__ import annotations

import logging

from pydantic import ValidationError

from trimtab.errors import TrimtabError
from trimtab.serve import wording
from trimtab.serve.guard import new_request_id
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal
from trimtab.serve.scheduler import Draining, Full
from trimtab.serve.service import Service

ROUTE = "/"
"""What stands for the page in the audit log, where a request's route does."""

log: logging.Logger = logging.getLogger("trimtab")


def caller(service: Service, secret: str | None) -> Key:
    """The key that somebody typed. Raises `Refusal` where it is nobody's; without keys, everybody may ask."""
    key = service.policy.caller((secret or "").strip() or None)
    if key is None:
        typed = bool((secret or "").strip())
        raise Refusal(401, "this API key isn't known to the server" if typed else "type your API key first")
    return key


def new_request(key: Key) -> dict[str, str]:
    """Who asks, as the audit log has it."""
    return {"request": new_request_id(), "key": key.name, "route": ROUTE}


def in_words(error: Exception) -> str:
    """What went wrong, for a person. Whatever isn't expected goes to the server's log, not to the page."""
    if isinstance(error, Refusal):
        return error.message
    if isinstance(error, (TrimtabError, Full, Draining)):
        return str(error)
    if isinstance(error, ValidationError):
        return wording.in_words(error.errors(include_input=False, include_url=False), None).message
    log.error("the playground failed", exc_info=error)
    return "something went wrong inside the server; its log says what"
