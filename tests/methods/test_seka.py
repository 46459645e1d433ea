"""SEKA against its formulas spelled out, on a tiny model: what is learned, and what it does to a phrase's keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from trimtab import LM, Highlight, Positions, Site, TrimtabError, learn_seka, seka
from trimtab.methods.seka import highlights

WORDS = [f"w{i}" for i in range(20)]
EXAMPLES = [
    Highlight(f"{a} {b} {c}", b, f"{c} {a}", f"{a} {a} {c}")
    for a, b, c in zip(WORDS[:6], WORDS[6:12], WORDS[12:18], strict=True)
]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def keys_at(lm: LM, ids: list[int], at: list[int], layer: int) -> np.ndarray:
    """`[tokens, heads, size]` of one text, from a hook on the model's cache of the whole text."""
    with torch.no_grad():
        cache = lm.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    return cache.layers[layer].keys[0, :, at].transpose(0, 1).double().numpy()


def naive(lm: LM, layer: int, positive: float, negative: float, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Each head's map, and how far its keys move, from texts that are put together here."""
    kinds: list[list[np.ndarray]] = [[], [], []]
    for example in EXAMPLES:
        texts = [f"\nContext: {example.context}"]
        texts += [f"\nQuestion: {q}\nContext: {example.context}" for q in (example.relevant, example.irrelevant)]
        spans = [lm.spans(text, example.phrase, chat=False)[0] for text in texts]
        fill = lm.encode(".", chat=False)[-1]  # this tokenizer has no line breaks
        most = max(start for start, _ in spans)
        for kind, text, (start, stop) in zip(kinds, texts, spans, strict=True):
            ids = lm.encode(text, chat=False)
            lead = int(ids[0] == lm.bos_token_id)
            ids = ids[:lead] + [fill] * (most - start) + ids[lead:]
            kind.append(keys_at(lm, ids, list(range(most, most + stop - start)), layer))
    h, plus, minus = (np.concatenate(kind) for kind in kinds)
    maps, far = [], []
    for head in range(h.shape[1]):
        parts = []
        for other, inner in ((plus, True), (minus, False)):
            u, s, _ = np.linalg.svd(h[:, head].T @ other[:, head] / len(h))
            k = next(k for k in range(1, len(s) + 1) if s[:k].sum() / s.sum() >= share - 1e-12)
            chosen = u[:, :k] if inner else u[:, k:]
            parts.append(chosen @ chosen.T)
        maps.append((positive * parts[0] + negative * parts[1]) / 2)
        size = np.mean(np.linalg.norm(h[:, head], axis=-1))
        far.append(np.mean(np.linalg.norm(plus[:, head] - minus[:, head], axis=-1)) / size)
    return np.stack(maps), np.stack(far)


@pytest.mark.parametrize("negative", [0.0, 0.5])
def test_it_learns_the_formula(lm: LM, negative: float) -> None:
    learned = learn_seka(lm, EXAMPLES, [1, 3], positive=1.2, negative=negative, share=0.8, heads=1.0)
    assert [edit.site for edit in learned.edits] == [Site(1, "keys"), Site(3, "keys")]
    for edit in learned.edits:
        maps, far = naive(lm, edit.site.layer, 1.2, negative, 0.8)
        whole = torch.block_diag(*map(torch.from_numpy, maps))
        made = edit.operation.read.double().T @ edit.operation.write.double()
        assert torch.allclose(made, whole, atol=1e-6)
        measured: Any = learned.card.measured["moved"]
        assert [measured[f"{edit.site.layer}.{head}"] for head in range(2)] == pytest.approx(far, abs=1e-4)


def test_heads_that_move_less_stay(lm: LM) -> None:
    far = {(layer, head): x for layer in (1, 3) for head, x in enumerate(naive(lm, layer, 1.0, 0.0, 0.9)[1])}
    learned = learn_seka(lm, EXAMPLES, [1, 3], heads=0.2)  # one of four
    (edit,) = learned.edits
    layer, head = max(far, key=lambda place: far[place])
    assert edit.site.layer == layer
    assert edit.operation.read[:, head * 8 : (head + 1) * 8].any()
    other = slice((1 - head) * 8, (2 - head) * 8)
    assert not edit.operation.read[:, other].any()


def test_it_is_put_to_a_phrase(lm: LM) -> None:
    """The phrase's keys are `k + M k` with the strength's share of it, and others are as they were."""
    learned = learn_seka(lm, EXAMPLES, [2])
    prompt = " ".join(WORDS)
    placed = 1.5 * seka(lm, prompt, [WORDS[4], WORDS[9]], learned)
    rows = [t for start, stop in lm.spans(prompt, [WORDS[4], WORDS[9]]) for t in range(start, stop)]
    (before,) = lm.capture(prompt, [Site(2, "keys")], Positions.all())
    with lm.steered(placed):
        (after,) = lm.capture(prompt, [Site(2, "keys")], Positions.all())
    (edit,) = learned.edits
    map_ = edit.operation.read.T @ edit.operation.write
    expected = before[Site(2, "keys")].clone()
    expected[rows] += 1.5 * expected[rows] @ map_.to(expected)
    assert torch.allclose(after[Site(2, "keys")], expected, atol=1e-5)


def test_what_makes_no_sense(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="occur exactly once"):
        Highlight("a b a", "a", "x", "y")
    for wrong in ({"examples": EXAMPLES[:1]}, {"share": 0.0}, {"heads": 1.5}):
        with pytest.raises(TrimtabError):
            learn_seka(lm, **{"examples": EXAMPLES, **wrong})  # type: ignore[arg-type]
    assert len(set(highlights(200))) > 150
