"""Nothing is widened to float64 where there is none: on MPS, pretended."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend_mps import on_mps

import trimtab
from trimtab import Positions, Site, Threshold
from trimtab.engines.transformers import next_token
from trimtab.learn.moments import PairMoments
from trimtab.steering import MaskNeurons
from trimtab.steering.elements import HoldElements
from trimtab.steering.gates import Reading
from trimtab.steering.tensors import to_float64

ROOT = Path(trimtab.__file__).parent
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def test_the_pretend_device_refuses_what_mps_refuses() -> None:
    x = on_mps(X)
    assert x.device.type != "cpu"
    assert torch.equal((x @ x.T).cpu(), X @ X.T)
    for widen in (lambda: x.double(), lambda: x.to("cpu", torch.float64), lambda: x.to(torch.float64)):
        with pytest.raises(TypeError, match="doesn't support float64"):
            widen()


def test_it_moves_before_it_is_widened() -> None:
    assert torch.equal(to_float64(on_mps(X)), X.double())
    assert to_float64(X.half()).dtype == torch.float64


def test_what_is_learned_and_what_gates_read() -> None:
    moments, here = PairMoments(8), PairMoments(8)
    moments.add(on_mps(X), on_mps(X.flip(0)))
    here.add(X, X.flip(0))
    assert torch.equal(moments.difference, here.difference)
    reading = Reading(Site(1), Positions.all(), "unit-mean")
    assert torch.equal(reading.pooled(on_mps(X)), reading.pooled(X))
    gate = Threshold(Site(1), X[0], 0.0)
    assert gate.value(on_mps(X[1])) == gate.value(X[1])
    assert torch.equal(MaskNeurons(X[0].abs()).kept(on_mps(X)), MaskNeurons(X[0].abs()).kept(X))
    held = HoldElements(X[0].gt(0).float()).settled(on_mps(X))
    assert held == HoldElements(X[0].gt(0).float()).settled(X)


def test_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose logits are on the device."""
    logits = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(next_token, "_run", lambda *_: SimpleNamespace(logits=on_mps(logits)))

    class Session:
        def expect(self, _lengths: Any, **_more: Any) -> None: ...

        def check_reached(self, _columns: int) -> None: ...

        def hooked(self, _sites: Any) -> Any:
            from contextlib import nullcontext

            return nullcontext()

    embeddings = torch.nn.Embedding(16, 4)
    model: Any = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    choices = [next_token.Choice((1, 2, 3), 3, (4, 5)), next_token.Choice((1, 2, 6), 3, (7,))]
    first, second = next_token.next_tokens(model, SimpleNamespace(), choices, Session(), [(), ()])  # type: ignore[arg-type]
    wanted = logits[:, 0].double().log_softmax(-1)
    assert first.logprobs == tuple(wanted[0, [4, 5]].tolist())
    assert second.logprobs == (float(wanted[1, 7]),)


WIDENED = re.compile(r"""\.to\(\s*(?:device=)?["']cpu["'],\s*(?:dtype=)?torch\.float64""")


def test_nothing_in_the_house_moves_and_widens_at_once() -> None:
    paths = [str(path) for path in sorted(ROOT.rglob("*.py")) if WIDENED.search(path.read_text())]
    assert paths == []
