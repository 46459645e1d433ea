"""A steering of attention towards spans of a prompt: one operation at several layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trimtab.errors import TrimtabError
from trimtab.steering.attention import ScoreOperation
from trimtab.steering.card import Card
from trimtab.steering.keys import ScaleKeys
from trimtab.steering.positions import Positions
from trimtab.steering.site import Site
from trimtab.steering.steering import Edit, Steering


def emphasis(
    operation: ScoreOperation | ScaleKeys,
    spans: Sequence[tuple[int, int]],
    layers: Iterable[int],
    method: str = "manual",
) -> Steering:
    """A steering that applies an operation at these layers, to all spans `(start, stop)` of a prompt's tokens.

    The operation acts on attention scores; `ScaleKeys` acts on keys.

    Raises `TrimtabError` if there are no spans or no layers.
    """
    chosen = tuple(layers)
    if not spans or not chosen:
        raise TrimtabError(f"there are no {'layers' if spans else 'spans'} at which to steer attention")
    positions = at_spans(spans)
    kind = getattr(operation, "only_at", "scores")
    edits = tuple(Edit(Site(layer, kind), operation, positions) for layer in chosen)
    return Steering(edits, Card(method, options={"operation": repr(operation), "spans": [list(s) for s in spans]}))


def at_spans(spans: Sequence[tuple[int, int]]) -> Positions:
    """The tokens of one or more spans `(start, stop)` of a prompt."""
    positions = Positions.span(*spans[0])
    for span in spans[1:]:
        positions = positions | Positions.span(*span)
    return positions
