"""The split shares no base query between its parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import TrimtabError
from trimtab.tune.split import digest_of, split_by_query


@given(st.lists(st.integers(0, 9), min_size=2).filter(lambda g: len(set(g)) > 1), st.floats(0.01, 0.99), st.integers())
def test_every_prompt_is_in_one_part_and_its_group_with_it(groups, share, seed):
    split = split_by_query(groups, held_out=share, seed=seed)
    assert sorted(split.search + split.held_out) == list(range(len(groups)))
    sides = [{groups[i] for i in part} for part in (split.search, split.held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert all(sides)
    assert split == split_by_query(groups, held_out=share, seed=seed)


def test_the_share_is_of_groups():
    split = split_by_query([i // 5 for i in range(50)], held_out=0.4)
    assert (len(split.search), len(split.held_out)) == (30, 20)
    assert split != split_by_query([i // 5 for i in range(50)], held_out=0.4, seed=1)
    assert split_by_query("aab", held_out=0).held_out == ()


def test_digests_tell_queries_apart():
    groups = ["a", "a", "b", "c"]
    assert digest_of(groups, [0, 2]) == digest_of(groups, [2, 1])
    assert digest_of(groups, [0, 2]) != digest_of(groups, [0, 3])


def test_what_cannot_be_split_is_refused():
    with pytest.raises(TrimtabError, match="no prompts"):
        split_by_query([])
    with pytest.raises(TrimtabError, match="the same base query"):
        split_by_query(["a", "a"])
    with pytest.raises(ValueError, match="below 1"):
        split_by_query(["a", "b"], held_out=1)
