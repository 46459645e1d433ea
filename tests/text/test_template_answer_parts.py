"""Answers read by a tokenizer's response template: thinking, words and calls in a form that isn't known otherwise."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.toolbox import model
from text.test_answer_parts import said

from trimtab.text.answer_parts import AnswerPart
from trimtab.text.template_answer_parts import TemplateSplitter, has_response_template

TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {},
        "thinking": {"open": "<hm>", "close": "</hm>"},
        "tool_calls": {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    templated = model(tmp_path_factory.mktemp("template"), "unknown").tokenizer
    assert not has_response_template(templated)
    templated.response_template = TEMPLATE
    if not has_response_template(templated):
        pytest.skip("this version of transformers has no response templates")
    return templated


def read(tokenizer: Any, prompt: str, text: str, cuts: list[int]) -> Any:
    reading = TemplateSplitter(tokenizer, tokenizer.encode(prompt, add_special_tokens=False))
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts: list[AnswerPart] = [part for a, b in pairwise(places) for part in reading.add(text[a:b])]
    return said(parts + reading.finish())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 1000), max_size=20), begun=st.booleans())
def test_parts_however_the_text_is_cut(tokenizer: Any, cuts: list[int], begun: bool) -> None:
    opens = "" if begun else "<hm>\n"
    text = f'{opens}Hm, a < b\n</hm>\nLet me look.\n<call:f>{{"a": [1]}}</call>'
    thought, words, calls = read(tokenizer, "Hi<|assistant|>" + ("<hm>" if begun else ""), text, cuts)
    assert (thought, words) == ("Hm, a < b", "Let me look.")
    ((name, arguments),) = calls
    assert (name, json.loads(arguments)) == ("f", {"a": [1]})


def test_a_call_that_isnt_json_is_text_from_there_on(tokenizer: Any) -> None:
    reading = TemplateSplitter(tokenizer, [])
    parts = [
        *reading.add("Well. "),
        *reading.add("<call:f>{not JSON</call>"),
        *reading.add(" and so on"),
        *reading.finish(),
    ]
    _, words, calls = said(parts)
    assert not calls
    assert words.startswith("Well.")
    assert words.endswith(" and so on")


def test_the_server_reads_by_it(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")
    pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")
    from serve.toolbox import BARE

    from trimtab.serve.refusals import Refusal
    from trimtab.serve.schema import ChatRequest
    from trimtab.serve.tools import answer_shape

    def chat(**more: Any) -> Any:
        body = {"model": "trimtab", "messages": [{"role": "user", "content": "x"}], **more}
        return answer_shape(tokenizer, ChatRequest.model_validate(body), tokenizer.encode("x<|assistant|>"))

    for shape in (chat(), chat(tools=[BARE])):
        reading = shape.new_parser()
        assert isinstance(reading, TemplateSplitter)
        assert shape.grammar is None
    with pytest.raises(Refusal, match="unknown format of tool calls"):
        chat(tools=[BARE], tool_choice="required")
    assert chat(response_format={"type": "json_object"}).grammar is not None
