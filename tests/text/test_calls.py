"""Grammars of tool calls and thinking: what a model may write, in the form of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

from serve.toolbox import SPECIAL, TEMPLATES, model
from text.test_said import written

from trimtab.decoding.grammar import check_schema, lark_grammar
from trimtab.engines.transformers.grammar import Grammars
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    Tool,
    call_rules,
    described,
    form_of,
    special_tokens,
    takes_tools,
    thinking_rules,
)
from trimtab.text.thinking import is_thinking, thinking_of

FORMS = {"no tools": HERMES, "hermes": HERMES, "mistral": MISTRAL, "mistral, with [ARGS]": MISTRAL_ARGS, "llama": LLAMA}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
CALL = ("f", '{"n": 1}')


@pytest.fixture(scope="module", params=FORMS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, model(tmp_path_factory.mktemp("forms"), request.param).tokenizer


def accepts(tokenizer: Any, rules: str | None, text: str) -> bool:
    """Whether a text and its end are what the grammar allows."""
    assert rules is not None
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    one = grammars.matcher(lark_grammar(rules))
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            if one.done:
                return False
            one.take(token)
        if not one.done:
            one.take(tokenizer.eos_token_id)
    except TrimtabError:
        return False
    return True


def rules(tokenizer: Any, **how: bool) -> str | None:
    tools = [Tool(name, check_schema(SCHEMA).text) for name in ("f", "g-2")]
    found = call_rules(form_of(tokenizer), tools, special_tokens(tokenizer), **how)
    return found and f"start: calls\n{found}"


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
    one, two = written(form, [CALL]), written(form, [CALL, ("g-2", '{\n "n": -7\n}')])
    for several in (False, True):
        asked = rules(tokenizer, several=several, free=False)
        assert accepts(tokenizer, asked, one)
        assert accepts(tokenizer, asked, two) == (several and form.many != "one")
        for wrong in (
            "",
            "Hello",
            f"x{one}",
            f"{one}x",
            one.replace("1", '"1"'),
            one.replace("f", "h", 1) if not form.before else one.replace('"f"', '"h"'),
            one[:-1],
        ):
            assert not accepts(tokenizer, asked, wrong), wrong


def test_calls_that_may_be(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    form = FORMS[name]
    one = written(form, [CALL])
    for several in (False, True):
        asked = rules(tokenizer, several=several, free=True)
        if form.alone:
            assert asked is None
            continue
        for text in ("", "Hello, <tool {}\n[TOOL", one, f"Let me look.\n\n{one}"):
            assert accepts(tokenizer, asked, text), text
        assert not accepts(tokenizer, asked, one.replace("1", '"1"'))
        assert not accepts(tokenizer, asked, f"Hello {form.opens}")
        if form.many == "each":
            assert accepts(tokenizer, asked, f"{one}{one} and words") == several


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[TOOL_CALLS]", "[ARGS]")])
def test_thinking_comes_before(tmp_path: Path, marks: tuple[str, str]) -> None:
    """With marks that are texts, and with such as are special tokens."""
    tokenizer = model(tmp_path, "mistral, with [ARGS]").tokenizer
    opens, closes = marks
    for begun in (False, True):
        start = thinking_rules(opens, closes, special_tokens(tokenizer), begun=begun, then="answer")
        asked = f"{start}\nanswer: %json {json.dumps({'const': 'x'})}"
        thought = f"{'' if begun else opens}\nHm </thin, a {{b}}\n{closes}"
        assert accepts(tokenizer, asked, f'{thought}\n\n"x"')
        assert accepts(tokenizer, asked, '"x"') == (not begun)
        assert not accepts(tokenizer, asked, f"{thought}\n\nx")
        assert not accepts(tokenizer, asked, f"{thought}")


def test_where_thinking_begins(tmp_path: Path) -> None:
    tokenizer = model(tmp_path, "thinking").tokenizer
    marks = thinking_of(tokenizer)
    assert marks == ("<think>", "</think>")
    for text, begun in (("Hello<think>\n", True), ("<think>\n\n</think>\n\n", False), ("Hello", False), ("", False)):
        assert is_thinking(tokenizer, tokenizer.encode(text, add_special_tokens=False), marks) == begun


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
    found = described(talk, [tool])
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert [one["role"] for one in found] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert json.dumps(tool) in found[0]["content"]
    assert found[2]["content"] == f"{text}\n{text}"
    assert found[3]["content"] == "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert found[4]["content"] == f"So.\n{text}"
    named = described([{"role": "system", "content": "Be brief."}, *talk], [tool])
    assert named[0]["content"] == f"Be brief.\n\n{found[0]['content']}"
    assert [one["content"] for one in described(talk, [])] == [one["content"] for one in found[1:]]
    assert all(one.keys() == {"role", "content"} for one in found)


def test_templates_are_all_tried() -> None:
    assert {*FORMS, "thinking", "unknown"} == set(TEMPLATES)
