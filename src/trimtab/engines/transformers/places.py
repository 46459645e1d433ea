"""The module and side (input or output) where a site's activations are, found in the model's blocks, never guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from trimtab.engines.contract import query_heads
from trimtab.engines.transformers import compat, keys
from trimtab.engines.transformers.anatomy import ROWS, TOKENS, Streams, block_of
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.routers import LogitsHook, Router, router_of
from trimtab.engines.transformers.weights import in_memory, is_dense
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

MIXERS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "linear_o", "out_linear")
"""Names of the projection that mixes the heads' outputs, in various model families."""
SELF = ("self_attn", "self_attention", "attention", "attn")
"""Names of self-attention, for blocks that also have cross-attention."""
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "shared_mlp")
"""Names of a block's MLP."""
MLP_PARTS = (*MLPS, "mlps", "experts", "moe", "router")
"""Names of modules that are parts of the MLP if a block has several of them."""
SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""Names of the shared expert, which processes every token."""
DOWN_PROJECTIONS = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "w2", "fc_out", "output_linear", "lin2")
"""Names of the MLP's last projection."""
ACTS = ("act_fn", "act", "activation_fn")
"""Names of the MLP's activation function."""


@dataclass(frozen=True)
class Place:
    """A module, a side of it (`"input"` or `"output"`), and the width of the activations there.

    The side `"logits"` of a router is the output of the linear map inside it; the side `"cache"` of an attention module
    is the keys that it stores. With `streams` the tensor holds several residual streams, and the site is one of them or
    their mean.
    """

    module: nn.Module
    side: str
    size: int
    streams: Streams | None = None
    router: Router | None = None
    keys: keys.Keys | None = None

    def read(self, x: Tensor) -> Tensor:
        """The site's activations in the module's tensor."""
        return x if self.streams is None else self.streams.read(x)


def place(layout: Layout, site: Site) -> Place:
    """Find the module and side of a site's activations.

    Raises:
        TrimtabError: The model doesn't have this layer.
        UnsupportedError: The model doesn't have such a site: a mixture of experts, for example, doesn't have a single
            layer of neurons. The message names the parts of the block.
    """
    if not 0 <= site.layer < layout.layers:
        raise TrimtabError(f"there is no layer {site.layer}; this model has layers 0 to {layout.layers - 1}")
    block = layout.blocks[site.layer]
    streams = _streams(layout, site)
    if site.kind in ("residual", "block_input"):
        return Place(block, "output" if site.kind == "residual" else "input", layout.width, streams)
    where = _PARTS[site.kind](layout, block, site) if site.kind in _PARTS else None
    if where is None:
        raise UnsupportedError(f"the transformers engine has no activations at {site}")
    if where.module in shared_modules(layout):
        raise UnsupportedError(
            f"{type(layout.decoder).__name__} shares one {type(where.module).__name__} between several blocks, so"
            f" {site} can't be accessed separately; steer the residual stream"
        )
    return where


def attach(where: Place, edit: Callable[[Tensor], Tensor | None]) -> Any:
    """Attach a hook that replaces a place's activations by the result of `edit` (`None`: they stay as they are)."""
    streams = where.streams
    if streams is not None:
        edit = partial(_edited_streams, streams, edit)
    if where.router is not None:
        return LogitsHook(where.router, edit)
    if where.keys is not None:
        return keys.attach(where.keys, edit)
    if where.side == "output":

        def after(_module: Any, _args: Any, output: Any) -> Any:
            x = edit(output if isinstance(output, Tensor) else output[0])
            return None if x is None else _replaced(output, x)

        return where.module.register_forward_hook(after)

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            x = edit(args[0])
            return None if x is None else ((x, *args[1:]), kwargs)
        x = edit(kwargs["hidden_states"])
        return None if x is None else (args, {**kwargs, "hidden_states": x})

    return where.module.register_forward_pre_hook(before, with_kwargs=True)


def _edited_streams(streams: Streams, edit: Callable[[Tensor], Tensor | None], stacked: Tensor) -> Tensor:
    """Apply an edit to the residual stream in a tensor of several streams."""
    before = streams.read(stacked)
    x = before.clone()
    after = edit(x)
    return streams.with_change(stacked, (x if after is None else after) - before)


def _streams(layout: Layout, site: Site) -> Streams | None:
    block = block_of(layout, site.layer)
    if block.shape is not None:
        what = (
            f"{block.shape[0]} streams"
            if len(block.shape) == 1
            else f"{block.shape} for {ROWS} rows of {TOKENS} tokens"
        )
        raise UnsupportedError(
            f"block {site.layer} of {type(layout.decoder).__name__} outputs {what} at width {layout.width}, so the"
            " residual stream of each token can't be located"
        )
    if block.runs > 1:
        raise UnsupportedError(
            f"block {site.layer} of {type(layout.decoder).__name__} runs {block.runs} times in a pass, so {site} isn't"
            " unique"
        )
    return block.streams


_shared: WeakKeyDictionary[nn.Module, frozenset[nn.Module]] = WeakKeyDictionary()


def shared_modules(layout: Layout) -> frozenset[nn.Module]:
    """The modules that occur in several blocks."""
    if layout.decoder not in _shared:
        counts = Counter(module for block in layout.blocks for module in set(block.modules()))
        _shared[layout.decoder] = frozenset(module for module, count in counts.items() if count > 1)
    return _shared[layout.decoder]


def output_weight(layout: Layout, site: Site) -> Tensor:
    """The weight `[width, size]` of the projection whose input is a site of heads or neurons.

    Raises:
        UnsupportedError: The site is of another kind, or the weight isn't a plain matrix (it is quantized).
    """
    if site.kind not in ("heads", "neurons"):
        raise UnsupportedError(f"{site} isn't the input of a single projection; heads and neurons are")
    where = place(layout, site)
    with in_memory(where.module):
        weight = getattr(where.module, "weight", None)
    if is_dense(weight):
        turned = weight.T if type(where.module).__name__ == "Conv1D" else weight
        if tuple(turned.shape) == (layout.width, where.size):
            return turned.detach()
    raise UnsupportedError(f"can't read the weight behind {site}; load the model unquantized")


def _attention_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    attention = _attention(layout, block, site)
    if _adds_stream(attention) or attention not in block.children():
        return Place(_mixer(layout, block, attention, site), "output", layout.width)
    return Place(attention, "output", layout.width)


def _heads_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    attention = _attention(layout, block, site)
    mixer = _mixer(layout, block, attention, site)
    heads, size = query_heads(layout), _inputs(mixer)
    widths = [getattr(attention, name, None) for name in ("v_head_dim", "head_dim")]
    own = [width for width in widths if isinstance(width, int)]
    if size % heads or (own and size not in (heads * width for width in own) and size != layout.width):
        raise UnsupportedError(f"{site}: {size} inputs don't divide into {heads} heads")
    return Place(mixer, "input", size)


def _mlp_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    beside = [name for name, _ in block.named_children() if name in MLP_PARTS]
    if len(beside) > 1:
        raise UnsupportedError(
            f"{site}: {type(layout.decoder).__name__} adds the outputs of {', '.join(beside)} outside of any module;"
            " steer the residual stream"
        )
    part = _mlp(block)
    if part is None or _adds_stream(part):
        return Place(_down_projection(layout, block, part, site), "output", layout.width)
    return Place(part, "output", layout.width)


def _neurons_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    down = _down_projection(layout, block, _mlp(block), site)
    return Place(down, "input", _inputs(down))


def _act_fn_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    """The activation function in the module that contains the MLP's last projection."""
    neurons = place(layout, Site(site.layer, "neurons"))
    parent = next(part for part in block.modules() if any(child is neurons.module for child in part.children()))
    functions = [child for name, child in parent.named_children() if name in ACTS]
    if len(functions) != 1:
        raise _no_site_error(parent, layout, site)
    return Place(functions[0], "output", neurons.size)


def _router_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    router = router_of(layout, site.layer)
    if router.outputs_logits:
        return Place(router.source, "output", router.experts)
    return Place(router.module, "logits", router.experts, router=router)


def _keys_place(layout: Layout, block: nn.Module, site: Site) -> Place:
    stored = keys.keys_of(layout, site)
    return Place(stored.attention, "cache", stored.heads * stored.size, keys=stored)


_PARTS = {
    "keys": _keys_place,
    "router": _router_place,
    "attention": _attention_place,
    "heads": _heads_place,
    "mlp": _mlp_place,
    "neurons": _neurons_place,
    "act_fn": _act_fn_place,
}


def _attention(layout: Layout, block: nn.Module, site: Site) -> nn.Module:
    """The block's attention: of the class that the model declares, or else the one whose class name says so."""
    kinds = compat.declared(layout.decoder, "attentions")
    parts: dict[str, nn.Module] = dict(block.named_modules())
    modules: dict[str, nn.Module] = {name: part for name, part in parts.items() if kinds and isinstance(part, kinds)}
    if not modules:
        modules = {name: p for name, p in block.named_children() if type(p).__name__.endswith("Attention")}
    if len(modules) > 1:
        called = compat.declared_name(layout.decoder, "attentions")
        modules = {n: p for n, p in modules.items() if n.split(".")[-1] in ((called,) if called in modules else SELF)}
    if len(modules) != 1:
        raise _no_site_error(block, layout, site)
    return next(iter(modules.values()))


def _mixer(layout: Layout, block: nn.Module, attention: nn.Module, site: Site) -> nn.Module:
    """The projection of the heads' outputs, in the attention module or in its sibling `output` (BERT)."""
    projections = _find_projections(attention, MIXERS, layout.width)
    if not projections:
        path = next(name for name, part in block.named_modules() if part is attention)
        around = block.get_submodule(path.rpartition(".")[0])
        output = getattr(around, "output", None)
        projections = (
            _find_projections(output, MIXERS, layout.width)
            if around is not block and isinstance(output, nn.Module)
            else []
        )
    if len(projections) != 1:
        raise _no_site_error(attention, layout, site)
    return projections[0]


def _mlp(block: nn.Module) -> nn.Module | None:
    """The block's MLP, if it is one module, found by its name or else by its class name."""
    children = dict(block.named_children())
    parts = [part for name, part in children.items() if name in MLPS and name not in SHARED]
    parts = parts or [part for name, part in children.items() if name in SHARED]
    parts = parts or [part for part in children.values() if type(part).__name__.endswith(("MLP", "MoE", "FeedForward"))]
    return parts[0] if len(parts) == 1 else None


def _down_projection(layout: Layout, block: nn.Module, part: nn.Module | None, site: Site) -> nn.Module:
    """The MLP's last projection; in a mixture of experts, that of the shared expert."""
    children = dict(block.named_children())
    if part is None and "intermediate" in children and "output" in children:
        projections = _find_projections(children["output"], MIXERS, layout.width)  # BERT's
    elif isinstance(part, nn.Sequential):
        projections = [part[-1]] if len(part) and _outputs(part[-1]) == layout.width else []
    else:
        inside = part if part is not None else block
        projections = _find_projections(inside, DOWN_PROJECTIONS, layout.width, deep=False)
        experts = {**dict(inside.named_children()), **children}
        shared = [expert for name, expert in experts.items() if name in SHARED]
        projections = projections or [
            down for expert in shared for down in _find_projections(expert, DOWN_PROJECTIONS, layout.width, deep=False)
        ]
    if len(projections) != 1:
        raise _no_site_error(block if part is None else part, layout, site)
    return projections[0]


def _find_projections(parent: nn.Module, names: tuple[str, ...], width: int, *, deep: bool = True) -> list[nn.Module]:
    """The projections to this width with one of these names: direct children, or else any submodules if `deep`."""
    own = [part for name, part in parent.named_children() if name in names and _outputs(part) == width]
    if own or not deep:
        return own
    return [part for name, part in parent.named_modules() if name.split(".")[-1] in names and _outputs(part) == width]


def _adds_stream(part: nn.Module) -> bool:
    """Whether the module takes the residual stream as an input and adds it, so that its output includes it."""
    return "residual" in compat.parameters(part)


def _inputs(projection: Any) -> int:
    counts = (getattr(projection, name, None) for name in ("in_features", "infeatures"))  # `infeatures` in GPTQ
    inputs = next((count for count in counts if isinstance(count, int)), None)
    return int(projection.weight.shape[0]) if inputs is None else inputs


def _outputs(projection: nn.Module) -> int | None:
    """The output width of a projection: `nf` in GPT-2's `Conv1D`, `output_size` in the linear layers of mixtures."""
    counts = (getattr(projection, name, None) for name in ("out_features", "outfeatures", "nf", "output_size"))
    return next((count for count in counts if isinstance(count, int)), None)


def _no_site_error(parent: nn.Module, layout: Layout, site: Site) -> UnsupportedError:
    parts = ", ".join(name for name, _ in parent.named_children()) or "no parts"
    return UnsupportedError(
        f"{type(layout.decoder).__name__} has no site {site} that trimtab can find: its {type(parent).__name__} has"
        f" {parts}; steer the residual stream, or another kind of site"
    )


def _replaced(output: Any, x: Tensor) -> Any:
    if isinstance(output, Tensor):
        return x
    return [x, *output[1:]] if isinstance(output, list) else (x, *output[1:])
