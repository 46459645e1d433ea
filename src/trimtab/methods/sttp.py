"""Steering to a target or mirror projection (StTP, StMP): Herbster et al., "Activation Steering for Aligned Open-ended
Generation without Sacrificing Coherence", arXiv 2604.08169.

    p(x) = sigmoid(w.x + b)        a logistic probe on answers, each the mean of its tokens (equation 1)
    v = w / |w|,  m = -b / |w|     its direction, and the projection on it at the decision boundary
    StTP:  h[t] <- h[t] + (mu + alpha sigma - h[t].v) v        at tokens with h[t].v < m
    StMP:  h[t] <- h[t] + 2 alpha (m - h[t].v) v               at tokens with h[t].v < m

with mu and sigma the mean and the standard deviation of the wanted answers' projections on v. Tokens on the positive
side of the boundary don't change.

The description follows the abstract; equation 1 and both formulas are from a public replication of the paper. Our own
choices: alpha 1, one layer in the middle (the paper searches layers, coefficients and positions on a grid, with alpha
up to 36 for StTP), the probe's penalty, and leaving out the first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import pair_texts, read_activations
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import unit
from trimtab.learn.inputs import pairs_for
from trimtab.learn.probes import logistic
from trimtab.steering import Card, Edit, Positions, SetProjection, Site, Steering, Threshold
from trimtab.text.pairs import Pair, Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


Move = Literal["target", "mirror"]
DEPTH = 0.5
HELD_OUT = 5
"""One in this many pairs is held out, for the probe's accuracy. The probe that steers is fitted to all pairs."""


@dataclass(frozen=True)
class Probe:
    """A logistic probe: its unit direction `[width]`, and the projection on it at the decision boundary."""

    direction: Tensor
    boundary: float


@keywords
def learn_sttp(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    move: Move = "target",
    alpha: float = 1.0,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn a probe, and move the projections of tokens on its negative side; other tokens stay the same bit for bit.

    Args:
        lm: The model.
        pairs: Answers or texts: the positive is as wanted, the negative isn't.
        layers: Blocks to read and to steer after (default: one, at 0.5 of the depth). Each has its own probe; the card
            has their accuracies, to help choose one.
        move: `"target"` (StTP) sets the projection to `mu + alpha * sigma`. `"mirror"` (StMP) reflects it at the
            probe's decision boundary, exactly with `alpha=1`, so that a token far on the negative side ends far on the
            positive one.
        alpha: See `move`; 0 or more for a target, above 0 for a mirror.
        positions: The tokens at which to act (default: all but the first, which in many models is an attention sink;
            the paper acts at every token).
        progress: `progress(done, total)` counts pairs.

    Returns:
        For a target, one `SetProjection` of strength 1 per layer, with a gate that is decided at each token. For a
        mirror, one one-sided `SetProjection` per layer with the boundary as its target and a strength of `2 * alpha`;
        it needs no gate, since it is one-sided.

    Raises:
        TrimtabError: There are fewer than two pairs, other shapes, unknown layers or options, sides that don't differ,
            or a target that isn't beyond the boundary.
    """
    pairs = pairs_for(lm, pairs)
    _check(pairs, move, alpha)
    sites = [Site(layer) for layer in check_layers(lm, layers, DEPTH)]
    activations = read_activations(lm, pair_texts(lm, pairs, suffix=True), sites, progress=progress)
    edits, measured = [], {}
    for site in sites:
        sides = [[pair[m] for pair in activations[site]] for m in (0, 1)]
        wanted, other = (torch.stack([x.mean(0) for x in side]) for side in sides)
        probe = fit(wanted, other, site.layer)
        projections = wanted @ probe.direction.double()
        target = float(projections.mean() + alpha * projections.std(correction=0))
        edits.append(_edit(site, probe, target, move, alpha, positions or Positions.all_but_first()))
        measured[str(site.layer)] = _facts(probe, sides, projections, held_out_accuracy(wanted, other, site.layer))
    options: dict[str, Any] = {"layers": [site.layer for site in sites], "move": move, "alpha": alpha}
    options |= {} if positions is None else {"positions": str(positions)}
    card = Card("sttp", lm.identity, digest(pairs), options, {"pairs": len(pairs), "probes": measured}, versions())
    return Steering(tuple(edits), card)


def fit(wanted: Tensor, other: Tensor, layer: int) -> Probe:
    """Fit the probe that separates the wanted from the other activations, both `[answers, width]`.

    Activations are centered and scaled by one number to a root mean square of 1, so that the penalty means the same for
    all layers and models.

    Raises:
        TrimtabError: The sides don't differ at this layer.
    """
    x = torch.cat([wanted, other]).double()
    centre = x.mean(0)
    scale = float((x - centre).square().mean().sqrt())
    labels = torch.cat([torch.ones(len(wanted)), torch.zeros(len(other))])
    w, b = logistic((x - centre) / (scale or 1.0), labels)
    try:
        v = unit(w).float()
    except TrimtabError as error:
        raise TrimtabError(f"layer {layer}: {error}; use other pairs, or another layer") from None
    return Probe(v, float(centre @ v.double() - b * scale / w.norm()))


def held_out_accuracy(wanted: Tensor, other: Tensor, layer: int) -> float:
    """The accuracy on every fifth pair's answers of a probe that is fitted to the other pairs."""
    held = torch.arange(len(wanted)) % HELD_OUT == min(HELD_OUT, len(wanted)) - 1
    probe = fit(wanted[~held], other[~held], layer)
    high, low = (side[held] @ probe.direction.double() > probe.boundary for side in (wanted, other))
    return float(torch.cat([high, ~low]).double().mean())


def _check(pairs: Sequence[Pair], move: str, alpha: float) -> None:
    if len(pairs) < 2:
        raise TrimtabError(f"a probe is learned from two pairs or more, got {len(pairs)}")
    if move not in get_args(Move):
        raise TrimtabError(f"there is no move {move!r}; known: {', '.join(get_args(Move))}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise TrimtabError(f"alpha is 0 or more, got {alpha!r}; to steer the other way, exchange the pairs' sides")
    if move == "mirror" and alpha == 0:
        raise TrimtabError("a mirror with alpha 0 moves nothing; 0.5 moves tokens to the line, 1 mirrors them")


def _edit(site: Site, probe: Probe, target: float, move: str, alpha: float, positions: Positions) -> Edit:
    if move == "mirror":
        return Edit(site, SetProjection(probe.direction, probe.boundary, one_sided=True), positions, 2 * alpha)
    if not target > probe.boundary:
        raise TrimtabError(
            f"layer {site.layer}: the target {target:.4g} isn't beyond the probe's line at {probe.boundary:.4g}; use a"
            " larger alpha, more pairs, or another layer"
        )
    below = Threshold(site, -probe.direction, -probe.boundary, each_token=True)
    return Edit(site, SetProjection(probe.direction, target), positions, 1.0, below)


def _facts(probe: Probe, sides: Sequence[Sequence[Tensor]], along: Tensor, accuracy: float) -> dict[str, Any]:
    """The card's entries for a layer."""
    v = probe.direction.double()
    moved = [float((torch.cat(list(side)) @ v < probe.boundary).double().mean()) for side in sides]
    return {
        "accuracy": round(accuracy, 6),
        "line": float(f"{probe.boundary:.9g}"),
        "wanted_mean": round(float(along.mean()), 6),
        "wanted_deviation": round(float(along.std(correction=0)), 6),
        "moved": {"wanted": round(moved[0], 6), "other": round(moved[1], 6)},
    }
