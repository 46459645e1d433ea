"""What a request to one of vLLM's routes asks of trimtab, and the body without that, which vLLM gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from trimtab.engines.vllm.requests import REFUSED
from trimtab.engines.vllm.wire import ASKED, RESOLVED
from trimtab.serve.fields import In
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import SteeringChoice
from trimtab.serve.wording import in_words

BESIDE = "vllm_xargs"
"""vLLM's own place for what it doesn't know."""
ABSENT = {
    **REFUSED,
    "monitors": "activations that are read at each token, which vLLM's server doesn't",
    "clean_cache": "a second cache for each request, which the vllm engine hasn't",
}
"""Fields of trimtab's own server that this one can't honour, and what they need."""
KEPT_BY_VLLM = {
    "background": "it would be answered after its line in the log",
    "previous_response_id": "what vLLM keeps of responses belongs to no key; send the whole conversation as input",
}
"""Fields of vLLM's that a server with a policy refuses, and why."""


class _Fields(In):
    steering: Annotated[list[SteeringChoice], Field(fail_fast=True)] = Field([], max_length=16)


@dataclass(frozen=True)
class Asked:
    """A request: the steering that it asks for, what is written down of it, and the body for vLLM."""

    steering: list[SteeringChoice]
    body: bytes
    beams: bool
    model: str | None
    user: str | None
    prompt: Any


def read(body: bytes, *, closed: bool) -> Asked:
    """Take a body apart. Raises `Refusal` for what can't be honoured; the rest is vLLM's to say."""
    try:
        given = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"the body isn't JSON: {str(error)[:200]}") from None
    if not isinstance(given, dict):
        raise Refusal(400, "the body: it must be an object")
    for name, why in ABSENT.items():
        if given.pop(name, None):
            raise Refusal(400, f"{name} needs {why}; the transformers engine can (trimtab serve)", param=name)
    for name, why in KEPT_BY_VLLM.items() if closed else ():
        if given.get(name):
            raise Refusal(400, f"{name} isn't taken here: {why}", param=name)
    steering = _choices(_taken_out(given))
    user = given.get("user")
    return Asked(
        steering,
        json.dumps(given, ensure_ascii=True, separators=(",", ":")).encode(),
        bool(given.get("use_beam_search")),
        given["model"] if isinstance(given.get("model"), str) else None,
        user[:512] if isinstance(user, str) else None,
        next((given[name] for name in ("messages", "prompt", "input") if name in given), None),
    )


def _taken_out(given: dict[str, Any]) -> Any:
    """The steering of a body, which has it no longer, in either place."""
    asked = given.pop(ASKED, None)
    beside = given.get(BESIDE)
    if not isinstance(beside, dict):
        return asked
    if RESOLVED in beside:
        message = f"a request asks for steering as {ASKED!r}; {RESOLVED!r} is what the server makes of it"
        raise Refusal(400, message, param=BESIDE)
    also = beside.pop(ASKED, None)
    if asked and also:
        raise Refusal(400, f"steering stands in the request and in its {BESIDE}; give it once", param=ASKED)
    return asked or also


def _choices(asked: Any) -> list[SteeringChoice]:
    """What vLLM's clients may write: a list, one of its items, the same as JSON in a text, or a name."""
    if isinstance(asked, str):
        try:
            asked = json.loads(asked) if asked.lstrip()[:1] in ("[", "{") else [{"name": asked}]
        except (ValueError, RecursionError):
            raise Refusal(400, f"steering: it is no JSON: {asked[:80]!r}", param=ASKED) from None
    given = {ASKED: [asked] if isinstance(asked, dict) else asked or []}
    try:
        return _Fields.model_validate_json(json.dumps(given)).steering
    except ValidationError as error:
        raise in_words(error.errors(include_url=False), given) from None
