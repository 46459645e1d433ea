"""Grammars that constrain the text of an answer, from a JSON schema or in llguidance's Lark notation.

A schema is limited in size and depth. Keywords that a grammar can't enforce are refused, and the error names the part
of the schema. Grammars are compiled by llguidance, which `trimtab[serve]` installs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError, UnsupportedError

SCHEMA_SIZE = 64 << 10
"""The maximum size of a JSON schema, in characters."""
SCHEMA_DEPTH = 32
"""The maximum depth of a JSON schema, in levels."""
WHITESPACE = r"(\n {0,16}| {0,1})"
"""The whitespace between two JSON tokens. It is bounded, since a strongly steered model may emit whitespace forever."""
PARTS_TRIED = 1000
"""The maximum number of parts of a schema that are compiled separately to find an invalid one."""

MAX_EXACT_INTEGER = 2**53 - 1
"""The largest integer that every JSON parser represents exactly."""
SCHEMA_MAP_KEYWORDS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SCHEMA_LIST_KEYWORDS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMA_KEYWORDS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
"""Keywords of a schema whose values are schemas: an object of schemas, a list of them, or a single one."""

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's format. `ignored` has messages about keywords of lenient schemas it can't enforce."""

    text: str
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckedSchema:
    """A JSON schema that compiles, as text for a grammar, and messages about the keywords that aren't enforced."""

    text: str
    ignored: tuple[str, ...] = ()


def load_llguidance() -> Any:
    """The llguidance module. Raises `UnsupportedError` if it isn't installed."""
    try:
        import llguidance as library
    except ImportError:
        raise UnsupportedError(
            "answers by a grammar or a JSON schema need llguidance; pip install 'trimtab[serve]'"
        ) from None
    return library


def parser_limits() -> Any:
    """Limits for compiling a grammar and for one step: about 20 ms each, and 40 MB of states."""
    return load_llguidance().LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)


def json_grammar(schema: Schema, *, lenient: bool = False, where: str = "the JSON schema") -> Grammar:
    """The grammar of the JSON that a schema describes.

    Args:
        schema: A JSON schema (draft 2020-12, as far as llguidance supports it).
        lenient: Ignore keywords that a grammar can't enforce, such as `uniqueItems`, instead of refusing them. They are
            listed in `ignored`.
        where: The schema's name in error messages.

    Returns:
        The grammar.

    Raises:
        TrimtabError: It isn't a schema, is too large, can't be satisfied, or (unless `lenient`) can't be enforced; the
            message names the part.
        UnsupportedError: llguidance isn't installed.
    """
    checked = check_schema(schema, lenient=lenient, where=where)
    return Grammar(load_llguidance().LLMatcher.grammar_from_json_schema(checked.text), checked.ignored)


def lark_grammar(text: str, ignored: tuple[str, ...] = ()) -> Grammar:
    """A grammar in llguidance's Lark notation, made of schemas that were checked individually.

    Raises `TrimtabError` if it doesn't compile.
    """
    library = load_llguidance()
    grammar = library.LLMatcher.grammar_from_lark(text)
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(grammar, limits=parser_limits())
    if failed:
        raise TrimtabError(f"these schemas together are too complex for one grammar: {_line(messages[0])}")
    return Grammar(grammar, ignored)


def check_schema(schema: Schema, *, lenient: bool = False, where: str = "the JSON schema") -> CheckedSchema:
    """Check a schema and return it as text for a grammar. Raises as `json_grammar` does."""
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
        raise TrimtabError(f"{where} has {size} characters of JSON, more than the limit of {SCHEMA_SIZE}; simplify it")
    if _depth(schema) > SCHEMA_DEPTH:
        raise TrimtabError(f"{where} is nested deeper than {SCHEMA_DEPTH} levels; simplify it")
    text = _with_options(schema, lenient)
    reason, ignored = _compile(text)
    if reason is None:
        return CheckedSchema(text, tuple(f"{where}: {name}" for name in ignored))
    part = _failing_part(schema, reason, lenient)
    place = f"{where}, at {part}" if part else where
    raise TrimtabError(f"{place}: {_explain(reason)}")


def _with_options(schema: Schema, lenient: bool) -> str:
    whole = {} if isinstance(schema, bool) else _bound_integers(schema)
    whole["x-guidance"] = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return json.dumps(whole, allow_nan=False)


def _bound_integers(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with integers bounded to the range that every JSON parser represents exactly (RFC 7493, section 2.2).

    Without a bound, a strongly steered or small model may emit digits forever.
    """
    bounded = dict(schema)
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAP_KEYWORDS and isinstance(value, Mapping):
            bounded[keyword] = {name: _bounded_part(part) for name, part in value.items()}
        elif keyword in SCHEMA_LIST_KEYWORDS and isinstance(value, list):
            bounded[keyword] = [_bounded_part(part) for part in value]
        elif keyword in SCHEMA_KEYWORDS:
            bounded[keyword] = _bounded_part(value)
    kinds = schema.get("type")
    if kinds == "integer" or (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds):
        if "minimum" not in schema and "exclusiveMinimum" not in schema:
            bounded["minimum"] = -MAX_EXACT_INTEGER
        if "maximum" not in schema and "exclusiveMaximum" not in schema:
            bounded["maximum"] = MAX_EXACT_INTEGER
    return bounded


def _bounded_part(part: Any) -> Any:
    return _bound_integers(part) if isinstance(part, Mapping) else part


def _compile(text: str) -> tuple[str | None, tuple[str, ...]]:
    """The reason why a schema doesn't compile, or `None`; and messages about ignored keywords."""
    library = load_llguidance()
    try:
        grammar = library.LLMatcher.grammar_from_json_schema(text)
    except ValueError as error:
        return str(error), ()
    failed, messages = library.LLMatcher.validate_grammar_with_warnings(grammar, limits=parser_limits())
    if failed:
        return re.sub(r"\s+while processing .*", "", str(messages[0]), flags=re.DOTALL), ()
    return None, tuple(map(_line, messages))


def _failing_part(schema: Schema, reason: str, lenient: bool) -> str:
    """A JSON pointer to the innermost part that fails by itself for the same reason; empty for the whole schema."""
    definitions = {
        name: schema[name] for name in ("$defs", "definitions") if isinstance(schema, Mapping) and name in schema
    }
    path, remaining, current = "", PARTS_TRIED, schema
    while True:
        for name, part in _parts(current):
            remaining -= 1
            if remaining < 0:
                return path
            standalone = {**definitions, **part} if isinstance(part, Mapping) else part
            if _compile(_with_options(standalone, lenient))[0] == reason:
                path, current = f"{path}/{name}", part
                break
        else:
            return path


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """The direct subschemas of a schema, with their paths."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAP_KEYWORDS:
            inner = list(value.items()) if isinstance(value, Mapping) else []
        elif keyword in SCHEMA_LIST_KEYWORDS:
            inner = list(enumerate(value)) if isinstance(value, list) else []
        elif keyword in SCHEMA_KEYWORDS:
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


def _explain(reason: str) -> str:
    if match := re.match(r'Unimplemented keys: \["(.*)"\]', reason):
        names = ", ".join(match[1].split('", "'))
        return f"a grammar can't enforce {names}; leave it out, or don't ask for strict"
    if reason.startswith("Unknown format"):
        return f"{_line(reason)}; leave it out, or don't ask for strict"
    if "retrieving it failed" in reason:
        return "a $ref points outside the schema; put its definition into $defs"
    return _line(reason)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"
