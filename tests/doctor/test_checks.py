"""The doctor finds what is wrong, and says whose it is."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from torch import Tensor

from trimtab.doctor import check_config, check_model, naive, tiny_lm
from trimtab.doctor.report import REFUSED, WORKS, WRONG
from trimtab.engines.transformers import places
from trimtab.engines.transformers.session import Session
from trimtab.steering import Site


def states(report) -> dict[str, str]:
    return {finding.name: finding.state for finding in report.findings}


def test_a_model_on_which_all_works() -> None:
    by_name = states(check_config("llama"))
    assert by_name.pop("router") == REFUSED  # of mixtures
    assert set(by_name.values()) == {WORKS}


def test_an_edit_in_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every edit lands one token late."""
    whole = Session.edit

    def late(self: Session, site, activation: Tensor) -> Tensor | None:
        rolled = activation.roll(1, 1)
        new = whole(self, site, rolled)
        return (rolled if new is None else new).roll(-1, 1)

    lm = tiny_lm("llama")
    monkeypatch.setattr(Session, "edit", late)
    by_name = states(check_model(lm))
    assert {by_name[name] for name in ("adding", "batches", "gates", "attention")} == {WRONG}
    assert by_name["reading"] == by_name["cache"] == WORKS


def test_a_crash_is_wrong_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")

    def crash(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(places._PARTS, "heads", crash)
    heads = check_model(lm)["heads"]
    assert (heads.state, heads.reason) == (WRONG, "it crashes: ZeroDivisionError: oh")
    monkeypatch.undo()
    assert check_config("mamba")["heads"].state == REFUSED


def test_nothing_of_the_model_is_left_changed() -> None:
    lm = tiny_lm("gemma3_text")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = lm.model(input_ids=ids).logits
        check_model(lm)
        after = lm.model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_a_change_of_a_routers_logits_is_seen_in_its_own_thread_alone() -> None:
    lm = tiny.tiny("mixtral")
    site, ids = Site.router(1), [5, 6, 7]
    (before,) = naive.activations(lm, ids, [site]).values()
    weight = torch.ones(before.shape[-1], lm.layout.width)
    x = torch.ones(1, lm.layout.width)
    elsewhere: list[Tensor] = []

    def change(logits: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: elsewhere.append(torch.nn.functional.linear(x, weight)))
        thread.start()
        thread.join()
        return logits + 1000

    def fail(_logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    with naive.changed(lm, {site: change}):
        (changed,) = naive.activations(lm, ids, [site]).values()
    assert torch.equal(changed, before + 1000)
    with naive.changed(lm, {site: fail}), pytest.raises(ZeroDivisionError):
        naive.logits(lm, ids)
    elsewhere.append(torch.nn.functional.linear(x, weight))  # here, after the failure
    assert [float(read.max()) for read in elsewhere] == [lm.layout.width] * len(elsewhere)
    assert len(elsewhere) > 1
