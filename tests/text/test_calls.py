"""Grammars of tool calls and thinking: what a model may write, in the form of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

from serve.toolbox import SPECIAL, TEMPLATES, model
from text.test_answer_parts import written

from trimtab.decoding.grammar import check_schema, lark_grammar
from trimtab.engines.transformers.grammar import GrammarCompiler
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    Tool,
    call_rules,
    describe_tools,
    form_of,
    special_tokens,
    takes_tools,
    thinking_rules,
)
from trimtab.text.thinking import ends_in_thinking, thinking_of

FORMS = {"no tools": HERMES, "hermes": HERMES, "mistral": MISTRAL, "mistral, with [ARGS]": MISTRAL_ARGS, "llama": LLAMA}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
CALL = ("f", '{"n": 1}')


@pytest.fixture(scope="module", params=FORMS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, model(tmp_path_factory.mktemp("forms"), request.param).tokenizer


def accepts(tokenizer: Any, rules: str | None, text: str) -> bool:
    """Whether a text and its end are what the grammar allows."""
    assert rules is not None
    grammars = GrammarCompiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    matcher = grammars.matcher(lark_grammar(rules))
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            if matcher.done:
                return False
            matcher.consume(token)
        if not matcher.done:
            matcher.consume(tokenizer.eos_token_id)
    except TrimtabError:
        return False
    return True


def rules(tokenizer: Any, **how: bool) -> str | None:
    tools = [Tool(name, check_schema(SCHEMA).text) for name in ("f", "g-2")]
    grammar = call_rules(form_of(tokenizer), tools, special_tokens(tokenizer), **how)
    return grammar and f"start: calls\n{grammar}"


def test_forms_are_known_by_their_templates(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    assert form_of(tokenizer) == FORMS[name]
    assert takes_tools(tokenizer) == (name != "no tools")
    assert set(special_tokens(tokenizer)) >= set(SPECIAL.get(name, ()))
    assert thinking_of(tokenizer) is None


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Hermes' <tool_call>"):
        form_of(model(tmp_path, "unknown").tokenizer)


def test_calls_that_have_to_be(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    form = FORMS[name]
    single, both = written(form, [CALL]), written(form, [CALL, ("g-2", '{\n "n": -7\n}')])
    for several in (False, True):
        grammar = rules(tokenizer, several=several, allow_text=False)
        assert accepts(tokenizer, grammar, single)
        assert accepts(tokenizer, grammar, both) == (several and form.multiple_calls != "one")
        for wrong in (
            "",
            "Hello",
            f"x{single}",
            f"{single}x",
            single.replace("1", '"1"'),
            single.replace("f", "h", 1) if not form.before else single.replace('"f"', '"h"'),
            single[:-1],
        ):
            assert not accepts(tokenizer, grammar, wrong), wrong


def test_calls_that_may_be(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    form = FORMS[name]
    single = written(form, [CALL])
    for several in (False, True):
        grammar = rules(tokenizer, several=several, allow_text=True)
        if form.is_whole_answer:
            assert grammar is None
            continue
        for text in ("", "Hello, <tool {}\n[TOOL", single, f"Let me look.\n\n{single}"):
            assert accepts(tokenizer, grammar, text), text
        assert not accepts(tokenizer, grammar, single.replace("1", '"1"'))
        assert not accepts(tokenizer, grammar, f"Hello {form.opens}")
        if form.multiple_calls == "each":
            assert accepts(tokenizer, grammar, f"{single}{single} and words") == several


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[TOOL_CALLS]", "[ARGS]")])
def test_thinking_comes_before(tmp_path: Path, marks: tuple[str, str]) -> None:
    """With marks that are texts, and with such as are special tokens."""
    tokenizer = model(tmp_path, "mistral, with [ARGS]").tokenizer
    opens, closes = marks
    for begun in (False, True):
        start = thinking_rules(opens, closes, special_tokens(tokenizer), already_open=begun, then="answer")
        grammar = f"{start}\nanswer: %json {json.dumps({'const': 'x'})}"
        thought = f"{'' if begun else opens}\nHm </thin, a {{b}}\n{closes}"
        assert accepts(tokenizer, grammar, f'{thought}\n\n"x"')
        assert accepts(tokenizer, grammar, '"x"') == (not begun)
        assert not accepts(tokenizer, grammar, f"{thought}\n\nx")
        assert not accepts(tokenizer, grammar, f"{thought}")


def test_where_thinking_begins(tmp_path: Path) -> None:
    tokenizer = model(tmp_path, "thinking").tokenizer
    marks = thinking_of(tokenizer)
    assert marks == ("<think>", "</think>")
    for text, begun in (("Hello<think>\n", True), ("<think>\n\n</think>\n\n", False), ("Hello", False), ("", False)):
        assert ends_in_thinking(tokenizer, tokenizer.encode(text, add_special_tokens=False), marks) == begun


def test_tools_in_a_system_message() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "So.", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    messages = describe_tools(talk, [tool])
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert json.dumps(tool) in messages[0]["content"]
    assert messages[2]["content"] == f"{text}\n{text}"
    assert messages[3]["content"] == "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert messages[4]["content"] == f"So.\n{text}"
    named = describe_tools([{"role": "system", "content": "Be brief."}, *talk], [tool])
    assert named[0]["content"] == f"Be brief.\n\n{messages[0]['content']}"
    assert [message["content"] for message in describe_tools(talk, [])] == [
        message["content"] for message in messages[1:]
    ]
    assert all(message.keys() == {"role", "content"} for message in messages)


def test_templates_are_all_tried() -> None:
    assert {*FORMS, "thinking", "unknown"} == set(TEMPLATES)
