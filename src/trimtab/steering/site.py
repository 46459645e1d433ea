"""Where in the network an edit acts, or activations are read."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords
from trimtab.steering.whole import whole

KINDS = ("residual", "block_input", "attention", "mlp", "heads", "neurons", "act_fn", "router", "keys", "scores")
ELSEWHERE = {
    **dict.fromkeys(("resid_post", "resid", "residual_stream", "hidden_states", "decoder_block"), "residual"),
    "resid_pre": "block_input",
    **dict.fromkeys(("attn_out", "attn", "self_attn"), "attention"),
    "mlp_out": "mlp",
    "z": "heads",
    "post": "neurons",
    "attn_scores": "scores",
}
"""What other libraries call them."""


@class_keywords
@dataclass(frozen=True, order=True)
class Site:
    """A place in the network.

    `kind="residual"` is the residual stream at the *output* of block `layer`, counted from 0 (Hugging Face's
    `hidden_states[layer + 1]`, except that their last entry is already normalised), and `"block_input"` the stream
    that enters the block; of several streams the active one, or their mean. `"attention"` and `"mlp"` are the outputs
    of these two parts of the block, before any norm that a family has after them. `"heads"` are the outputs of the
    attention heads side by side, `[query heads * head size]`, before the projection that mixes them; `"neurons"` are
    the MLP's inner activations before its last projection (where it is gated: after the gate; of a mixture of experts
    those of the expert that every token passes), and `"act_fn"` the output of its activation function (where it is
    gated: before the product with the other half; else the same). `"router"` are the logits by which a mixture of
    experts chooses among them, `[experts]`. `"keys"` are the keys that the block's attention stores, heads side by
    side, `[key heads * head size]`: after the norm and the rotary embedding, if the model has these. `"scores"` are
    the scores of the block's attention, before the softmax.
    """

    layer: int
    kind: str = "residual"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = ELSEWHERE.get(str(self.kind).removeprefix("hook_"))
            here = f"here it is {near!r}" if near else f"known: {', '.join(KINDS)}"
            raise TrimtabError(f"unknown site kind {self.kind!r}; {here}")
        layer = whole(self.layer)
        if layer is None or layer < 0:
            last = "" if layer is None else "; a model's last one is lm.layout.layers - 1"
            raise TrimtabError(f"a layer is a whole number from 0 up, got {self.layer!r}{last}")
        object.__setattr__(self, "layer", layer)

    @classmethod
    def router(cls, layer: int) -> Site:
        """The logits `[experts]` of a block's router, before it chooses."""
        return cls(layer, "router")

    def __str__(self) -> str:
        return f"{self.kind}[{self.layer}]"
