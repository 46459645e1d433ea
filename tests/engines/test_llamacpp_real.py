"""The default model in both engines, with the same weights: its own file, every tensor of it in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.dequantized import dequantized
from trimtab import LM, Add, Edit, Positions, Site, Steering
from trimtab.engines.transformers import default_model

pytest.importorskip("xllamacpp", reason="needs trimtab[llamacpp]")
pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = [
    f"{ask} {what}"
    for ask in ("Tell me about", "What is the use of")
    for what in ("rain", "bread", "music", "trees", "clocks", "rivers", "glass", "horses", "salt", "paper")
]
NEW = 32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    file = dequantized(default_model.default_gguf(), tmp_path_factory.mktemp("real") / "f32.gguf")
    made = LM.load(file, engine="llamacpp", cache="float32")
    yield made
    made.close()
    file.unlink()


@pytest.fixture(scope="module")
def steering(lm: LM) -> Steering:
    """Two blocks pushed a third of their activations' length, from the last prompt token on."""
    edits = []
    for layer in (9, 18):
        (activations,) = lm.capture(PROMPTS[0], [layer])
        vector = torch.randn(lm.layout.width, generator=torch.Generator().manual_seed(layer))
        edits.append(Edit(Site(layer), Add(vector * float(activations[Site(layer)].norm()) / (3 * vector.norm()))))
    return Steering(tuple(edits))


def test_the_same_tokens_go_in(lm: LM, llama: Any) -> None:
    for prompt in (*PROMPTS, "naïve — “quotes”, 数字 12345 \n\n\ttabs  and   spaces 🙂"):
        assert llama.encode(prompt) == lm.encode(prompt)
        assert llama.encode(prompt, chat=False) == lm.encode(prompt, chat=False)
        assert llama.encode(prompt, system="Be brief.") == lm.encode(prompt, system="Be brief.")


@pytest.mark.smoke
def test_a_steered_text_agrees(lm: LM, llama: Any, steering: Steering) -> None:
    """Where no two tokens are as likely as the rounding of activations is large."""
    for acting in (None, steering):
        (theirs,), (ours,) = (engine.generate(PROMPTS[0], acting, max_new_tokens=12) for engine in (lm, llama))
        assert ours.token_ids == theirs.token_ids
        assert ours.applied.edits == theirs.applied.edits
    (plain,) = llama.generate(PROMPTS[0], max_new_tokens=12)
    assert ours.token_ids != plain.token_ids


@pytest.mark.long
def test_greedy_texts_agree(lm: LM, llama: Any, steering: Steering) -> None:
    """On 18 of 20 prompts at least, steered and unsteered; what differs starts at two tokens about as likely."""
    for acting in (None, steering):
        theirs = lm.generate(PROMPTS, acting, max_new_tokens=NEW, logprobs=True)
        ours = llama.generate(PROMPTS, acting, max_new_tokens=NEW, logprobs=True)
        same = sum(a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True))
        print(f"{'steered' if acting else 'unsteered'}: {same} of {len(PROMPTS)} texts are the same")
        assert same >= 18
        for a, b in zip(ours, theirs, strict=True):
            if a.token_ids != b.token_ids:
                at = next(i for i, (p, q) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if p != q)
                assert a.logprobs[at] == pytest.approx(b.logprobs[at], abs=1e-2)
    plain = lm.generate(PROMPTS[:4], max_new_tokens=NEW)
    steered = lm.generate(PROMPTS[:4], steering, max_new_tokens=NEW)
    assert all(a.token_ids != b.token_ids for a, b in zip(plain, steered, strict=True))


def test_activations_agree(lm: LM, llama: Any, steering: Steering) -> None:
    """At the steered blocks and the last, at every token, to a thousandth of their length."""
    everywhere = steering.at(Positions.all())
    layers = [9, 18, 29]
    ours = llama.capture(PROMPTS[:3], layers, Positions.all(), steering=everywhere)
    with lm.steered(everywhere):
        theirs = lm.capture(PROMPTS[:3], layers, Positions.all())
    for a, b in zip(ours, theirs, strict=True):
        for layer in layers:
            off = (a[Site(layer)] - b[Site(layer)]).norm(dim=-1) / b[Site(layer)].norm(dim=-1)
            assert float(off.max()) < 1e-3


def test_as_it_is_stored(lm: LM) -> None:
    """Q4_1, as users run it: the same model by its fingerprint, and it answers."""
    stored = LM.load(engine="llamacpp")
    assert stored.identity.fingerprint == lm.identity.fingerprint
    assert stored.identity.template == lm.identity.template
    assert stored.name == lm.name
    prompt = "Tell me about rain"  # where no two first words are as likely as the rounding of activations is large
    (answer,), (exact,) = (model.generate(prompt, max_new_tokens=12) for model in (stored, lm))
    assert answer.text == exact.text
    assert answer.applied.edits == ()
