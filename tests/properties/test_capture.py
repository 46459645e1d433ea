"""Reading activations: right, independent of batches and padding, and not more than asked for."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from tiny import FAMILIES, LAYERS, prompt

from trimtab import LM, Positions, Site, TrimtabError
from trimtab.engines.transformers.read import Text, read_groups

TEXTS = [prompt(seed, length) for seed, length in enumerate((14, 3, 22, 9, 22, 31, 5))]


@pytest.fixture(scope="module", params=list(FAMILIES))
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@cache
def alone(lm: LM, ids: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Every block's output for one unpadded text, through plain hooks: `{layer: [tokens, width]}`."""
    activations: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda _m, _a, o, layer=layer: activations.update({layer: (o if isinstance(o, torch.Tensor) else o[0])[0]})
        )
        for layer, block in enumerate(lm.layout.blocks)
    ]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return activations


def tolerance(lm: LM) -> float:
    return 1e-3 if lm.model.dtype == torch.float32 else 2e-5


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_capture_equals_one_text_at_a_time(lm: LM, budget: int) -> None:
    ids = [lm.encode(text) for text in TEXTS]
    sites = [Site(0), Site(2), Site(LAYERS - 1)]
    groups = [[Text(i, [0, len(i) // 2, len(i) - 1])] for i in ids]
    seen = []
    for batch in read_groups(lm.layout, groups, sites, tokens_per_batch=budget):
        seen += batch.groups
        for n, g in enumerate(batch.groups):
            reference = alone(lm, tuple(ids[g]))
            for site in sites:
                expected = reference[site.layer][list(groups[g][0].positions)]
                assert torch.allclose(batch.values[site][n][0], expected, atol=tolerance(lm), rtol=1e-4)
    assert sorted(seen) == list(range(len(TEXTS)))


@pytest.mark.parametrize("budget", [1, 80, 4096])
def test_a_shared_beginning_changes_nothing(lm: LM, budget: int) -> None:
    """Members that begin alike are read as if each stood alone, before, at and after the fork."""
    heads = [lm.encode(text) for text in TEXTS]
    groups = []
    for i, head in enumerate(heads):
        tails = (lm.encode(prompt(50 + i, 1 + i % 3)), lm.encode(prompt(80 + i, 2)))
        groups.append([Text([*head, *tail], [len(head) - 1, len(head), len(head) + len(tail) - 1]) for tail in tails])
    for batch in read_groups(lm.layout, groups, [Site(1), Site(3)], tokens_per_batch=budget):
        for n, g in enumerate(batch.groups):
            for member, text in enumerate(groups[g]):
                reference = alone(lm, tuple(text.ids))
                for site, values in batch.values.items():
                    expected = reference[site.layer][list(text.positions)]
                    assert torch.allclose(values[n][member], expected, atol=tolerance(lm), rtol=1e-4)


def test_the_last_block_is_read_before_the_final_norm(lm: LM) -> None:
    (activations,) = lm.capture(TEXTS[0], [LAYERS - 1], Positions.all())
    expected = alone(lm, tuple(lm.encode(TEXTS[0])))[LAYERS - 1]
    assert torch.allclose(activations[Site(LAYERS - 1)], expected, atol=tolerance(lm), rtol=1e-4)


def test_nothing_beyond_the_deepest_site_runs(lm: LM) -> None:
    lm.capture(TEXTS[:3], [0, 1])  # the first of all has the model's cache examined, with passes of its own
    ran: list[str] = []
    watched = {"block 2": lm.layout.blocks[2], "block 3": lm.layout.blocks[3], "head": lm.model.get_output_embeddings()}
    handles = [
        module.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name)) for name, module in watched.items()
    ]
    lm.capture(TEXTS[:3], [0, 1])
    for handle in handles:
        handle.remove()
    assert ran == []


def test_hooks_are_gone(lm: LM) -> None:
    lm.capture(TEXTS[:2], [1])
    assert not any(block._forward_hooks for block in lm.layout.blocks)


def test_bad_input(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="layers 0 to 3"):
        lm.capture(TEXTS[0], [LAYERS])
    with pytest.raises(TrimtabError, match="no tokens"):
        lm.capture("", [0])
    with pytest.raises(TrimtabError, match="context is 128"):
        lm.capture(prompt(1, 129), [0])
    with pytest.raises(TrimtabError, match="no prompts"):
        lm.capture([], [0])
