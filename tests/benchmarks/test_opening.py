"""What all texts begin with runs once, and changes nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import FAMILIES, prompt

from trimtab import LM, Site
from trimtab.engines.transformers.read import SHARE_FROM, Text, read_groups

SITES = [Site(1), Site(3)]
LENGTHS = (3, 17, 9, 9, 30)


@pytest.fixture(scope="module", params=list(FAMILIES))
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def groups_after(lm: LM, opening: int, read_first: int | None = None) -> list[list[Text]]:
    """Pairs that begin alike, all of them with the same `opening` tokens; read at the end, and where told."""
    common = lm.encode(prompt(1, opening))
    groups = []
    for i, length in enumerate(LENGTHS):
        head = [*common, *lm.encode(prompt(10 + i, length))]
        tails = [lm.encode(prompt(30 + i, 1)), lm.encode(prompt(60 + i, 1 + i % 3))]
        also = [] if read_first is None else [read_first]
        groups.append([Text([*head, *t], [*also, len(head) + len(t) - 1, len(head) - 1]) for t in tails])
    return groups


def read(lm: LM, groups: list[list[Text]], budget: int) -> dict[tuple[Site, int, int], torch.Tensor]:
    return {
        (site, g, member): values
        for batch in read_groups(lm.layout, groups, SITES, tokens_per_batch=budget)
        for site in SITES
        for n, g in enumerate(batch.groups)
        for member, values in enumerate(batch.values[site][n])
    }


@pytest.mark.long_unless(lambda lm, budget: lm in ("llama", "gemma3") or budget == 100)  # every family once
@pytest.mark.parametrize("read_first", [None, 0, SHARE_FROM + 2])
@pytest.mark.parametrize("budget", [1, 100, 4096])
def test_an_opening_changes_nothing(lm: LM, budget: int, read_first: int | None) -> None:
    groups = groups_after(lm, 2 * SHARE_FROM, read_first)
    together = read(lm, groups, budget)
    tolerance = 1e-3 if lm.model.dtype == torch.float32 else 2e-5
    for g, group in enumerate(groups):
        for member, text in enumerate(group):
            alone = read(lm, [[text]], budget)
            for site in SITES:
                expected = alone[site, 0, 0]
                assert torch.allclose(together[site, g, member], expected, atol=tolerance, rtol=1e-4)


def test_an_opening_runs_once() -> None:
    lm = tiny.tiny(next(iter(FAMILIES)))
    groups = groups_after(lm, 3 * SHARE_FROM)
    read(lm, groups[:1], 4096)  # what blocks put out is looked at once, by running them
    tokens: list[int] = []
    handle = lm.layout.decoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    read(lm, groups, 4096)
    handle.remove()
    assert tokens[0] == len(lm.encode(prompt(1, 3 * SHARE_FROM)))
    assert sum(tokens[1:]) < len(groups) * (max(LENGTHS) + 2 * 3 + 2)


def test_no_more_is_kept_than_asked_for() -> None:
    lm = tiny.tiny(next(iter(FAMILIES)))
    text = Text(lm.encode(prompt(1, 20)), [5])
    (batch,) = read_groups(lm.layout, [[text]], SITES)
    assert all(values[0][0].untyped_storage().nbytes() == values[0][0].nbytes for values in batch.values.values())
