"""The trimtab part of a request to one of vLLM's routes, and the body without it, for vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from trimtab.engines.vllm.emphasized import EMPHASIZED, Marked, marked
from trimtab.engines.vllm.requests import REFUSED, WITH_REJECTION
from trimtab.engines.vllm.wire import ASKED, RESOLVED
from trimtab.serve.fields import In
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import Emphasized, SteeringChoice
from trimtab.serve.wording import in_words
from trimtab.text.chat import CONTINUE

BESIDE = "vllm_xargs"
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


class _Fields(In):
    steering: Annotated[list[SteeringChoice], Field(fail_fast=True)] = Field([], max_length=16)
    emphasize: Emphasized = Field([], max_length=16)


@dataclass(frozen=True)
class VllmRequest:
    """A request: the steering it asks for, what it emphasizes, what is logged of it, and the body for vLLM."""

    steering: list[SteeringChoice]
    marked: Marked | None
    body: bytes
    beams: bool
    model: str | None
    user: str | None
    prompt: Any


def read(body: bytes, *, closed: bool) -> VllmRequest:
    """Parse a body. Raises `Refusal` for fields that aren't supported; vLLM validates the rest."""
    try:
        parsed = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"the body isn't JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise Refusal(400, "the body: it must be an object")
    unheld = parsed.get("rejection") is False
    for name, why in ABSENT.items():
        if parsed.pop(name, None):
            raise Refusal(400, f"{name} needs {why}; the transformers engine can (trimtab serve)", param=name)
    for name, why in KEPT_BY_VLLM.items() if closed else ():
        if parsed.get(name):
            raise Refusal(400, f"{name} isn't accepted here: {why}", param=name)
    fields = _fields(_choices(_taken_out(parsed, ASKED)), _taken_out(parsed, EMPHASIZED))
    user = parsed.get("user")
    return VllmRequest(
        fields.steering,
        _marked(fields, parsed, unheld=unheld),
        json.dumps(parsed, ensure_ascii=True, separators=(",", ":")).encode(),
        bool(parsed.get("use_beam_search")),
        parsed["model"] if isinstance(parsed.get("model"), str) else None,
        user[:512] if isinstance(user, str) else None,
        next((parsed[name] for name in ("messages", "prompt", "input") if name in parsed), None),
    )


def _taken_out(parsed: dict[str, Any], name: str) -> Any:
    """Remove the field of this name from the body, in either place, and return its value."""
    value = parsed.pop(name, None)
    beside = parsed.get(BESIDE)
    if not isinstance(beside, dict):
        return value
    if RESOLVED in beside:
        message = f"a request asks for steering as {ASKED!r}; only the server sets {RESOLVED!r}"
        raise Refusal(400, message, param=BESIDE)
    also = beside.pop(name, None)
    if value and also:
        raise Refusal(400, f"{name} is in the request and in its {BESIDE}; give it once", param=name)
    return value or also


def _choices(choices: Any) -> Any:
    """The list of choices, which vLLM's clients may send as a list, one item, either as JSON in a string, or a name."""
    if isinstance(choices, str):
        try:
            choices = json.loads(choices) if choices.lstrip()[:1] in ("[", "{") else [{"name": choices}]
        except (ValueError, RecursionError):
            raise Refusal(400, f"steering: it isn't valid JSON: {choices[:80]!r}", param=ASKED) from None
    return [choices] if isinstance(choices, dict) else choices or []


def _fields(steering: Any, phrases: Any) -> _Fields:
    fields = {ASKED: steering, EMPHASIZED: phrases or []}
    try:
        return _Fields.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise in_words(error.errors(include_url=False), fields) from None


def _marked(fields: _Fields, body: dict[str, Any], *, unheld: bool) -> Marked | None:
    """The phrases to emphasize; `unheld`: the request turned rejection off explicitly."""
    if not fields.emphasize:
        return None
    if not unheld:
        raise Refusal(400, WITH_REJECTION, param=EMPHASIZED)
    plain = [choice if isinstance(choice, str) else choice.model_dump() for choice in fields.emphasize]
    keywords = body.get("chat_template_kwargs")
    template = {CONTINUE: bool(body.get("continue_final_message")), **(keywords if isinstance(keywords, dict) else {})}
    return marked(plain, body.get("messages"), template)
