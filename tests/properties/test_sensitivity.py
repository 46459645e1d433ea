"""What the ranking of layers must say of layers whose steering does nothing, on tiny random models."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from trimtab import LM
from trimtab.decoding.ranking import sensitivity
from trimtab.decoding.rejection import Rejection
from trimtab.steering import ScaleScores, emphasis

FAMILIES = ("llama", "qwen2", "mistral", "phi3", "gpt2", "gpt_neox")
OUT = {"gpt2": "c_proj", "gpt_neox": "dense"}
SILENT = 2


def scores_of(lm: LM, alpha: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, tuple[int, ...]]:
    """The sensitivity of each layer, and the order that it gave."""
    seen: list[Tensor] = []

    def noted(crossed: Tensor, raw: Tensor, ranking: str) -> Tensor:
        seen.append(sensitivity(crossed, raw, ranking))
        return seen[-1]

    monkeypatch.setattr("trimtab.engines.transformers.ranked.sensitivity", noted)
    text = tiny.prompt(1, 12)
    end = len(lm.encode(text)) - 1  # a span that ends just before the last token lies in every sliding window
    steering = emphasis(ScaleScores(alpha), [(end - 2, end)], range(tiny.LAYERS))
    (answer,) = lm.generate(text, steering, rejection=Rejection(), max_new_tokens=1)
    assert answer.trace is not None
    (scores,) = seen
    return scores, answer.trace.order


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scaling_by_one_disturbs_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, _ = scores_of(tiny.tiny(family), 1.0, monkeypatch)
    assert scores.abs().max() < 1e-5
    scores, _ = scores_of(tiny.tiny(family), 20.0, monkeypatch)
    assert scores.abs().min() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_whose_attention_goes_nowhere_has_no_sensitivity(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny(family)
    block = lm.layout.blocks[SILENT]
    projections = [
        module
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == OUT.get(family, "o_proj") and "mlp" not in name
    ]
    assert len(projections) == 1
    with torch.no_grad():
        for parameter in projections[0].parameters():
            parameter.zero_()
    scores, order = scores_of(lm, 20.0, monkeypatch)
    assert abs(float(scores[SILENT])) < 1e-5
    others = [layer for layer in range(tiny.LAYERS) if layer != SILENT]
    assert all(abs(float(scores[layer])) > 1e-5 for layer in others)
    for layer in others:
        assert (order.index(layer) < order.index(SILENT)) == (float(scores[layer]) > float(scores[SILENT]))
