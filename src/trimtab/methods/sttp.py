"""Steering to a target or mirror projection (StTP, StMP): Herbster et al., "Activation Steering for Aligned Open-ended
Generation without Sacrificing Coherence", arXiv 2604.08169.

    p(x) = sigmoid(w.x + b)        a logistic probe on answers, each the mean of its tokens (equation 1)
    v = w / |w|,  m = -b / |w|     its direction, and where it draws the line along it
    StTP:  h[t] <- h[t] + (mu + alpha sigma - h[t].v) v        at tokens with h[t].v < m
    StMP:  h[t] <- h[t] + 2 alpha (m - h[t].v) v               at tokens with h[t].v < m

with mu and sigma the mean and the standard deviation of the wanted answers' projections on v. Tokens on the right side
of the line stay as they are.

The abstract says what the methods do; equation 1 and both formulas are as a public replication of the paper gives them.
Our own choices: alpha 1, one layer in the middle (the paper searches layers, coefficients and positions on a grid, with
alpha up to 36 for StTP), the probe's penalty, and that the first token is left out.
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
from trimtab.learn.activations import pair_texts, read_each
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
"""One pair in so many is held out, for the probe's accuracy; the probe that steers is then fitted to all."""


@dataclass(frozen=True)
class Probe:
    """A logistic probe's unit direction `[width]`, and the projection on it at which it is undecided."""

    direction: Tensor
    line: float


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
    """Move the projections of those tokens that a probe finds on the wrong side; others stay bit for bit.

    Args:
        lm: The model.
        pairs: Answers or texts: the positive is as wanted, the negative not.
        layers: Where to read and to act (default: the layer at 0.5 of the depth). Each has its own probe; the card
            has their accuracies, to choose from.
        move: `"target"` (StTP) sets the projection to `mu + alpha * sigma`; `"mirror"` (StMP) reflects it on the
            probe's line, with `alpha=1` exactly: a token far on the wrong side ends far on the right one.
        alpha: See `move`; 0 or more for a target, above 0 for a mirror.
        positions: At which tokens (default: all but the first, which in many models is an attention sink; the paper
            acts at every token).
        progress: Called with the number of pairs done, and of all.

    Returns:
        By layer, for a target a `SetProjection` of strength 1 behind a gate that is decided at each token; for a
        mirror a one-sided `SetProjection` to the line, whose strength is `2 * alpha`: one-sided, it is its own gate.

    Raises:
        TrimtabError: Fewer than two pairs, other shapes, unknown layers or options, sides that don't differ, and a
            target that isn't beyond the line.
    """
    pairs = pairs_for(lm, pairs)
    _check(pairs, move, alpha)
    sites = [Site(layer) for layer in check_layers(lm, layers, DEPTH)]
    activations = read_each(lm, pair_texts(lm, pairs, suffix=True), sites, progress=progress)
    edits, measured = [], {}
    for site in sites:
        sides = [[pair[m] for pair in activations[site]] for m in (0, 1)]
        wanted, other = (torch.stack([x.mean(0) for x in side]) for side in sides)
        probe = fit(wanted, other, site.layer)
        along = wanted @ probe.direction.double()
        target = float(along.mean() + alpha * along.std(correction=0))
        edits.append(_edit(site, probe, target, move, alpha, positions or Positions.all_but_first()))
        measured[str(site.layer)] = _facts(probe, sides, along, held_out_accuracy(wanted, other, site.layer))
    options: dict[str, Any] = {"layers": [site.layer for site in sites], "move": move, "alpha": alpha}
    options |= {} if positions is None else {"positions": str(positions)}
    card = Card("sttp", lm.identity, digest(pairs), options, {"pairs": len(pairs), "probes": measured}, versions())
    return Steering(tuple(edits), card)


def fit(wanted: Tensor, other: Tensor, layer: int) -> Probe:
    """The probe that tells `[answers, width]` activations of the wanted side from the other's.

    It sees them centred, and scaled by one number to a mean square of 1 an element, so that its penalty means the same
    at every layer and for every model.

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
    """The share of every fifth pair's answers that a probe fitted to the other pairs is right about."""
    held = torch.arange(len(wanted)) % HELD_OUT == min(HELD_OUT, len(wanted)) - 1
    probe = fit(wanted[~held], other[~held], layer)
    high, low = (side[held] @ probe.direction.double() > probe.line for side in (wanted, other))
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
        return Edit(site, SetProjection(probe.direction, probe.line, one_sided=True), positions, 2 * alpha)
    if not target > probe.line:
        raise TrimtabError(
            f"layer {site.layer}: the target {target:.4g} isn't beyond the probe's line at {probe.line:.4g}; use a"
            " larger alpha, more pairs, or another layer"
        )
    below = Threshold(site, -probe.direction, -probe.line, each_token=True)
    return Edit(site, SetProjection(probe.direction, target), positions, 1.0, below)


def _facts(probe: Probe, sides: Sequence[Sequence[Tensor]], along: Tensor, accuracy: float) -> dict[str, Any]:
    """What the card has of a layer."""
    v = probe.direction.double()
    moved = [float((torch.cat(list(side)) @ v < probe.line).double().mean()) for side in sides]
    return {
        "accuracy": round(accuracy, 6),
        "line": float(f"{probe.line:.9g}"),
        "wanted_mean": round(float(along.mean()), 6),
        "wanted_deviation": round(float(along.std(correction=0)), 6),
        "moved": {"wanted": round(moved[0], 6), "other": round(moved[1], 6)},
    }
