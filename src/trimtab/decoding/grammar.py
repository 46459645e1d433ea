"""What an answer's text may be: a grammar, from a JSON schema or in llguidance's own notation.

A schema is bounded in size and depth, and what a grammar can't hold to is refused with the part of the schema in which
it stands. Grammars are compiled by llguidance, which `trimtab[serve]` installs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError, UnsupportedError

SCHEMA_SIZE = 64 << 10
"""Characters of a JSON schema at most."""
SCHEMA_DEPTH = 32
"""Levels of a JSON schema at most."""
WHITESPACE = r"(\n {0,16}| {0,1})"
"""What may stand between two parts of JSON. It is bounded, as a model that is pushed hard may go on with blanks."""
PARTS_TRIED = 1000
"""So many parts of a schema are compiled alone, at most, to find the one that is wrong."""

EXACT = 2**53 - 1
"""The largest whole number that every reader of JSON knows exactly."""
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
"""Keywords of a schema that hold schemas: by name, in a list, or one."""

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's form. `ignored` are what it doesn't hold to of lenient schemas, as sentences."""

    text: str
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A JSON schema that compiles, as it stands in a grammar, and what isn't held of it."""

    text: str
    ignored: tuple[str, ...] = ()


def load_llguidance() -> Any:
    """The library. Raises `UnsupportedError` where it isn't installed."""
    try:
        import llguidance as library
    except ImportError:
        raise UnsupportedError(
            "answers by a grammar or a JSON schema need llguidance; pip install 'trimtab[serve]'"
        ) from None
    return library


def limits() -> Any:
    """What compiling and one step may cost: some 20 ms each, and 40 MB of states."""
    return load_llguidance().LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)


def json_grammar(schema: Schema, *, lenient: bool = False, where: str = "the JSON schema") -> Grammar:
    """The grammar of JSON that a schema describes.

    Args:
        schema: A JSON schema (draft 2020-12, as far as llguidance knows it).
        lenient: Leave out keywords that no grammar holds to, such as `uniqueItems`, instead of refusing them. They are
            told in `ignored`.
        where: What the schema is called in errors.

    Raises:
        TrimtabError: For what isn't a schema, is too large, can't be satisfied, or (unless it is lenient) can't be
            held to; it names the part.
        UnsupportedError: llguidance isn't installed.
    """
    checked = check_schema(schema, lenient=lenient, where=where)
    return Grammar(load_llguidance().LLMatcher.grammar_from_json_schema(checked.text), checked.ignored)


def lark_grammar(text: str, ignored: tuple[str, ...] = ()) -> Grammar:
    """A grammar in llguidance's Lark notation, of schemas that were checked one by one.

    Raises `TrimtabError` where it doesn't compile.
    """
    library = load_llguidance()
    grammar = library.LLMatcher.grammar_from_lark(text)
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if failed:
        raise TrimtabError(f"these schemas are too much for one grammar together: {_line(messages[0])}")
    return Grammar(grammar, ignored)


def check_schema(schema: Schema, *, lenient: bool = False, where: str = "the JSON schema") -> Checked:
    """A schema as text for a grammar. Raises as `json_grammar` does."""
    if not isinstance(schema, (Mapping, bool)):
        raise TrimtabError(f"{where} is an object (or true), not {type(schema).__name__}")
    if schema is False:
        raise TrimtabError(f"{where} is false: no JSON fits it")
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except RecursionError:
        raise TrimtabError(f"{where} is nested deeper than {SCHEMA_DEPTH} levels") from None
    except (TypeError, ValueError) as error:
        raise TrimtabError(f"{where} isn't JSON: {error}") from None
    if size > SCHEMA_SIZE:
        raise TrimtabError(f"{where} has {size} characters of JSON, {SCHEMA_SIZE} are the most; describe less of it")
    if _depth(schema) > SCHEMA_DEPTH:
        raise TrimtabError(f"{where} is nested deeper than {SCHEMA_DEPTH} levels; describe less of it")
    text = _with_options(schema, lenient)
    reason, ignored = _compiled(text)
    if reason is None:
        return Checked(text, tuple(f"{where}: {name}" for name in ignored))
    part = _wrong_part(schema, reason, lenient)
    place = f"{where}, at {part}" if part else where
    raise TrimtabError(f"{place}: {_explained(reason)}")


def _with_options(schema: Schema, lenient: bool) -> str:
    whole = {} if isinstance(schema, bool) else _bounded(schema)
    whole["x-guidance"] = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return json.dumps(whole, allow_nan=False)


def _bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with whole numbers that have no bounds within those that every reader of JSON knows exactly.

    A model that is pushed hard, or is small, may add digit to digit without end (RFC 7493, section 2.2, has the range).
    """
    bounded = dict(schema)
    for keyword, value in schema.items():
        if keyword in BY_NAME and isinstance(value, Mapping):
            bounded[keyword] = {name: _bounded_part(part) for name, part in value.items()}
        elif keyword in LISTS and isinstance(value, list):
            bounded[keyword] = [_bounded_part(part) for part in value]
        elif keyword in ONE:
            bounded[keyword] = _bounded_part(value)
    kinds = schema.get("type")
    if kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds):
        if "minimum" not in schema and "exclusiveMinimum" not in schema:
            bounded["minimum"] = -EXACT
        if "maximum" not in schema and "exclusiveMaximum" not in schema:
            bounded["maximum"] = EXACT
    return bounded


def _bounded_part(part: Any) -> Any:
    return _bounded(part) if isinstance(part, Mapping) else part


def _compiled(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Why a schema doesn't compile, `None` where it does; and what is left out of it."""
    library = load_llguidance()
    try:
        grammar = library.LLMatcher.grammar_from_json_schema(text)
    except ValueError as error:
        return str(error), ()
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    if failed:
        return re.sub(r"\s+while processing .*", "", str(messages[0]), flags=re.DOTALL), ()
    return None, tuple(map(_line, messages))


def _wrong_part(schema: Schema, reason: str, lenient: bool) -> str:
    """A JSON pointer to the innermost part that alone fails for the same reason; empty for the whole."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if isinstance(schema, Mapping) and name in schema}
    path, left, here = "", PARTS_TRIED, schema
    while True:
        for name, part in _parts(here):
            left -= 1
            if left < 0:
                return path
            whole = {**shared, **part} if isinstance(part, Mapping) else part
            if _compiled(_with_options(whole, lenient))[0] == reason:
                path, here = f"{path}/{name}", part
                break
        else:
            return path


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas right inside of a schema."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword in BY_NAME:
            inner = list(value.items()) if isinstance(value, Mapping) else []
        elif keyword in LISTS:
            inner = list(enumerate(value)) if isinstance(value, list) else []
        elif keyword in ONE:
            if isinstance(value, Mapping):
                yield keyword, value
            continue
        else:
            continue
        for name, part in inner:
            yield f"{keyword}/{name}", part


def _depth(value: Any) -> int:
    level, here = 0, [value]
    while here:
        level += 1
        here = [
            inner
            for part in here
            for inner in (part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ())
            if isinstance(inner, (Mapping, list))
        ]
        if level > SCHEMA_DEPTH:
            break
    return level


def _explained(reason: str) -> str:
    if match := re.match(r'Unimplemented keys: \["(.*)"\]', reason):
        names = ", ".join(match[1].split('", "'))
        return f"no grammar can hold to {names}; leave it out, or don't ask for strict"
    if reason.startswith("Unknown format"):
        return f"{_line(reason)}; leave it out, or don't ask for strict"
    if "retrieving it failed" in reason:
        return "a $ref leads out of the schema; put what it means into $defs"
    return _line(reason)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"
