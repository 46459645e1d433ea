"""Hooks that are put on and taken off many times: as registered ones in what they do, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimtab.engines.transformers.hooks import Hooks


class Twice(nn.Module):
    def forward(self, x: torch.Tensor, *, more: float = 0.0) -> torch.Tensor:
        return 2 * x + more


def tables(module: nn.Module) -> list[dict]:
    return [value for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)]


class Patched:
    """What is more than a hook: it replaces the module's forward until it is removed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        module.forward = lambda x, **_: x  # type: ignore[method-assign]

    def remove(self) -> None:
        del self.module.forward


def test_they_act_while_open_in_their_order_and_are_gone_after() -> None:
    module, calls = Twice(), []
    own = module.register_forward_hook(lambda *_: calls.append("own"))
    hooks = Hooks(
        [
            lambda: module.register_forward_pre_hook(
                lambda _m, args, kwargs: (args, {**kwargs, "more": 1.0}), with_kwargs=True
            ),
            lambda: module.register_forward_hook(lambda _m, _a, output: calls.append("first") or output + 10),
            lambda: module.register_forward_hook(
                lambda _m, _a, kwargs, _o: calls.append(kwargs["more"]), with_kwargs=True
            ),
        ]
    )
    before = [dict(table) for table in tables(module)]
    x = torch.ones(3)
    for _ in range(3):
        assert module(x).tolist() == [2, 2, 2]
        with hooks.open():
            calls.clear()
            assert module(x).tolist() == [13, 13, 13]
            assert calls == ["own", "first", 1.0]
        assert tables(module) == before
    own.remove()


def test_an_error_takes_them_off() -> None:
    module = Twice()
    hooks = Hooks([lambda: module.register_forward_hook(lambda *_: 1 / 0, always_call=True)])
    with pytest.raises(ZeroDivisionError), hooks.open():
        module(torch.ones(1))
    assert not any(tables(module))
    assert module(torch.ones(1)).item() == 2


def test_what_is_more_than_a_hook_is_attached_each_time() -> None:
    module = Twice()
    hooks = Hooks([lambda: Patched(module)])
    for _ in range(2):
        assert module(torch.ones(1)).item() == 2
        with hooks.open():
            assert module(torch.ones(1)).item() == 1
    assert "forward" not in vars(module)
