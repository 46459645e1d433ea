"""A reference for decoding with rejection that takes no short cut: every step reads the text anew, keys are multiplied
in copies of the cache, rungs run one at a time whether or not anything could be accepted, layers are ranked one pass
each, and attention is spelled out head by head."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from tiny import naive_holds, naive_together
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.lm import LM
from trimtab.steering import BiasScores, Edit, ScaleScores, TargetMass


def in_span(edit: Edit, column: int) -> bool:
    return any(start.offset <= column < stop.offset for start, stop in edit.positions.intervals)  # type: ignore[union-attr]


def attention_of(block: Any) -> Any:
    return next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))


@lru_cache(maxsize=64)
def prefix_cache(lm: LM, ids: tuple[int, ...]) -> DynamicCache:
    """The raw keys and values of all but the last token, in full for every layer: computed anew for every text."""
    cache = DynamicCache()
    where = torch.arange(len(ids) - 1)[None]
    lm.model(input_ids=torch.tensor([list(ids[:-1])]), position_ids=where, past_key_values=cache, use_cache=True)
    return cache


@lru_cache(maxsize=64)
@torch.no_grad()
def raw_rows(lm: LM, ids: tuple[int, ...], first: int) -> Tensor:
    """The unsteered logits `[tokens, vocabulary]` before each token from `first` on, of one pass without a cache."""
    return lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, first - 1 : -1]


@torch.no_grad()
def row(
    lm: LM,
    ids: Sequence[int],
    prompt_length: int,
    edits: Sequence[Edit],
    record: list | None = None,
    holds: Callable[..., bool] = naive_holds,
) -> Tensor:
    """The logits `[vocabulary]` after `ids`, only the last token steered. `record` gets each layer's (pre, post)."""
    cache = copy.deepcopy(prefix_cache(lm, tuple(ids)))
    for edit in edits:
        if isinstance(edit.operation, ScaleScores):
            keys = cache.layers[edit.site.layer].keys
            for column in range(keys.shape[2]):
                if in_span(edit, column):
                    keys[:, :, column] *= edit.operation.alpha**edit.strength
    handles = []
    for layer, block in enumerate(lm.layout.blocks):

        def change(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            x = (output if isinstance(output, Tensor) else output[0]).clone()
            here = [e for e in edits if (e.site.layer, e.site.kind) == (layer, "residual")]
            x[0, 0] = naive_together([e for e in here if holds(e, len(ids) - 1, prompt_length)], x[0, 0])
            return x if isinstance(output, Tensor) else (x, *output[1:])

        handles.append(block.register_forward_hook(change))
        if record is not None:

            def note(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
                pre = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                record.append((pre[0, 0].clone(), output[0][0, 0].clone()))

            handles.append(attention_of(block).register_forward_hook(note, with_kwargs=True))
    try:
        with spelled_out(lm, [e for e in edits if isinstance(e.operation, (BiasScores, TargetMass))], prompt_length):
            token, where = torch.tensor([[ids[-1]]]), torch.tensor([[len(ids) - 1]])
            return lm.model(input_ids=token, position_ids=where, past_key_values=cache, use_cache=True).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def spelled_out(lm: LM, edits: Sequence[Edit], prompt_length: int) -> Iterator[None]:
    """Attention of one query in explicit loops, with biases and target masses. Nothing without edits."""
    if not edits:
        yield
        return

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
        assert query.shape[2] == 1
        layer = next(i for i, block in enumerate(lm.layout.blocks) if attention_of(block) is module)
        here = [edit for edit in edits if edit.site.layer == layer]
        heads, length = query.shape[1], key.shape[2]
        repeat = heads // key.shape[1]
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        scores = torch.stack([key[0, h // repeat] @ query[0, h, 0] * scale for h in range(heads)])
        if kwargs.get("softcap"):
            scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
        if mask is not None:
            scores = scores.masked_fill(~mask[0, 0, 0, :length].expand(heads, -1), -math.inf)
        for edit in here:
            past = range(length - 1)
            inside = [c for c in past if in_span(edit, c)]
            outside = [c for c in past if c < prompt_length and not in_span(edit, c)]
            if isinstance(edit.operation, BiasScores):
                for h in range(heads) if edit.operation.heads is None else edit.operation.heads:
                    scores[h, outside if edit.operation.outside else inside] += edit.strength * edit.operation.bias
            else:
                mass = scores.softmax(-1)[:, inside].sum(-1)
                if edit.operation.pool == "layer":
                    mass = mass.mean().expand(heads)
                target = edit.operation.target * edit.strength
                for h in range(heads):
                    m = max(float(mass[h]), 1e-10)  # 0 where the span is out of sight
                    if m < target:
                        bias = math.log(target / m)
                        if edit.operation.exact:
                            bias = math.log(target * (1 - m) / (m * (1 - target)))
                        scores[h, inside] += bias
        weights = scores.softmax(-1)
        output = torch.stack([weights[h] @ value[0, h // repeat] for h in range(heads)])
        return output[None, None], None

    ALL_ATTENTION_FUNCTIONS.register("spelled-out", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("spelled-out", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before, config = lm.layout.decoder.config._attn_implementation, lm.layout.decoder.config
    config._attn_implementation = "spelled-out"
    try:
        yield
    finally:
        config._attn_implementation = before


def distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def ranking(lm: LM, ids: Sequence[int], edits: Sequence[Edit], kind: str = "paper") -> tuple[int, ...]:
    """The layers by falling sensitivity: one pass a layer, and the formula as it stands."""
    layers = sorted({edit.site.layer for edit in edits})
    raw: list = []
    row(lm, ids, len(ids), (), raw)
    table = {}
    for layer in layers:
        steered: list = []
        row(lm, ids, len(ids), [edit for edit in edits if edit.site.layer == layer], steered)
        for j, ((pre, post), (pre_l, post_l)) in enumerate(zip(raw, steered, strict=True)):
            crossed = distance(pre, post_l) + distance(pre_l, post)
            table[layer, j] = max(crossed, 0.0) if kind == "repo" else crossed - 2 * distance(pre, post)
    if kind == "repo":
        scores = {j: sum(table[layer, j] for layer in layers) / len(layers) for j in layers}
    else:
        scores = {layer: sum(table[layer, j] for j in range(len(raw))) / len(raw) for layer in layers}
    return tuple(sorted(layers, key=lambda layer: (-scores[layer], layer)))


def sets(order: Sequence[int], min_layers: int) -> list[set[int]]:
    chosen, t = [], 0
    while len(order) // 2**t >= min_layers:
        chosen.append(set(order[: len(order) // 2**t]))
        t += 1
    return chosen


def generate(
    lm: LM, text: str, edits: Sequence[Edit], beta: float, count: int, *, min_layers: int = 2, halve: bool = True,
    kind: str = "paper", holding: Callable[..., Any] = lambda _lm, _ids: naive_holds,
) -> tuple[list[int], list[int | None]]:  # fmt: skip
    """Greedy tokens, and at each the rung accepted (`None`: the raw token after all were rejected)."""
    ids = lm.encode(text)
    start, accepted = len(ids), []
    if not halve:
        rungs = [[Edit(e.site, e.operation, e.positions, e.strength / 2**t) for e in edits] for t in range(5)]
    elif edits:
        order = ranking(lm, ids, edits, kind)
        rungs = [[edit for edit in edits if edit.site.layer in chosen] for chosen in sets(order, min_layers)]
    else:
        rungs = []
    for _ in range(count):
        raw = row(lm, ids, start, ()).float()
        best = int(raw.argmax())
        bar = float(raw[best]) + (math.log(beta) if beta else -math.inf)
        for r, rung in enumerate(rungs):
            candidate = int(row(lm, ids, start, rung, holds=holding(lm, ids)).float().argmax())
            if float(raw[candidate]) >= bar:
                ids.append(candidate)
                accepted.append(r)
                break
        else:
            ids.append(best)
            accepted.append(None)
    return ids[start:], accepted
