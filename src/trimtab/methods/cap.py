"""Activation capping: Lu, Gallagher, Michala, Fish and Lindsey, "The Assistant Axis: Situating and Stabilizing the
Default Persona of Language Models", arXiv 2601.10387, section 5.

    v[l] = unit mean difference of wanted and other answers, each answer the mean of its tokens at layer l
    tau[l] = a quantile of the answers' projections on v[l]
    h_l[t] <- h_l[t] + max(0, tau[l] - h_l[t].v[l]) v[l]        at several neighboring layers at once

The formula (`h - v min(h.v - tau, 0)`), the means over tokens and the 25th percentile are the paper's. The paper
takes the percentile over all of its answers, of the assistant and of other personas, and notes that it is close to the
assistant's mean. Here it is by default a percentile of the wanted answers only (`over="both"`: of all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import pair_texts, read_activations
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import mean_difference, unit
from trimtab.learn.inputs import pairs_for
from trimtab.steering import Card, Edit, Positions, SetProjection, Site, Steering
from trimtab.text.pairs import Pair, Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


Over = Literal["wanted", "both"]
BoundKind = Literal["floor", "ceiling"]
FIRST_DEPTH, LAST_DEPTH = 0.7, 0.85
"""The paper caps blocks 46 to 53 of 64 and 56 to 71 of 80, and finds that a single layer has no useful effect."""


@keywords
def learn_cap(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    quantile: float = 0.25,
    over: Over = "wanted",
    bound: BoundKind = "floor",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn a cap: projections on a direction are kept from falling below their range in wanted answers.

    If a projection is at the cap or above, the activation stays the same bit for bit. The first token is left out by
    default, since in many models it is an attention sink with an outsized activation; the paper acts at every token.

    Args:
        lm: The model.
        pairs: Answers or texts: the positive is as wanted, the negative isn't. With `bound="ceiling"`, the positive
            shows the behaviour to limit, and the negative is the wanted one.
        layers: The blocks to cap after (default: from 0.7 to 0.85 of the depth).
        quantile: The quantile of the projections that becomes the cap, 0 to 1. With a higher one, the cap acts more
            often and moves activations further.
        over: The projections that the quantile is computed over: those of the `"wanted"` answers, or of `"both"`
            sides, as in the paper.
        bound: `"floor"`: projections on the direction towards the positives are raised to the cap. `"ceiling"`: they
            are lowered to it. A ceiling is the floor of the opposite direction with the sides swapped: the cap is the
            `1 - quantile` quantile, of the negatives.
        positions: The tokens at which to cap (default: all but the first).
        progress: `progress(done, total)` counts pairs.

    Returns:
        One `SetProjection(one_sided=True)` per layer, of strength 1. Its card has by layer the `cap`, both sides' mean
        projections, and the shares of their tokens that it would change (`moved`).

    Raises:
        TrimtabError: There are fewer than two pairs, other shapes, a quantile outside 0 to 1, unknown layers or
            options, or sides that don't differ.
    """
    pairs = pairs_for(lm, pairs)
    _check(pairs, quantile, over, bound)
    sites = [Site(layer) for layer in _layers(lm, layers)]
    activations = read_activations(lm, pair_texts(lm, pairs, suffix=True), sites, progress=progress)
    wanted, other = (0, 1) if bound == "floor" else (1, 0)
    edits, measured = [], {}
    for site in sites:
        sides = [[pair[m] for pair in activations[site]] for m in (wanted, other)]
        v, cap, card_entries = _fit_cap(sides, quantile, over, site.layer)
        measured[str(site.layer)] = card_entries
        operation = SetProjection(v, cap, one_sided=True)
        edits.append(Edit(site, operation, positions or Positions.all_but_first()))
    options: dict[str, Any] = {"layers": [site.layer for site in sites], "quantile": quantile, "over": over}
    options |= {"bound": bound} | ({} if positions is None else {"positions": str(positions)})
    card = Card("cap", lm.identity, digest(pairs), options, {"pairs": len(pairs), "caps": measured}, versions())
    return Steering(tuple(edits), card)


def _check(pairs: Sequence[Pair], quantile: float, over: str, bound: str) -> None:
    if len(pairs) < 2:
        raise TrimtabError(f"a cap is a quantile of many answers, got {len(pairs)} pairs; give two or more")
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 <= quantile <= 1:
        raise TrimtabError(f"a quantile lies between 0 and 1, got {quantile!r}; the 25th percentile is 0.25")
    for name, value, known in (("over", over, get_args(Over)), ("bound", bound, get_args(BoundKind))):
        if value not in known:
            raise TrimtabError(f"there is no {name} {value!r}; known: {', '.join(known)}")


def _layers(lm: LM, layers: int | Sequence[int] | None) -> list[int]:
    if layers is None:
        first = min(round(FIRST_DEPTH * lm.layout.layers), lm.layout.layers - 1)
        layers = range(first, max(first + 1, round(LAST_DEPTH * lm.layout.layers)))
    return check_layers(lm, layers, FIRST_DEPTH)


def _fit_cap(
    sides: Sequence[Sequence[Tensor]], quantile: float, over: str, layer: int
) -> tuple[Tensor, float, dict[str, Any]]:
    """The direction towards the first side `[width]`, the cap, and the entries of the card; texts `[tokens, width]`."""
    wanted, other = (torch.stack([x.mean(0) for x in side]) for side in sides)
    try:
        v = unit(mean_difference(wanted, other)).float()
    except TrimtabError as error:
        raise TrimtabError(f"layer {layer}: {error}; use other pairs, or another layer") from None
    projections = [side @ v.double() for side in (wanted, other)]
    cap = float(torch.quantile(projections[0] if over == "wanted" else torch.cat(projections), quantile))
    moved_shares = [float((torch.cat(list(side)) @ v.double() < cap).double().mean()) for side in sides]
    card_entries = {
        "cap": float(f"{cap:.9g}"),
        "wanted": round(float(projections[0].mean()), 6),
        "other": round(float(projections[1].mean()), 6),
        "moved": {"wanted": round(moved_shares[0], 6), "other": round(moved_shares[1], 6)},
    }
    return v, cap, card_entries
