"""Steering at any site by explicit hooks on modules that are named here, one text at a time and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tiny import naive_edit, naive_holds
from torch import Tensor, nn

from trimtab import LM, Edit, Steering
from trimtab.steering import AddScaled, HoldElements, MaskNeurons, ReadWrite, ScaleElements

LLAMA = ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj")
MODULES: dict[str, tuple[str, str, str, str | None]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "gemma3_multimodal": LLAMA,
    "qwen2_vl": LLAMA,
    "gpt2": ("attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": ("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "opt": ("self_attn", "self_attn.out_proj", "fc2", "fc2"),
    "falcon": ("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "mixtral": ("self_attn", "self_attn.o_proj", "mlp", None),
    "qwen3_moe": ("self_attn", "self_attn.o_proj", "mlp", None),
}
KINDS = ("residual", "block_input", "attention", "heads", "mlp", "neurons", "act_fn")
ACTS = {"gpt2": "act", "gpt_neox": "act", "falcon": "act", "phi3": "activation_fn", "opt": "activation_fn"}


def kinds(family: str) -> list[str]:
    return [kind for kind in KINDS if kind not in ("neurons", "act_fn") or MODULES[family][3] is not None]


def module_of(lm: LM, kind: str, layer: int) -> nn.Module:
    attention, mixer, mlp, down = MODULES[lm.name.removeprefix("tiny-")]
    family = lm.name.removeprefix("tiny-")
    function = ACTS.get(family, "act_fn") if family == "opt" else f"{mlp}.{ACTS.get(family, 'act_fn')}"
    path = {"attention": attention, "heads": mixer, "mlp": mlp, "neurons": down, "act_fn": function}.get(kind, "")
    assert path is not None
    return lm.layout.blocks[layer].get_submodule(path)


def size_of(lm: LM, kind: str) -> int:
    if kind not in ("heads", "neurons", "act_fn"):
        return lm.layout.width
    module: Any = module_of(lm, "heads" if kind == "heads" else "neurons", 0)
    return int(module.weight.numel() // lm.layout.width)


def formula(edit: Edit, x: Tensor) -> Tensor:
    """An operation as its paper has it, for one activation `[width]`."""
    operation, s = edit.operation, edit.strength
    if isinstance(operation, ReadWrite):
        return naive_edit(edit, x)
    v = operation.direction.to(x.dtype)
    if isinstance(operation, ScaleElements):
        new = torch.stack([a + s * m * a for a, m in zip(x, v, strict=True)])
    elif isinstance(operation, AddScaled):
        cosine = float(torch.dot(x, v) / (x.norm() * v.norm()))
        c = {"norm": x.norm(), "opposed": x.norm() * (1 + max(0.0, -cosine)), "sign": torch.tensor(cosine).sign()}
        new = x + s * c[operation.by].to(x.dtype) * v
    else:
        new = x + s * v
    return new * (x.norm() / new.norm()) if operation.keep_norm else new


def hooked(lm: LM, kind: str, layer: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that puts `change(x)`, x of shape `[tokens, size]`, in the place of one text's activations."""

    def swap(x: Tensor) -> Tensor:
        return change(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (swap(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": swap(kwargs["hidden_states"])}

    def after(_module: Any, _args: Any, output: Any) -> Any:
        return swap(output) if isinstance(output, Tensor) else (swap(output[0]), *output[1:])

    module = module_of(lm, kind, layer)
    if kind in ("block_input", "heads", "neurons"):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def activations(lm: LM, ids: Sequence[int], kind: str, layer: int) -> Tensor:
    """`[tokens, size]`, unsteered."""
    return activations_at(lm, ids, [(kind, layer)])[0]


@torch.no_grad()
def activations_at(lm: LM, ids: Sequence[int], places: Sequence[tuple[str, int]]) -> list[Tensor]:
    """`[tokens, size]` at each place, a kind and a layer, unsteered."""
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(x: Tensor, place: tuple[str, int]) -> Tensor:
        kept[place] = x.clone()  # blocks may go on to add to what a module gave
        return x

    handles = [hooked(lm, *place, partial(keep, place=place)) for place in places]
    try:
        lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[place] for place in places]


@torch.no_grad()
def logits(lm: LM, ids: Sequence[int], n: int, edits: Sequence[Edit]) -> Tensor:
    """`[tokens, vocabulary]` of one text whose prompt has n tokens, all recomputed."""
    prepared = []
    for edit in edits:
        if isinstance(edit.operation, MaskNeurons):
            prompt = activations(lm, ids[:n], edit.site.kind, edit.site.layer)
            first = 1 if edit.operation.skip_first and n > 1 else 0
            sizes = prompt[first:].abs().double()
            stat = sizes.max(0).values if edit.operation.statistic == "any" else (sizes**2).mean(0) ** 0.5
            keep = torch.tensor(
                [s > e or e == 0 for s, e in zip(stat.tolist(), edit.operation.direction.tolist(), strict=True)]
            )
            prepared.append(lambda x, keep=keep: torch.where(keep, x, torch.zeros_like(x)))
        elif isinstance(edit.operation, HoldElements):
            clean = activations(lm, ids[:n], edit.site.kind, edit.site.layer)[-1]
            mask = edit.operation.direction.to(clean)
            held = clean + edit.strength * mask * clean
            prepared.append(lambda x, held=held: held)
        else:
            prepared.append(lambda x, edit=edit: formula(edit, x))
    handles = []
    for site in {edit.site for edit in edits}:

        def change(x: Tensor, site: Any = site) -> Tensor:
            new = x.clone()
            for edit, apply in zip(edits, prepared, strict=True):
                for t in range(len(x)):
                    if edit.site == site and naive_holds(edit, t, n):
                        new[t] = apply(new[t])
            return new

        handles.append(hooked(lm, site.kind, site.layer, change))
    try:
        return lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def generate(lm: LM, text: str, steering: Steering | None, count: int) -> tuple[list[int], list[float]]:
    """Greedy decoding; the new ids and their log-probabilities."""
    ids = lm.encode(text)
    n, values = len(ids), []
    for _ in range(count):
        last = logits(lm, ids, n, steering.edits if steering else ())[-1]
        ids.append(int(last.argmax()))
        values.append(float(last.log_softmax(-1)[ids[-1]]))
    return ids[n:], values
