"""Hooks that are put on and taken off many times: as registered ones in what they do, and nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from tiny import direction, prompt
from torch import nn

from trimtab import Add, Edit, ScaleScores, Site, Steering, TrimtabError
from trimtab.engines.transformers.batch_row import GenerationRequest
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.hooks import Hooks
from trimtab.steering import emphasis


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


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_table_that_was_replaced_between_two_tokens_is_an_error(steps: int) -> None:
    lm = tiny.tiny("llama")
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout, ends=[])
    steering = Steering(tuple(Edit(Site(layer), Add(direction(layer))) for layer in range(2)))
    batch.insert(GenerationRequest(tuple(lm.encode(prompt(1, 6))), steering, 12))
    for _ in range(1 + steps):
        batch.step()
    block: Any = lm.layout.blocks[1]
    block._forward_hooks = type(block._forward_hooks)()
    with pytest.raises(TrimtabError, match=r"residual\[1\].* didn't run"):
        batch.step()


def test_an_attention_that_was_replaced_is_steered_in_its_stead() -> None:
    lm = tiny.tiny("llama")
    towards = emphasis(ScaleScores(3.0), [(1, 3)], range(2))

    def logprobs(steering: Steering | None) -> Any:
        (answer,) = lm.generate(prompt(1, 6), steering, max_new_tokens=4, logprobs=True)
        return answer.logprobs

    before = logprobs(towards)
    assert before != logprobs(None)
    block: Any = lm.layout.blocks[1]
    block.self_attn = copy.deepcopy(block.self_attn)  # with a configuration of its own
    assert logprobs(towards) == before
