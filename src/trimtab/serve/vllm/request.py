"""The trimtab part of a request to one of vLLM's routes, and the body without it, for vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from trimtab.engines.vllm.emphasized import EMPHASIZED, EmphasisRequest, parse_emphasis
from trimtab.engines.vllm.requests import REFUSED, WITH_REJECTION
from trimtab.engines.vllm.wire import RESOLVED_KEY, STEERING_KEY
from trimtab.serve.fields import RequestModel
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import Emphasized, SteeringChoice
from trimtab.serve.wording import validation_refusal
from trimtab.text.chat import CONTINUE

EXTRA_ARGS_FIELD = "vllm_xargs"
"""vLLM's field for extra arguments."""
ABSENT = {
    **REFUSED,
    "monitors": "activations to be read at each token, which vLLM's server doesn't do",
    "clean_cache": "a second cache for each request, which the vllm engine doesn't have",
}
"""Fields of trimtab's own server that this one doesn't support, and what they need."""
KEPT_BY_VLLM = {
    "background": "it would be answered after its entry in the audit log has ended",
    "previous_response_id": "responses that vLLM stores aren't tied to a key; send the whole conversation as input",
}
"""Fields of vLLM that a server with a policy refuses, and why."""


class _Fields(RequestModel):
    steering: Annotated[list[SteeringChoice], Field(fail_fast=True)] = Field([], max_length=16)
    emphasize: Emphasized = Field([], max_length=16)


@dataclass(frozen=True)
class VllmRequest:
    """A request: the steering it asks for, what it emphasizes, what is logged of it, and the body for vLLM."""

    steering: list[SteeringChoice]
    marked: EmphasisRequest | None
    body: bytes
    beams: bool
    model: str | None
    user: str | None
    prompt: Any


def parse_request(body: bytes, *, closed: bool) -> VllmRequest:
    """Parse a body. Raises `Refusal` for fields that aren't supported; vLLM validates the rest."""
    try:
        parsed = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"the body isn't JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise Refusal(400, "the body: it must be an object")
    rejection_off = parsed.get("rejection") is False
    for name, why in ABSENT.items():
        if parsed.pop(name, None):
            raise Refusal(400, f"{name} needs {why}; the transformers engine can (trimtab serve)", param=name)
    for name, why in KEPT_BY_VLLM.items() if closed else ():
        if parsed.get(name):
            raise Refusal(400, f"{name} isn't accepted here: {why}", param=name)
    fields = _fields(_choices(_pop_field(parsed, STEERING_KEY)), _pop_field(parsed, EMPHASIZED))
    user = parsed.get("user")
    return VllmRequest(
        fields.steering,
        _marked(fields, parsed, rejection_off=rejection_off),
        json.dumps(parsed, ensure_ascii=True, separators=(",", ":")).encode(),
        bool(parsed.get("use_beam_search")),
        parsed["model"] if isinstance(parsed.get("model"), str) else None,
        user[:512] if isinstance(user, str) else None,
        next((parsed[name] for name in ("messages", "prompt", "input") if name in parsed), None),
    )


def _pop_field(parsed: dict[str, Any], name: str) -> Any:
    """Remove the field of this name from the body, in either place, and return its value."""
    value = parsed.pop(name, None)
    beside = parsed.get(EXTRA_ARGS_FIELD)
    if not isinstance(beside, dict):
        return value
    if RESOLVED_KEY in beside:
        message = f"a request asks for steering as {STEERING_KEY!r}; only the server sets {RESOLVED_KEY!r}"
        raise Refusal(400, message, param=EXTRA_ARGS_FIELD)
    also = beside.pop(name, None)
    if value and also:
        raise Refusal(400, f"{name} is in the request and in its {EXTRA_ARGS_FIELD}; give it once", param=name)
    return value or also


def _choices(choices: Any) -> Any:
    """The list of choices, which vLLM's clients may send as a list, one item, either as JSON in a string, or a name."""
    if isinstance(choices, str):
        try:
            choices = json.loads(choices) if choices.lstrip()[:1] in ("[", "{") else [{"name": choices}]
        except (ValueError, RecursionError):
            raise Refusal(400, f"steering: it isn't valid JSON: {choices[:80]!r}", param=STEERING_KEY) from None
    return [choices] if isinstance(choices, dict) else choices or []


def _fields(steering: Any, phrases: Any) -> _Fields:
    fields = {STEERING_KEY: steering, EMPHASIZED: phrases or []}
    try:
        return _Fields.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise validation_refusal(error.errors(include_url=False), fields) from None


def _marked(fields: _Fields, body: dict[str, Any], *, rejection_off: bool) -> EmphasisRequest | None:
    """The phrases to emphasize; `rejection_off`: the request turned rejection off explicitly."""
    if not fields.emphasize:
        return None
    if not rejection_off:
        raise Refusal(400, WITH_REJECTION, param=EMPHASIZED)
    plain = [choice if isinstance(choice, str) else choice.model_dump() for choice in fields.emphasize]
    keywords = body.get("chat_template_kwargs")
    template = {CONTINUE: bool(body.get("continue_final_message")), **(keywords if isinstance(keywords, dict) else {})}
    return parse_emphasis(plain, body.get("messages"), template)
