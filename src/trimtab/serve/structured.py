"""The structured part of an answer, which a request's steering leaves alone unless the request says where it acts.

Programs read the values in tool calls and in JSON. A grammar keeps their form whatever steers them; what stands in them
is the model's own.
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
    """What of an answer is structured, and which tokens are no part of it: those of the prompt are among them."""

    part: Literal["tool_calls", "answer"]
    outside: Positions

    def spared_by(self, steering: Steering) -> Steering:
        """The steering where it was, but for this part. Attention scores are steered as they were."""
        edits = [
            edit if edit.site.kind == "scores" else replace(edit, positions=edit.positions & self.outside)
            for edit in steering.edits
        ]
        return replace(steering, edits=tuple(edits))


def structured_part(tokenizer: Any, request: ChatRequest) -> Structured | None:
    """What is structured in the answers to a request.

    With a format, or where an answer can be nothing but a call that no marker opens, that is the answer as a whole,
    after the thinking. With tools it is the calls between their markers; in Llama's form, which has none, it is all
    from the beginning of a call on. `None` where there is nothing of that kind, or nothing shows where it is.
    """
    calls = may_call(request)
    form = _form(tokenizer) if calls else None
    must = request.tool_choice not in (None, "auto")
    if isinstance(request.response_format, ObjectFormat | SchemaFormat) or (form is not None and form.alone and must):
        thinking = thinking_of(tokenizer)
        prompt = Positions.prompt()
        return Structured("answer", prompt if thinking is None else prompt | Positions.thinking(*thinking))
    if not calls:
        return None
    if form is None:
        return _by_markers(tokenizer)
    pair = (form.before, "") if form.alone else (form.opens, form.closes)
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
    """In a form that only the tokenizer's response template knows: between markers that are known."""
    try:
        tools_machine(tokenizer, ())
    except TrimtabError:
        return None
    return _calls(Positions.outside_tools())


def _calls(outside: Positions) -> Structured:
    return Structured("tool_calls", Positions.prompt() | outside)
