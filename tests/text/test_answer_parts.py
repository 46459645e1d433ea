"""What an answer says, piece by piece: the parts are the same however its text is cut, and nothing is lost."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.text.answer_parts import (
    AnswerMarkers,
    AnswerPart,
    AnswerSplitter,
    AnswerText,
    CallArguments,
    CallStart,
    ThinkingText,
)
from trimtab.text.calls import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, CallForm

THINK = ("<think>", "</think>")
ARGUMENTS = [{"city": 'Lyon "}]</tool_call>', "n": [1, {"a": None}]}, {}]
NAMES = ["get_weather", "f"]


def written(form: CallForm, calls: list[tuple[str, str]]) -> str:
    """Calls as a model writes them."""
    bodies = [f"{form.before}{name}{form.between}{arguments}{form.after}" for name, arguments in calls]
    if form.multiple_calls == "list":
        return f"{form.opens}[{', '.join(bodies)}]"
    blank = "\n" if form.closes else ""
    return blank.join(f"{form.opens}{body}{form.closes}" for body in bodies)


def said(parts: list[AnswerPart]) -> tuple[str, str, list[tuple[str, str]]]:
    """Thinking, words, and calls."""
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallStart):
            assert part.index == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            assert part.index == len(calls) - 1
            calls[-1][1] += part.text
    thought, words = ("".join(p.text for p in parts if isinstance(p, kind)) for kind in (ThinkingText, AnswerText))
    return thought, words, [(name, arguments) for name, arguments in calls]


def read(marks: AnswerMarkers, text: str, cuts: list[int]) -> tuple[str, str, list[tuple[str, str]]]:
    reading = AnswerSplitter(marks)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parts = [part for a, b in itertools.pairwise(places) for part in reading.add(text[a:b])]
    return said(parts + reading.finish())


CUTS = st.lists(st.integers(0, 10_000), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=3)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_ARGS, LLAMA], ids=lambda form: form.name)
@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from(NAMES), OBJECTS), min_size=1, max_size=3),
    words=st.sampled_from(["", "Let me look.", "a < b", "two\n\nlines <tool"]),
    thought=st.sampled_from([None, "", "Hm, {a} < b.\n\n<tool_call> is what I need"]),
    spaced=st.booleans(),
    cuts=CUTS,
)
def test_what_was_written_is_read(
    form: CallForm, calls: list[Any], words: str, thought: str | None, spaced: bool, cuts: list[int]
) -> None:
    if form.is_whole_answer:
        calls, words = calls[:1], ""
    written_calls = [(name, json.dumps(arguments, indent=1 if spaced else None)) for name, arguments in calls]
    text = (words + "\n" if words else "") + written(form, written_calls)
    if thought is not None:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    for strict in (True, False):
        marks = AnswerMarkers(THINK, False, form, NAMES, strict)
        assert read(marks, text, cuts) == (thought or "", words, written_calls)
    if thought is not None:  # the prompt has opened it
        begun = text.removeprefix("<think>\n")
        assert read(AnswerMarkers(THINK, True, form, NAMES, True), begun, cuts) == (thought, words, written_calls)


@settings(max_examples=100, deadline=None)
@given(text=st.text('<think>/_cal{}" \nab', max_size=60), cuts=CUTS)
def test_text_without_markers_is_as_it_was(text: str, cuts: list[int]) -> None:
    assert read(AnswerMarkers(), text, cuts) == ("", text, [])
    if "<tool_call>" not in text and "<think>" not in text:
        assert read(AnswerMarkers(THINK, False, HERMES), text, cuts) == ("", text, [])
    if not text.lstrip().startswith("{"):
        assert read(AnswerMarkers(calls=LLAMA, tools=NAMES), text, cuts) == ("", text, [])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "unknown", "parameters": {}}',
        '{"name": "f", "parameters": {}} and more',
        '{"name": "f", "parameters": {"a": }}',
        '{"answer": 42}',
        "{not JSON",
    ],
)
def test_an_object_that_is_no_call_is_words(text: str) -> None:
    assert read(AnswerMarkers(calls=LLAMA, tools=NAMES), text, [3, 9]) == ("", text, [])


def test_a_call_that_is_cut_off() -> None:
    """What is known of it is told; what isn't a call yet is words."""
    marks = AnswerMarkers(calls=HERMES, tools=NAMES, strict=True)
    whole = written(HERMES, [("f", '{"a": "b"}')])
    begins = whole.index('{"a"')
    for cut in range(len(whole)):
        thought, words, calls = read(marks, whole[:cut], [])
        assert not thought
        if cut > begins:
            assert (words, calls) == ("", [("f", '{"a": "b"}'[: cut - begins])])
        elif calls:
            assert calls == [("f", "")]
        else:
            assert words == whole[:cut]


def test_arguments_come_as_they_are_written() -> None:
    parts = AnswerSplitter(AnswerMarkers(calls=HERMES, tools=NAMES, strict=True))
    text = written(HERMES, [("f", '{"a": "bcd"}')])
    pieces = [part for letter in text for part in parts.add(letter)]
    assert sum(isinstance(part, CallArguments) for part in pieces) == len('{"a": "bcd"}')
    assert len({part.id for part in pieces if isinstance(part, CallStart)}) == 1


def test_thinking_that_never_ends() -> None:
    assert read(AnswerMarkers(THINK, True), "Hm, well \n", [4]) == ("Hm, well", "", [])
    assert read(AnswerMarkers(THINK), "<think> Hm", []) == ("Hm", "", [])
