"""Which module of a model has a site's activations, on which side of it; found in its blocks, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import ROWS, TOKENS, Streams, block_of
from trimtab.engines.transformers.layout import Layout
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

MIXERS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What families call the projection that mixes the heads' outputs."""
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
DOWNS = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "w2", "fc_out")
"""What families call the MLP's last projection."""


@dataclass(frozen=True)
class Place:
    """A module, which of its sides (`"input"`, `"output"`), and the width of the activations there.

    `streams`: the tensor there holds several residual streams, of which one, or the mean, is meant.
    """

    module: nn.Module
    side: str
    size: int
    streams: Streams | None = None

    def read(self, x: Tensor) -> Tensor:
        """The site's activations in the tensor that is there."""
        return x if self.streams is None else self.streams.read(x)


def place(layout: Layout, site: Site) -> Place:
    """Where the activations of a site are.

    Raises `TrimtabError` for a layer that isn't there, and `UnsupportedError`, saying what the block has, where the
    model hasn't such a site: a mixture of experts has no one row of neurons.
    """
    if not 0 <= site.layer < layout.layers:
        raise TrimtabError(f"there is no layer {site.layer}; this model has layers 0 to {layout.layers - 1}")
    block = layout.blocks[site.layer]
    if site.kind in ("residual", "block_input"):
        return Place(block, "output" if site.kind == "residual" else "input", layout.width, _streams(layout, site))
    if site.kind == "attention":
        return Place(_attention(layout, block, site), "output", layout.width)
    if site.kind == "heads":
        mixer = _one(_attention(layout, block, site), MIXERS, layout, site)
        heads, size = query_heads(layout), _inputs(mixer)
        if size % heads:
            raise UnsupportedError(f"{site}: {size} inputs don't divide into {heads} heads")
        return Place(mixer, "input", size)
    if site.kind == "mlp":
        parts = [part for name, part in block.named_children() if name in MLPS]
        module = parts[0] if len(parts) == 1 else _one(block, DOWNS, layout, site)
        return Place(module, "output", layout.width)
    if site.kind == "neurons":
        parts = [part for name, part in block.named_children() if name in MLPS]
        down = _one(parts[0] if len(parts) == 1 else block, DOWNS, layout, site)
        return Place(down, "input", _inputs(down))
    raise UnsupportedError(f"the transformers engine has no activations at {site}")


def attach(where: Place, edit: Callable[[Tensor], Tensor | None]) -> Any:
    """A hook that puts what `edit` makes of a place's activations in their stead (`None`: they stay)."""
    streams = where.streams
    if streams is not None:
        edit = partial(_edited_streams, streams, edit)
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


def _edited_streams(streams: Streams, edit: Callable[[Tensor], Tensor | None], given: Tensor) -> Tensor:
    """The streams after an edit of the residual stream among them."""
    before = streams.read(given)
    x = before.clone()
    after = edit(x)
    return streams.moved(given, (x if after is None else after) - before)


def _streams(layout: Layout, site: Site) -> Streams | None:
    found = block_of(layout, site.layer)
    if found.shape is not None:
        raise UnsupportedError(
            f"block {site.layer} of {type(layout.decoder).__name__} puts out {found.shape} for {ROWS} rows of {TOKENS}"
            f" tokens at width {layout.width}; which part of it is the residual stream can't be told"
        )
    if found.runs > 1:
        raise UnsupportedError(
            f"block {site.layer} of {type(layout.decoder).__name__} runs {found.runs} times in a pass, so that there is"
            " no one residual stream after it"
        )
    return found.streams


def query_heads(layout: Layout) -> int:
    """How many query heads a layer has."""
    return int(layout.decoder.config.num_attention_heads)  # type: ignore[union-attr, arg-type]


def head_size(layout: Layout, layer: int) -> int:
    """The width of one head's output, which need not be the residual stream's divided by the number of heads."""
    return place(layout, Site(layer, "heads")).size // query_heads(layout)


def output_weight(layout: Layout, site: Site) -> Tensor:
    """The weight `[width, size]` of the projection that a site of heads or neurons goes into.

    Raises `UnsupportedError` for other sites, and where the weight is stored in another form (quantized).
    """
    if site.kind not in ("heads", "neurons"):
        raise UnsupportedError(f"{site} doesn't go into one projection; heads and neurons do")
    where = place(layout, site)
    weight = getattr(where.module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        turned = weight.T if type(where.module).__name__ == "Conv1D" else weight
        if tuple(turned.shape) == (layout.width, where.size):
            return turned.detach()
    raise UnsupportedError(f"can't read the weight behind {site}; load the model unquantized")


def _attention(layout: Layout, block: nn.Module, site: Site) -> nn.Module:
    """The block's attention: of the class that the model declares, else the one child that is called so."""
    kind = compat.declared(layout.decoder, "attentions")
    children = list(block.children())
    if kind:
        found = [child for child in children if isinstance(child, kind)]
    else:
        found = [child for child in children if type(child).__name__.endswith("Attention")]
    if len(found) != 1:
        raise _missing(block, layout, site)
    return found[0]


def _one(parent: nn.Module, names: tuple[str, ...], layout: Layout, site: Site) -> nn.Module:
    """The one projection of these names among the parent's own parts, which must give the stream's width."""
    found = [child for name, child in parent.named_children() if name in names]
    if len(found) != 1 or _outputs(found[0]) != layout.width:
        raise _missing(parent, layout, site)
    return found[0]


def _inputs(projection: Any) -> int:
    return int(projection.in_features if hasattr(projection, "in_features") else projection.weight.shape[0])


def _outputs(projection: nn.Module) -> int | None:
    """`Conv1D`, which GPT-2 has, counts them as `nf`."""
    return getattr(projection, "out_features", getattr(projection, "nf", None))


def _missing(parent: nn.Module, layout: Layout, site: Site) -> UnsupportedError:
    parts = ", ".join(name for name, _ in parent.named_children()) or "no parts"
    return UnsupportedError(
        f"{type(layout.decoder).__name__} has no site {site} that trimtab can find: its {type(parent).__name__} has"
        f" {parts}; steer the residual stream, or another kind of site"
    )


def _replaced(output: Any, x: Tensor) -> Any:
    return x if isinstance(output, Tensor) else (x, *output[1:])
