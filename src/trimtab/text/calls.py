"""Tool calls as models write them: the form that a chat template uses, a form for templates without one, and grammars.

A form specifies the text around a call's name and its arguments, which are JSON. The known forms are the ones that most
model families have been trained on. If a template doesn't support tools, prompts describe them in Hermes' form, which
many models have seen, and answers are parsed in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UnsupportedError
from trimtab.text.templates import keywords_of


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. `schema` is the JSON schema of its arguments, as text for a grammar."""

    name: str
    schema: str


@dataclass(frozen=True)
class CallForm:
    """How a call is written: `opens`, then `before` NAME `between` ARGUMENTS `after`, then `closes`.

    `multiple_calls` is how several calls are written: `"each"` has its own `opens` and `closes`, `"list"` puts them in
    brackets after a single `opens`, and with `"one"` an answer has only one call.
    """

    name: str
    opens: str
    closes: str
    before: str
    between: str
    after: str
    multiple_calls: str

    @property
    def is_whole_answer(self) -> bool:
        """Whether a call is a whole answer, without an opening marker."""
        return not self.opens


HERMES = CallForm(
    "hermes", "<tool_call>", "</tool_call>", '\n{"name": "', '", "arguments": ', "}\n", "each"
)  # Hermes, Qwen 2.5 and 3, SmolLM3
MISTRAL = CallForm("mistral", "[TOOL_CALLS]", "", '{"name": "', '", "arguments": ', "}", "list")
MISTRAL_ARGS = CallForm("mistral, with [ARGS]", "[TOOL_CALLS]", "", "", "[ARGS]", "", "each")  # from version 11 on
LLAMA = CallForm("llama", "", "", '{"name": "', '", "parameters": ', "}", "one")  # 3.1 and later
GENERIC = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""A system message that describes the tools if the template doesn't, in Qwen's wording."""


def takes_tools(tokenizer: Any) -> bool:
    """Whether the chat template supports tools."""
    return "tools" in keywords_of(tokenizer)


def form_of(tokenizer: Any) -> CallForm:
    """The form in which this model calls tools, by its chat template.

    Raises `UnsupportedError` for a template that supports tools with an unknown form of calls.
    """
    if not takes_tools(tokenizer):
        return HERMES
    template = tokenizer.chat_template
    text = "".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    if "<tool_call>" in text and "<function=" not in text and "<arg_key>" not in text:
        return HERMES
    if "[TOOL_CALLS]" in text:
        return MISTRAL_ARGS if "[ARGS]" in text else MISTRAL
    if '"parameters": ' in text and "<|python_tag|>" in text:
        return LLAMA
    raise UnsupportedError(
        "this model's chat template has an unknown format of tool calls; known are Hermes' <tool_call>"
        " (Qwen, SmolLM3), Mistral's [TOOL_CALLS] and Llama 3.1's JSON. Leave tools out, or set a chat_template that"
        " has one of these"
    )


# ---- prompts -------------------------------------------------------------------------------------------------


def describe_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template without tools: described in the system message, with calls and results as text."""
    result: list[dict[str, Any]] = []
    for message in messages:
        if isinstance(message.get("content"), list):  # with images
            result.append(dict(message))
            continue
        content = str(message.get("content") or "")
        if message["role"] == "tool":
            text = f"<tool_response>\n{content}\n</tool_response>"
            if result and result[-1].get("responses"):  # several, to several calls
                result[-1]["content"] += f"\n{text}"
            else:
                result.append({"role": "user", "content": text, "responses": True})
            continue
        calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
        result.append({"role": message["role"], "content": "\n".join([*([content] if content else []), *calls])})
    for entry in result:
        entry.pop("responses", None)
    if tools:
        text = GENERIC.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if result and result[0]["role"] == "system":
            result[0] = {**result[0], "content": f"{result[0]['content']}\n\n{text}"}
        else:
            result.insert(0, {"role": "system", "content": text})
    return result


def _call(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{HERMES.opens}\n{json.dumps(call, ensure_ascii=False)}\n{HERMES.closes}"


# ---- grammars, in llguidance's Lark notation -----------------------------------------------------------------


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens by their text; in a grammar they are written as tokens, not as text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token.content): int(id) for id, token in added.items() if token.special}


def call_rules(
    form: CallForm, tools: Sequence[Tool], special: Mapping[str, int], *, several: bool, allow_text: bool
) -> str | None:
    """Lines of a grammar that define the rule `calls`.

    Args:
        form: How calls are written.
        tools: The tools that may be called.
        special: The result of `special_tokens`.
        several: Whether there may be more than one call.
        allow_text: Whether there may be any text instead, and before a call; then only calls that have been opened are
            constrained to their form.

    Returns:
        The lines, or `None` if `allow_text` is set and the form has no opening marker, since then any text is allowed.
    """
    if allow_text and form.is_whole_answer:
        return None
    bodies = []
    for tool in tools:
        name = json.dumps(tool.name)[1:-1] if form.before else tool.name
        head = " ".join(literal(part, special) for part in (form.before + name, form.between))
        bodies.append(f"({head} %json {tool.schema} {literal(form.after, special)})")
    tail = f"body {literal(form.closes, special)}"
    if form.multiple_calls == "list":
        more = '(", " body)*' if several else ""
        tail = f'" "? "[" body {more} "]"'
    lines = [f"body: {' | '.join(bodies)}", f"call: {tail}"]
    repeats = several and form.multiple_calls == "each"
    if not allow_text:
        blank = '"\\n"' if form.closes else ""
        opens = literal(form.opens, special)
        lines.append(f"calls: {opens} call " + (f"({blank} {opens} call)*" if repeats else ""))
        return "\n".join(lines)
    if form.opens in special:
        lines.append(f"called: TEXT {literal(form.opens, special)} call")
    else:
        lines += [f"opened[lazy]: /(.|\\n)*{pattern(form.opens)}/", "called: opened call"]
    lines += ["TEXT: /(.|\\n)*/", "calls: called* TEXT" if repeats else "calls: TEXT | called"]
    return "\n".join(lines)


def thinking_rules(opens: str, closes: str, special: Mapping[str, int], *, already_open: bool, then: str) -> str:
    """Lines of a grammar with the rule `start`: thinking (optional unless `already_open`), then the rule named
    `then`.
    """
    if closes in special:
        first = "" if already_open else literal(opens, special)
        lines = [f"thought: {first} THOUGHT {literal(closes, special)}", "THOUGHT: /(.|\\n)*/"]
    else:
        first = "" if already_open else pattern(opens)
        lines = [f"thought[lazy]: /{first}(.|\\n)*{pattern(closes)}/"]
    lines.append("blank: /[ \\n]{0,4}/")
    lines.append(f"start: thought blank {then}" if already_open else f"start: (thought blank)? {then}")
    return "\n".join(lines)


def literal(text: str, special: Mapping[str, int]) -> str:
    """A text as grammar literals, with its special tokens as tokens."""
    names = sorted((name for name in special if name in text), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return " ".join(f"<[{special[part]}]>" if part in names else json.dumps(part) for part in parts if part)


def pattern(text: str) -> str:
    """A text escaped for a regular expression in a grammar."""
    return re.sub(r"([^\w\s<>:])", r"\\\1", text)
