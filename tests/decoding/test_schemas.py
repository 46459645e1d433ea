"""JSON schemas as grammars: what is refused, and how it is named."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

from trimtab.decoding.grammar import (
    MAX_EXACT_INTEGER,
    SCHEMA_DEPTH,
    SCHEMA_SIZE,
    check_schema,
    json_grammar,
    lark_grammar,
)
from trimtab.errors import TrimtabError


def within(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"ok": {"type": "string"}, "bad": {"type": "array", "items": schema}}}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"type": "array", "uniqueItems": True}, "a grammar can't enforce uniqueItems"),
        ({"type": "string", "format": "shoe-size"}, "Unknown format: shoe-size"),
        ({"$ref": "https://example.com/schema"}, r"points outside the schema"),
    ],
)
def test_the_wrong_part_is_named(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(TrimtabError, match=f"^the JSON schema, at /properties/bad/items: .*{words}"):
        json_grammar(within(schema))
    shared = {"$defs": {"X": {"type": "array", "items": schema}}, "type": "object"}
    with pytest.raises(TrimtabError, match=f"^tool 'f', at /\\$defs/X/items: .*{words}"):
        json_grammar({**shared, "properties": {"x": {"$ref": "#/$defs/X"}}}, where="tool 'f'")


def test_the_whole_is_named_where_no_part_is_wrong() -> None:
    with pytest.raises(TrimtabError, match=r"^the JSON schema: .*incompatible types"):
        json_grammar({"allOf": [{"type": "string"}, {"type": "integer"}]})


def test_bounds() -> None:
    deep: Any = {"type": "string"}
    for _ in range(SCHEMA_DEPTH):
        deep = {"type": "array", "items": deep}
    endless: Any = {}
    for _ in range(100_000):
        endless = {"items": endless}
    for schema in (deep, endless):
        with pytest.raises(TrimtabError, match=f"deeper than {SCHEMA_DEPTH} levels"):
            json_grammar(schema)
    with pytest.raises(TrimtabError, match=f"more than the limit of {SCHEMA_SIZE}"):
        json_grammar({"enum": ["x" * SCHEMA_SIZE]})
    for wrong, words in (([], "an object"), ("x", "an object"), (False, "no JSON fits"), ({"x": {1, 2}}, "isn't JSON")):
        with pytest.raises(TrimtabError, match=words):
            json_grammar(wrong)  # type: ignore[arg-type]
    assert json_grammar(True).text


@pytest.mark.parametrize("pattern", ["(a{1,900}){1,900}", "(x+x+)+y" * 40, "[a-z]{100000}", "(.*a){40}b"])
def test_patterns_are_cheap_or_refused(pattern: str) -> None:
    """Compiling has so much fuel: what needs more is refused by it, rather than by patience."""
    with suppress(TrimtabError):
        assert json_grammar({"type": "string", "pattern": pattern}).text


def test_whole_numbers_are_within_what_is_exact() -> None:
    bounds = {"minimum": -MAX_EXACT_INTEGER, "maximum": MAX_EXACT_INTEGER}
    kinds: Any = {
        "a": {"type": "integer"},
        "b": {"anyOf": [{"type": ["integer", "null"]}, {"type": "number"}]},
        "c": {"type": "integer", "exclusiveMinimum": 3},
        "d": {"type": "array", "items": {"$ref": "#/$defs/x"}},
        "e": {"const": {"type": "integer"}},
    }
    schema = {"type": "object", "properties": kinds, "$defs": {"x": {"type": "integer", "maximum": 5}}}
    value = json.loads(check_schema(schema).text)
    a, b, c, d, e = value["properties"].values()
    assert a == {"type": "integer", **bounds}
    assert b["anyOf"] == [{"type": ["integer", "null"], **bounds}, {"type": "number"}]
    assert c == {"type": "integer", "exclusiveMinimum": 3, "maximum": MAX_EXACT_INTEGER}
    assert (d, e) == (kinds["d"], kinds["e"])
    assert value["$defs"]["x"] == {"type": "integer", "maximum": 5, "minimum": -MAX_EXACT_INTEGER}


def test_lenient_schemas_say_what_isnt_held() -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "shoe-size"}}
    ignored = json_grammar(schema, lenient=True, where="tool 'f'").ignored
    assert ignored
    assert all(message.startswith("tool 'f': ") for message in ignored)
    assert "uniqueItems" in "".join(ignored)
    assert not json_grammar({"type": "array"}, lenient=True).ignored


def test_grammars_in_larks_notation() -> None:
    text = f'start: "a" %json {json.dumps({"type": "integer"})}'
    assert lark_grammar(text, ("x",)).ignored == ("x",)
    with pytest.raises(TrimtabError, match="too complex for one grammar"):
        lark_grammar('start: "a')
