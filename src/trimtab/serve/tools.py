"""Tools and response formats of a chat: what the prompt says of them, the answers' grammar, and their parsing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.decoding.grammar import Grammar, check_schema, lark_grammar
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.serve.refusals import Refusal
from trimtab.serve.schema import ChatRequest, ImagePart, Message, TextPart
from trimtab.serve.schema_tools import FunctionSpec, ObjectFormat, SchemaFormat, ToolChoice
from trimtab.serve.structured import may_call
from trimtab.text.answer_parts import AnswerMarkers, AnswerSplitter
from trimtab.text.calls import (
    CallForm,
    Tool,
    call_rules,
    describe_tools,
    form_of,
    special_tokens,
    takes_tools,
    thinking_rules,
)
from trimtab.text.template_answer_parts import TemplateSplitter, has_response_template
from trimtab.text.thinking import ends_in_thinking, thinking_of

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Shape:
    """The form of answers, and how they are parsed.

    Attributes:
        grammar: The grammar of an answer; `None` for any text.
        marks: The markers in its text.
        shown: Special tokens that are part of the text, since markers are made of them.
        parser_factory: Makes a parser that uses the tokenizer's response template, if answers are parsed with it.
    """

    grammar: Grammar | None = None
    marks: AnswerMarkers = field(default_factory=AnswerMarkers)
    shown: frozenset[int] = frozenset()
    parser_factory: Callable[[], TemplateSplitter] | None = None

    def new_parser(self) -> AnswerSplitter | TemplateSplitter:
        """A parser for one answer, from its beginning."""
        return AnswerSplitter(self.marks) if self.parser_factory is None else self.parser_factory()


ANY = Shape()
"""Any text, not parsed."""


def conversation(tokenizer: Any, request: ChatRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, and the keywords for the chat template, including the tools that may be called.

    Raises `Refusal` for a tool's message without its call, and for arguments that aren't a JSON object.
    """
    tools = [_template_tool(tool.function) for tool in request.tools or ()] if may_call(request) else []
    speaks = bool(tools) or any(message.role == "tool" or message.tool_calls for message in request.messages)
    keywords = dict(request.chat_template_kwargs or {})
    if "tools" in keywords:
        raise Refusal(400, "tools is a separate field", param="chat_template_kwargs")
    messages = _messages(request.messages, thinks=thinking_of(tokenizer) is not None)
    if not speaks:
        return messages, keywords
    if takes_tools(tokenizer):
        return messages, {**keywords, "tools": tools} if tools else keywords
    return describe_tools(messages, tools), keywords


def answer_shape(tokenizer: Any, request: ChatRequest, ids: list[int]) -> Shape:
    """The form of the answers to a prompt with these token ids.

    Raises `Refusal` for a tool that is there twice or not at all, for a schema that no grammar can enforce, and for
    tools if the model calls them in an unknown format.
    """
    choice = request.tool_choice
    chosen = _tools(request)
    thinking = thinking_of(tokenizer)
    begun = thinking is not None and ends_in_thinking(tokenizer, ids, thinking)
    special = special_tokens(tokenizer)
    form, rules = None, None
    unenforced: list[str] = []
    alone = _format(request)  # the format without tools
    if chosen:
        free = choice in (None, "auto") and alone is None
        tools, unenforced = _checked(chosen)
        try:
            form = form_of(tokenizer)
        except UnsupportedError as error:
            if free and has_response_template(tokenizer):
                return _by_template(tokenizer, ids, chosen, special)
            raise Refusal(400, str(error), param="tools") from None
        several = request.parallel_tool_calls is not False and not isinstance(choice, ToolChoice)
        rules = call_rules(form, tools, special, several=several, allow_text=free)
        if alone is not None and choice in (None, "auto"):
            rules = f"{rules}\nanswer: calls | %json {alone[0]}"
        elif rules is not None:
            rules += "\nanswer: calls"
    elif alone is not None:
        rules = f"answer: %json {alone[0]}"
    elif thinking is None and has_response_template(tokenizer):
        return _by_template(tokenizer, ids, [], special)
    unenforced = [*unenforced, *(alone[1] if alone is not None else ())]
    marks = AnswerMarkers(thinking, begun, form, tuple(tool.function.name for tool in chosen), rules is not None)
    shown = frozenset(id for text, id in special.items() if _is_marker(text, form, thinking))
    if rules is None:
        return Shape(None, marks, shown)
    start = "start: answer"
    if thinking is not None:
        start = thinking_rules(*thinking, special, already_open=begun, then="answer")
    try:
        return Shape(lark_grammar(f"{start}\n{rules}\n", tuple(unenforced)), marks, shown)
    except TrimtabError as error:
        raise Refusal(400, str(error), param="tools" if chosen else "response_format") from None


def _by_template(tokenizer: Any, ids: list[int], chosen: Sequence[Any], special: Mapping[str, int]) -> Shape:
    """Any text, parsed with the tokenizer's response template, whose markers may be any special tokens."""
    tools = [_template_tool(tool.function) for tool in chosen]
    shown = frozenset(special.values()) - {tokenizer.eos_token_id}
    return Shape(None, AnswerMarkers(), shown, lambda: TemplateSplitter(tokenizer, ids, tools))


def _tools(request: ChatRequest) -> list[Any]:
    """The tools that answers may call. Raises `Refusal` if the chosen one doesn't exist."""
    tools, choice = list(request.tools or ()), request.tool_choice
    names = [tool.function.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise Refusal(400, f"there are two tools named {name!r}", param=f"tools.{i}.function.name")
    if isinstance(choice, ToolChoice):
        if choice.function.name not in names:
            raise Refusal(400, f"there is no tool {choice.function.name!r} in tools", param="tool_choice.function.name")
        return [tools[names.index(choice.function.name)]]
    if choice == "required" and not tools:
        raise Refusal(400, "a call is required, but there are no tools; send some", param="tool_choice")
    return tools if may_call(request) else []


def _checked(tools: Sequence[Any]) -> tuple[list[Tool], list[str]]:
    """The tools with schemas that grammars can enforce, and the keywords of the schemas that aren't enforced."""
    callable_tools: list[Tool] = []
    unenforced: list[str] = []
    for i, tool in enumerate(tools):
        spec: FunctionSpec = tool.function
        where = f"the tool {spec.name!r}"
        schema = {**ANY_OBJECT, **(spec.parameters or {})}
        if schema["type"] != "object":
            raise Refusal(
                400, f"{where}: its parameters must be of type object", param=f"tools.{i}.function.parameters.type"
            )
        try:
            checked = check_schema(schema, lenient=not spec.strict, where=where)
        except TrimtabError as error:
            raise Refusal(400, str(error), param=f"tools.{i}.function.parameters") from None
        callable_tools.append(Tool(spec.name, checked.text))
        unenforced += checked.ignored
    return callable_tools, unenforced


def _format(request: ChatRequest) -> tuple[str, tuple[str, ...]] | None:
    """The schema for the answer, and its keywords that aren't enforced."""
    response_format = request.response_format
    if isinstance(response_format, ObjectFormat):
        return check_schema(ANY_OBJECT).text, ()
    if not isinstance(response_format, SchemaFormat):
        return None
    spec = response_format.json_schema
    try:
        checked = check_schema(spec.schema_, lenient=spec.strict is False, where=f"the schema {spec.name!r}")
    except TrimtabError as error:
        raise Refusal(400, str(error), param="response_format.json_schema.schema") from None
    return checked.text, checked.ignored


def _is_marker(text: str, form: CallForm | None, thinking: tuple[str, str] | None) -> bool:
    """Whether a special token is, or is part of, a marker of calls or thinking."""
    marks = (*(thinking or ()), *((form.opens, form.closes, form.between) if form is not None else ()))
    return any(text in mark for mark in marks)


# ---- messages ------------------------------------------------------------------------------------------------


def _template_tool(spec: FunctionSpec) -> dict[str, Any]:
    """A tool in the format that chat templates take."""
    function: dict[str, Any] = {"name": spec.name}
    if spec.description:
        function["description"] = spec.description
    return {"type": "function", "function": {**function, "parameters": spec.parameters or ANY_OBJECT}}


def _messages(messages: Sequence[Message], *, thinks: bool) -> list[dict[str, Any]]:
    converted: list[dict[str, Any]] = []
    called: dict[str, str] = {}  # by the call's id
    for i, message in enumerate(messages):
        entry: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": _content(message, f"messages.{i}.content"),
        }
        if message.tool_calls:
            if message.role != "assistant":
                raise Refusal(400, "only assistant messages can have tool calls", param=f"messages.{i}.tool_calls")
            where = f"messages.{i}.tool_calls"
            entry["tool_calls"] = [_call(call, f"{where}.{n}") for n, call in enumerate(message.tool_calls)]
            called |= {call.id: call.function.name for call in message.tool_calls}
        if message.role == "tool":
            if message.tool_call_id not in called:
                raise Refusal(
                    400,
                    "a tool message must answer an earlier call of the assistant; set tool_call_id to that call's id",
                    param=f"messages.{i}.tool_call_id",
                )
            entry |= {"tool_call_id": message.tool_call_id, "name": called[message.tool_call_id]}
        if thinks and message.reasoning_content and message.role == "assistant":
            entry["reasoning_content"] = message.reasoning_content
        converted.append(entry)
    return converted


def _content(message: Message, where: str) -> str | list[dict[str, Any]]:
    """A message's text, or its parts if it has images."""
    content = message.content
    if isinstance(content, str):
        return content
    if not any(isinstance(part, ImagePart) for part in content):
        return "\n".join(part.text for part in content if isinstance(part, TextPart))
    if message.role != "user":
        raise Refusal(400, "only user messages can have images", param=where)
    return [part.model_dump(exclude_none=True) for part in content]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call for the template, with parsed arguments."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Refusal(
            400, "the arguments of a call must be a JSON object in a string", param=f"{where}.function.arguments"
        )
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
