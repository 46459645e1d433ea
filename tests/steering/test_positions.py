"""Positions combined, written and read again."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import Add, Edit, Positions, Site, Steering, TrimtabError, load, save
from trimtab.steering.grammar import parse_list
from trimtab.steering.meanings import Meaning
from trimtab.steering.positions import NAMED

FLAT = st.sampled_from(
    [
        *NAMED.values(),
        Positions.window(1, 4),
        Positions.first_generated(2),
        Positions.opening(3),
        Positions.span(0, 2),
        Positions.tokens([1, -2]),
        Positions.thinking(),
        Positions.answer("<a>", "</a>"),
        Positions.after("the end"),
        Positions.at('"('),
        Positions.outside_tools(),
        Positions.outside_tools(("[TOOL_CALLS]", ""), ("<x>", "</x>")),
    ]
)
POSITIONS = st.recursive(
    FLAT,
    lambda inner: st.one_of(
        inner.map(lambda a: ~a),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
    ),
    max_leaves=6,
)


def naive(positions: Positions, t: int, n: int, holding: frozenset[Meaning]) -> bool:
    rule = positions.rule
    if rule is None:
        spans = positions.resolve(n)
        return any(start <= t and (stop is None or t < stop) for start, stop in spans)
    if isinstance(rule, Meaning):
        return t >= n and rule in holding
    parts = [naive(part, t, n, holding) for part in rule.parts]
    return not parts[0] if rule.operator == "not" else any(parts) if rule.operator == "any" else all(parts)


@given(POSITIONS, st.integers(2, 7))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_they_are_sets_of_tokens(positions: Positions, n: int) -> None:
    meanings = sorted(positions.meanings)
    reached = set()
    for held in (frozenset(some) for k in range(len(meanings) + 1) for some in combinations(meanings, k)):
        spans = positions.resolve(n, held)
        tokens = {t for t in range(16) if any(a <= t and (b is None or t < b) for a, b in spans)}
        assert tokens == {t for t in range(16) if naive(positions, t, n, held)}
        reached |= tokens
    assert reached == {t for t in range(16) if any(a <= t and (b is None or t < b) for a, b in positions.reach(n))}
    if meanings:
        with pytest.raises(TrimtabError, match="depend on the generated text"):
            positions.resolve(n)


@given(POSITIONS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_their_text_and_their_data_are_read_again(positions: Positions) -> None:
    again = Positions.parse(str(positions))
    for n in (2, 5):
        for held in (frozenset(), positions.meanings):
            assert _tokens(again, n, held) == _tokens(positions, n, held)
    assert Positions.from_json(positions.to_json()) == positions
    assert parse_list(f"{positions}, generated, tokens:1,2") == [
        again,
        Positions.generated(),
        Positions.tokens([1, 2]),
    ]


def _tokens(positions: Positions, n: int, held: frozenset[Meaning]) -> set[int]:
    spans = positions.resolve(n, held)
    return {t for t in range(20) if any(a <= t and (b is None or t < b) for a, b in spans)}


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("thinking", Positions.thinking()),
        ("after:Final answer:", Positions.after("Final answer:")),
        ("after:a | all & at:</think>", Positions.after("a") | Positions.all() & Positions.at("</think>")),
        ("at:<|channel|>", Positions.at("<|channel|>")),
        (r'after:"\n\n" & ~thinking', Positions.after("\n\n") & ~Positions.thinking()),
        ("(thinking | at:x) & ~first:3", (Positions.thinking() | Positions.at("x")) & ~Positions.first_generated(3)),
        ("answer:<a>:</a>", Positions.answer("<a>", "</a>")),
        ("outside-tools:[TOOL_CALLS]:", Positions.outside_tools(("[TOOL_CALLS]", ""))),
        ("prompt | first:2", Positions.prompt() | Positions.first_generated(2)),
    ],
)
def test_what_is_written(text: str, positions: Positions) -> None:
    assert Positions.parse(text) == positions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("thought", "outside-tools, or combine several with |, & and ~"),
        ("after", "after needs one text that isn't empty: after:TEXT"),
        ("thinking:<think>", "needs both markers, thinking:OPEN:CLOSE, or none"),
        ("outside-tools:a", "needs markers in pairs"),
        ("(thinking", "are not known"),
        ("thinking thinking", "are not known"),
        ("thinking | ", "are not known"),
        ("~" * 40 + "thinking", "nested more than"),
        ("after:" + "x" * 300, "at most 256 characters"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        Positions.parse(text)
    assert words in str(caught.value)


def test_markers_come_in_pairs() -> None:
    with pytest.raises(TrimtabError, match="needs both markers"):
        Positions.thinking("<think>")
    with pytest.raises(TrimtabError, match="markers come in pairs"):
        Positions.outside_tools("<tool_call>")  # type: ignore[arg-type]


def test_files_keep_them_and_older_readers_refuse_them(tmp_path: Path) -> None:
    rule = Positions.thinking() & ~Positions.after("so")
    steering = Steering((Edit(Site(1), Add(torch.ones(4)), rule), Edit(Site(2), Add(torch.ones(4)))))
    path = tmp_path / "one.safetensors"
    save(steering, path)
    assert load(path) == steering
    header = path.read_bytes().decode(errors="replace")
    assert r"\"format\":2" in header
    save(steering.at(Positions.all()), path)
    assert r"\"format\":1" in path.read_bytes().decode(errors="replace")
