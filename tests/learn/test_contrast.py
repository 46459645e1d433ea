from __future__ import annotations

import pytest
import tiny
import torch
from tiny import LAYERS, WIDTH, direction, prompt

from trimtab import LM, Site, TrimtabError
from trimtab.engines.transformers.read import Text
from trimtab.learn.contrast import contrast, contrast_many
from trimtab.learn.moments import PairMoments


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def pairs(lm: LM, count: int = 12) -> list[tuple[Text, Text]]:
    made = []
    for i in range(count):
        head = lm.encode(prompt(i, 3 + (7 * i) % 19))
        sides = [[*head, *lm.encode(prompt(100 + 2 * i + s, 1 + (i + s) % 2))] for s in (0, 1)]
        made.append((Text(sides[0], [len(sides[0]) - 1]), Text(sides[1], [len(sides[1]) - 1])))
    return made


def naive(lm: LM, texts: list[tuple[Text, Text]], layer: int) -> torch.Tensor:
    """One text at a time, in a loop: `[pairs, 2, width]`."""
    read = [[lm.capture(_words(t.ids), [layer])[0][Site(layer)][0] for t in pair] for pair in texts]
    return torch.stack([torch.stack(pair) for pair in read]).double()


def _words(ids: object) -> str:
    return " ".join(f"w{i}" for i in ids)  # type: ignore[attr-defined]


def test_moments_equal_a_loop(lm: LM) -> None:
    texts = pairs(lm)
    moments = contrast(lm, texts, [0, 2], tokens_per_batch=64)
    for layer in (0, 2):
        values = naive(lm, texts, layer)
        difference = values[:, 0] - values[:, 1]
        mean = difference.mean(0)
        assert torch.allclose(moments[layer].difference, mean, atol=1e-5, rtol=1e-5)
        cosines = torch.cosine_similarity(difference, mean.expand_as(difference), dim=-1)
        assert moments[layer].agreement == pytest.approx(float(cosines.mean()), abs=1e-5)
        assert moments[layer].norm == pytest.approx(float(values.norm(dim=-1).mean()), rel=1e-5)
        unit = mean / mean.norm()
        assert moments[layer].target() == pytest.approx(float((values[:, 0] @ unit).mean()), rel=1e-4, abs=1e-4)


def test_batch_size_and_order_dont_matter_and_swapping_negates(lm: LM) -> None:
    texts = pairs(lm)
    whole = contrast(lm, texts, [2])[2].difference
    for budget in (1, 50, 200):
        assert torch.allclose(contrast(lm, texts, [2], tokens_per_batch=budget)[2].difference, whole, atol=1e-5)
    assert torch.allclose(contrast(lm, texts[::-1], [2])[2].difference, whole, atol=1e-6)
    assert torch.allclose(contrast(lm, texts * 2, [2])[2].difference, whole, atol=1e-6)
    swapped = contrast(lm, [(b, a) for a, b in texts], [2])[2].difference
    assert torch.allclose(swapped, -whole, atol=1e-6)


def test_the_same_run_gives_the_same_bits(lm: LM) -> None:
    texts = pairs(lm)
    assert torch.equal(contrast(lm, texts, [1])[1].difference, contrast(lm, texts, [1])[1].difference)


def test_a_planted_direction_is_found() -> None:
    """Noise of both sides plus a known shift of the positives: the mean difference points along the shift."""
    moments = PairMoments(WIDTH)
    noise = torch.randn(2, 4000, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    planted = direction(3, 2.0)
    for chunk in range(0, 4000, 500):
        positive, negative = noise[0, chunk : chunk + 500] + planted, noise[1, chunk : chunk + 500]
        moments.add(positive, negative)
    assert moments.count == 4000
    assert torch.cosine_similarity(moments.difference, planted, dim=0) > 0.99
    assert moments.difference.norm() == pytest.approx(2.0, rel=0.1)
    assert 0 < moments.agreement < 0.5  # single pairs are noisy, and that shows


def test_identities() -> None:
    """t - mean(x-.u) = |m| (Stolfo et al.)."""
    positive, negative = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    moments = PairMoments(WIDTH)
    moments.add(positive, negative)
    unit = moments.difference / moments.difference.norm()
    gap = moments.target() - float((negative @ unit).mean())
    assert gap == pytest.approx(float(moments.difference.norm()))


def test_progress_counts_pairs(lm: LM) -> None:
    seen: list[tuple[int, int]] = []
    contrast(lm, pairs(lm), [0], tokens_per_batch=64, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (12, 12)


def test_bad_input(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="no pairs"):
        contrast(lm, [], [0])
    with pytest.raises(TrimtabError, match="no layer"):
        contrast(lm, pairs(lm), [])
    with pytest.raises(TrimtabError, match=f"layers 0 to {LAYERS - 1}"):
        contrast(lm, pairs(lm), [LAYERS])
    too_long = Text([3] * 200, [199])
    with pytest.raises(TrimtabError, match="200 tokens"):
        contrast(lm, [(too_long, too_long)], [0])


def test_activations_that_overflow_are_not_learned_from(lm: LM) -> None:
    block = lm.layout.blocks[0]
    handle = block.register_forward_hook(
        lambda _m, _a, o: o * float("inf") if isinstance(o, torch.Tensor) else (o[0] * float("inf"), *o[1:])
    )
    try:
        with pytest.raises(TrimtabError, match="not finite"):
            contrast(lm, pairs(lm), [0])
    finally:
        handle.remove()


def many_sets(lm: LM) -> dict[str, list[tuple[Text, Text]]]:
    """Three sets over the same eight queries, the last over half of them, and one with its own negatives."""
    sets: dict[str, list[tuple[Text, Text]]] = {"a": [], "b": [], "half": []}
    for i in range(8):
        head = lm.encode(prompt(i, 9 + (5 * i) % 7))
        plain = Text(head, [len(head) - 1])
        for n, name in enumerate(sets):
            ids = [*head, *lm.encode(prompt(50 + n, 2 + n))]
            if name != "half" or i % 2:
                sets[name].append((Text(ids, [len(ids) - 1]), plain))
    sets["own"] = pairs(lm, 5)
    return sets


def test_many_at_once_equal_each_alone(lm: LM) -> None:
    sets = many_sets(lm)
    for budget in (1, 60, 4096):
        contrasts = contrast_many(lm, sets, [0, 2], tokens_per_batch=budget)
        for name, texts in sets.items():
            alone = contrast(lm, texts, [0, 2])
            for layer in (0, 2):
                mine, theirs = contrasts[name][layer], alone[layer]
                assert mine.count == theirs.count == len(texts)
                assert torch.allclose(mine.difference, theirs.difference, atol=1e-5, rtol=1e-5)
                assert mine.target() == pytest.approx(theirs.target(), rel=1e-4, abs=1e-4)
                assert mine.agreement == pytest.approx(theirs.agreement, abs=1e-5)


def test_many_read_each_text_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Text] = []
    original = LM.read

    def counted(lm, groups, sites, **options):
        read.extend(text for group in groups for text in group)
        return original(lm, groups, sites, **options)

    monkeypatch.setattr(LM, "read", counted)
    sets = many_sets(lm)
    contrast_many(lm, {**sets, "again": sets["a"]}, [1])
    keys = [tuple(text.ids) for text in read]
    assert len(keys) == len(set(keys)) == len({tuple(t.ids) for texts in sets.values() for pair in texts for t in pair})


def test_many_count_pairs_and_name_the_empty(lm: LM) -> None:
    seen: list[tuple[int, int]] = []
    contrast_many(lm, many_sets(lm), [0], tokens_per_batch=30, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (25, 25)
    assert len(seen) > 2
    with pytest.raises(TrimtabError, match="no pairs to learn 'b' from"):
        contrast_many(lm, {"a": pairs(lm), "b": []}, [0])
    with pytest.raises(TrimtabError, match="no pairs"):
        contrast_many(lm, {}, [0])
    with pytest.raises(TrimtabError, match="no layer"):
        contrast_many(lm, {"a": pairs(lm)}, [])


def test_sides_that_do_not_differ_have_no_direction() -> None:
    moments = PairMoments(WIDTH)
    moments.add(torch.ones(3, WIDTH), torch.ones(3, WIDTH))
    with pytest.raises(TrimtabError, match="don't differ"):
        moments.target()
