"""TDA against its formulas, written out, over several families."""

from __future__ import annotations

from pathlib import Path

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import LAYERS, prompt

from trimtab import LM, Edit, Positions, Site, Steering, TrimtabError, load, save
from trimtab.engines.transformers.places import output_weight
from trimtab.methods.tda import errors_at, find_threshold, kept, learn_tda
from trimtab.steering import MaskNeurons

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "opt", "falcon", "phi3")
# The formulas are tested here; how each family is read and steered, in tests/properties.
pytestmark = pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3"))
TEXTS = [prompt(20 + i, 8 + i) for i in range(6)]
PROMPTS = [prompt(seed, length) for seed, length in ((50, 4), (51, 9), (52, 6))]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def literal_cett(lm: LM, layer: int, eps: float) -> float:
    """The mean over calibration tokens but the first, neuron by neuron."""
    weight = output_weight(lm.layout, Site(layer, "neurons")).double()
    effects = []
    for text in TEXTS:
        ids = lm.encode(text)
        neurons = naive.activations(lm, ids, "neurons", layer).double()
        output = naive.activations(lm, ids, "mlp", layer).double()
        for t in range(1, len(ids)):
            lost = torch.zeros_like(output[t])
            for j in range(len(neurons[t])):
                n = neurons[t, j] * weight[:, j]
                if float(n.norm()) < eps:
                    lost += n
            effects.append(float(lost.norm() / output[t].norm()))
    return sum(effects) / len(effects)


def test_thresholds_lose_what_they_may_and_hardly_less(lm: LM) -> None:
    learned = learn_tda(lm, TEXTS, cett=0.2)
    assert [edit.site for edit in learned.edits] == [Site(layer, "neurons") for layer in range(LAYERS)]
    for layer in (0, 3):
        eps = learned.card.measured["eps"][str(layer)]
        error = literal_cett(lm, layer, eps)
        assert error == pytest.approx(learned.card.measured["cett"][str(layer)], abs=2e-3)
        assert error <= 0.2 + 2e-3
        assert literal_cett(lm, layer, eps * 1.05) > 0.2 - 0.01
        weight = output_weight(lm.layout, Site(layer, "neurons")).double()
        limits = learned.edits[layer].operation.direction.double()
        assert torch.allclose(limits * weight.norm(dim=0), torch.full_like(limits, eps), rtol=1e-4)


@pytest.mark.parametrize("statistic", ["any", "rms"])
def test_answers_are_what_the_formula_gives(lm: LM, statistic: str, tmp_path: Path) -> None:
    """In a batch of prompts of different lengths beside an unsteered one, with and without a cache, from a file."""
    learned = learn_tda(lm, TEXTS, cett=0.5, statistic=statistic)
    save(learned, tmp_path / "s.safetensors")
    assert load(tmp_path / "s.safetensors") == learned
    steerings = [load(tmp_path / "s.safetensors"), None, learned.only([1, 2])]
    plain = lm.generate(PROMPTS, None, max_new_tokens=4, logprobs=True)
    for way in ({}, {"use_cache": False}, {"batch_size": 1}):
        answers = lm.generate(PROMPTS, steerings, max_new_tokens=4, logprobs=True, **way)  # type: ignore[arg-type]
        for text, steering, answer in zip(PROMPTS, steerings, answers, strict=True):
            tokens, logprobs = naive.generate(lm, text, steering, 4)
            assert list(answer.token_ids) == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    steered = lm.generate(PROMPTS, learned, max_new_tokens=4, logprobs=True)
    for dense, sparse in zip(plain, steered, strict=True):  # the first token is computed in full
        assert (dense.token_ids[0], dense.logprobs[0]) == (sparse.token_ids[0], sparse.logprobs[0])  # type: ignore[index]
    assert [a.logprobs for a in plain] != [a.logprobs for a in steered]


def test_the_share_that_is_kept(lm: LM) -> None:
    learned = learn_tda(lm, TEXTS, cett=0.4)
    for text, shares in zip(PROMPTS, kept(lm, learned, PROMPTS), strict=True):
        for edit in learned.edits:
            neurons = naive.activations(lm, lm.encode(text), "neurons", edit.site.layer)[1:].double().abs()
            above = [float(neurons[:, j].max()) > float(limit) for j, limit in enumerate(edit.operation.direction)]
            assert shares[edit.site.layer] == pytest.approx(sum(above) / len(above))


def test_nothing_lost_is_nothing_done(lm: LM) -> None:
    plain = lm.generate(PROMPTS, None, max_new_tokens=4, logprobs=True)
    size = naive.size_of(lm, "neurons")
    full = tuple(Edit(Site(layer, "neurons"), MaskNeurons(torch.zeros(size)), Positions.all()) for layer in range(4))
    for nothing in (0 * learn_tda(lm, TEXTS), Steering(full)):
        answers = lm.generate(PROMPTS, nothing, max_new_tokens=4, logprobs=True)
        assert [(a.token_ids, a.logprobs) for a in answers] == [(a.token_ids, a.logprobs) for a in plain]


def test_all_lost_leaves_the_bias() -> None:
    lm = tiny.tiny("gpt2")
    size = naive.size_of(lm, "neurons")
    operation = MaskNeurons(torch.full((size,), 1e9)).settled(torch.ones(5, size))
    assert operation.direction.tolist() == [-1.0] * size
    x = torch.randn(3, size)
    assert torch.equal(operation.kernel(x, operation.row(1.0)), torch.zeros_like(x))


def test_neurons_in_another_order() -> None:
    """Thresholds go with their neurons."""
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    output = neurons @ weight.T
    order = torch.randperm(12, generator=generator)
    eps, error = find_threshold(neurons, weight, output, 0.3)
    turned, same = find_threshold(neurons[:, order], weight[:, order], output, 0.3)
    assert (eps, error) == (pytest.approx(turned), pytest.approx(same))
    assert float(errors_at(eps, neurons, weight, output).mean()) == pytest.approx(error)


def test_what_it_refuses() -> None:
    lm = tiny.tiny("llama")
    with pytest.raises(TrimtabError, match="from 0 to below 1"):
        learn_tda(lm, TEXTS, cett=1.0)
    with pytest.raises(TrimtabError, match="nothing to calibrate on"):
        learn_tda(lm, ["w5"])
    with pytest.raises(TrimtabError, match="known: any, rms"):
        learn_tda(lm, TEXTS, statistic="mean")
    with pytest.raises(TrimtabError, match="no site neurons"):
        learn_tda(tiny.tiny("mixtral"), TEXTS)
    with pytest.raises(TrimtabError, match="masks no neurons"):
        kept(lm, Steering(), PROMPTS)
