"""Cosines and projections of each token of a text or a conversation on a steering's directions, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trimtab.engines.contract import check_length
from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.report.axes import axes_or_new
from trimtab.report.frames import frame
from trimtab.report.tokens import PER_LINE, TokenCosines, color_limit, coloured_page_part, draw_cosines
from trimtab.steering import Steering
from trimtab.steering.directions import directions
from trimtab.steering.tensors import to_float64
from trimtab.text.chat import Prompt, Template, encode_conversation
from trimtab.text.pieces import pieces

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM


@dataclass(frozen=True)
class Projections:
    """The tokens of a text and, by layer, how their activations align with the steering's unit direction.

    `cosines[layer]` are between -1 and 1. `projections[layer]` are the same times the norms of the activations: the dot
    products, in the units of the residual stream. A notebook shows the text, each token colored by its cosine.
    """

    tokens: tuple[str, ...]
    cosines: Mapping[int, tuple[float, ...]]
    projections: Mapping[int, tuple[float, ...]]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which the text was read."""
        return tuple(self.cosines)

    def to_pandas(self) -> Any:
        """A data frame with one row per token and layer. Raises `TrimtabError` if pandas is missing."""
        rows = [
            {
                "position": i,
                "token": token,
                "layer": layer,
                "cosine": self.cosines[layer][i],
                "projection": self.projections[layer][i],
            }
            for layer in self.layers
            for i, token in enumerate(self.tokens)
        ]
        return frame(rows)

    def plot(self, ax: Any = None) -> Any:
        """Draw the cosines token by token: bars for one layer, a map of layer × token for several.

        Draws into the matplotlib axes `ax`, or into new ones, and returns them. Raises `TrimtabError` if matplotlib is
        missing.
        """
        count = min(len(self.tokens), 2 * PER_LINE)
        axes = axes_or_new(ax, (max(4.0, 1.5 + 0.26 * count), 2.6 + 0.13 * len(self.layers)))
        draw_cosines(axes, self._by_layer())
        return axes

    def _by_layer(self) -> list[TokenCosines]:
        return [TokenCosines(layer, self.tokens, cosines) for layer, cosines in self.cosines.items()]

    def _repr_html_(self) -> str:
        by_layer = self._by_layer()
        return coloured_page_part(by_layer, color_limit(by_layer))


def project(
    lm: LM,
    text: Prompt,
    steering: Steering,
    layers: int | Iterable[int] | None = None,
    *,
    template: Template | None = None,
    transfer: bool = False,
) -> Projections:
    """The implementation of `lm.project`."""
    if not isinstance(steering, Steering):
        raise TrimtabError(f"a text is projected on a steering, got {type(steering).__name__}")
    chosen = steering if layers is None else steering.only([layers] if isinstance(layers, int) else layers)
    if not chosen.edits:
        raise TrimtabError("this steering has no edits, and so no direction to project on")
    along = directions(chosen)
    lm.check(chosen, transfer=transfer)
    ids = encode_conversation(lm.tokenizer, text, template)
    if not ids:
        raise TrimtabError("the text is empty; there is no token to read")
    check_length(lm.layout, len(ids), "the text")
    sites = {edit.site.layer: edit.site for edit in chosen.edits}
    (batch,) = lm.read([[Text(ids, list(range(len(ids))))]], [sites[layer] for layer in along])
    cosines, projections = {}, {}
    for layer, direction in along.items():
        values = to_float64(batch.values[sites[layer]][0][0])
        cosines[layer] = tuple(torch.cosine_similarity(values, direction[None], dim=-1).tolist())
        projections[layer] = tuple((values @ direction).tolist())
    special = set(getattr(lm.tokenizer, "all_special_ids", ()))
    shown = pieces(lm.tokenizer, ids)
    named = tuple(lm.tokenizer.decode([i]) if i in special else piece for i, piece in zip(ids, shown, strict=True))
    return Projections(named, cosines, projections)
