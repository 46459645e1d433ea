"""The structured part of an answer, in which a request's steering doesn't act unless the request gives positions.

Programs read the values in tool calls and in JSON. A grammar enforces their form however the model is steered; the
values are the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.serve.schema import ChatRequest
from trimtab.serve.schema_tools import ObjectFormat, SchemaFormat
from trimtab.steering import Positions, Steering
from trimtab.text.calls import CallForm, form_of
from trimtab.text.markers import tools_machine
from trimtab.text.thinking import thinking_of


@dataclass(frozen=True)
class Structured:
    """Which part of an answer is structured, and the tokens outside it, which include the prompt's."""

    part: Literal["tool_calls", "answer"]
    outside: Positions

    def exclude_from(self, steering: Steering) -> Steering:
        """The steering without its action in this part. Edits of attention scores stay as they are."""
        edits = [
            edit if edit.site.kind == "scores" else replace(edit, positions=edit.positions & self.outside)
            for edit in steering.edits
        ]
        return replace(steering, edits=tuple(edits))


def structured_part(tokenizer: Any, request: ChatRequest) -> Structured | None:
    """The structured part of the answers to a request.

    With a response format, or if an answer can only be a call without an opening marker, that is the whole answer,
    after the thinking. With tools it is the calls between their markers; in Llama's format, which has no markers, it is
    everything from the beginning of a call on. `None` if nothing is structured, or if no marker shows where it is.
    """
    calls = may_call(request)
    form = _form(tokenizer) if calls else None
    must = request.tool_choice not in (None, "auto")
    if isinstance(request.response_format, ObjectFormat | SchemaFormat) or (
        form is not None and form.is_whole_answer and must
    ):
        thinking = thinking_of(tokenizer)
        prompt = Positions.prompt()
        return Structured("answer", prompt if thinking is None else prompt | Positions.thinking(*thinking))
    if not calls:
        return None
    if form is None:
        return _by_markers(tokenizer)
    pair = (form.before, "") if form.is_whole_answer else (form.opens, form.closes)
    return _calls(Positions.outside_tools(pair))


def may_call(request: ChatRequest) -> bool:
    """Whether answers may have tool calls."""
    return bool(request.tools) and request.tool_choice != "none"


def _form(tokenizer: Any) -> CallForm | None:
    try:
        return form_of(tokenizer)
    except UnsupportedError:
        return None


def _by_markers(tokenizer: Any) -> Structured | None:
    """The structured part in a format that only the tokenizer's response template knows: between known markers."""
    try:
        tools_machine(tokenizer, ())
    except TrimtabError:
        return None
    return _calls(Positions.outside_tools())


def _calls(outside: Positions) -> Structured:
    return Structured("tool_calls", Positions.prompt() | outside)
