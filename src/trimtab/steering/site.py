"""Where in the network an edit acts, or activations are read."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("residual", "scores")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network.

    `kind="residual"` is the residual stream at the *output* of block `layer`, counted from 0
    (Hugging Face's `hidden_states[layer + 1]`, except that their last entry is already normalised);
    `"scores"` are the scores of that block's attention, before the softmax.
    """

    layer: int
    kind: str = "residual"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown site kind {self.kind!r}; known: {', '.join(KINDS)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"a layer is a whole number from 0, got {self.layer!r}")

    def __str__(self) -> str:
        return f"{self.kind}[{self.layer}]"
