"""Sites: the places in the network at which edits act and activations are read."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords
from trimtab.steering.integers import as_int

KINDS = ("residual", "block_input", "attention", "mlp", "heads", "neurons", "act_fn", "router", "keys", "scores")
FOREIGN_KINDS = {
    **dict.fromkeys(("resid_post", "resid", "residual_stream", "hidden_states", "decoder_block"), "residual"),
    "resid_pre": "block_input",
    **dict.fromkeys(("attn_out", "attn", "self_attn"), "attention"),
    "mlp_out": "mlp",
    "z": "heads",
    "post": "neurons",
    "attn_scores": "scores",
}
"""The names that other libraries use, for error messages."""


@class_keywords
@dataclass(frozen=True, order=True)
class Site:
    """A place in the network.

    The kinds, for block `layer`, counted from 0:

    - `"residual"`: the residual stream at the *output* of the block (Hugging Face's `hidden_states[layer + 1]`, except
      that their last entry is already normalized). If a model has several streams, the active one or their mean;
    - `"block_input"`: the residual stream that enters the block, likewise;
    - `"attention"`, `"mlp"`: the outputs of these two parts of the block, before any norm that a family has after them;
    - `"heads"`: the concatenated outputs of the attention heads, `[query heads * head size]`, before the output
      projection;
    - `"neurons"`: the input of the MLP's last projection (of a gated MLP: after the gate; of a mixture of experts: in
      the shared expert that processes every token);
    - `"act_fn"`: the output of the MLP's activation function (of a gated MLP: before the product with the other half;
      else the same as `"neurons"`);
    - `"router"`: the router logits of a mixture of experts, `[experts]`;
    - `"keys"`: the keys in the KV cache, heads concatenated, `[key heads * head size]`: after the norm and the rotary
      embedding, if the model has these;
    - `"scores"`: the attention scores before the softmax.
    """

    layer: int
    kind: str = "residual"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = FOREIGN_KINDS.get(str(self.kind).removeprefix("hook_"))
            here = f"here it is {near!r}" if near else f"known: {', '.join(KINDS)}"
            raise TrimtabError(f"unknown site kind {self.kind!r}; {here}")
        layer = as_int(self.layer)
        if layer is None or layer < 0:
            last = "" if layer is None else "; a model's last one is lm.layout.layers - 1"
            raise TrimtabError(f"a layer is a whole number from 0 up, got {self.layer!r}{last}")
        object.__setattr__(self, "layer", layer)

    @classmethod
    def router(cls, layer: int) -> Site:
        """The site of a block's router logits `[experts]`, before experts are selected."""
        return cls(layer, "router")

    def __str__(self) -> str:
        return f"{self.kind}[{self.layer}]"
