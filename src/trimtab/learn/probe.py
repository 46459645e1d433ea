"""A probe for a monitor: whether a token is one of an answer of the first kind, as a logistic regression says.

The probe is fitted on single tokens of half of the pairs' answers. Of each requested layer there is one; a quarter of
the pairs chooses the layer, and the last quarter says how good the probe is and where its line goes. As a monitor looks
at every token and fires at the first one beyond its line, an answer's score there is its largest: the line is drawn so
that no more than a chosen share of the answers of the second kind has a token beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import pair_texts, read_each
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.inputs import check_lm, pairs_for
from trimtab.learn.probes import logistic
from trimtab.learn.thresholds import Curve, roc
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering, Threshold
from trimtab.text.answers import ReadAt, as_read_at
from trimtab.text.pairs import Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

LEAST = 8
"""Pairs at least: two of them say how good the probe is."""
TOKENS = 16
"""Of an answer so many tokens are fitted at most, spread evenly: long answers don't outweigh short ones by more."""


@dataclass(frozen=True)
class _Fitted:
    site: Site
    weight: Tensor
    bias: float

    def scores(self, sides: Sequence[Tensor]) -> list[float]:
        """The largest probability of each answer's tokens."""
        return [float((x @ self.weight + self.bias).sigmoid().max()) for x in sides]


@keywords
def learn_probe(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    read_at: str | ReadAt = "answer",
    false_alarms: float = 0.05,
    penalty: float = 1.0,
    progress: Progress | None = None,
) -> Steering:
    """A probe that tells the tokens of positive answers from those of negative ones, with a line to act on.

    Args:
        lm: The model.
        pairs: Answers or texts. Every other one is fitted; of the rest one half chooses the layer, the other measures.
        layers: Where to look; by default every fourth block from a quarter of the depth on.
        read_at: At which of an answer's tokens: `"answer"` (all), `"first:K"`, `"after:MARKER"`, `"last"`.
        false_alarms: The share of held-out negative answers that may have a token beyond the line, 0 to 1.
        penalty: Of the regression, on activations of mean 0 and variance 1.
        progress: `progress(done, total)` counts pairs that were read.

    Returns:
        A steering whose one edit has the probe for its gate: `Monitor.of(name, probe)` reads it at each token. What it
        adds is the probe's unit direction. The card has `area` (that under the held-out curve), `threshold`, `hits` and
        `false_alarms`.

    Raises:
        TrimtabError: Too few pairs, unknown layers, a share that is none.
    """
    check_lm(lm)
    pairs = pairs_for(lm, pairs)
    if len(pairs) < LEAST:
        raise TrimtabError(f"a probe needs {LEAST} pairs at least, half of them to fit it, and there are {len(pairs)}")
    if isinstance(false_alarms, bool) or not 0 <= false_alarms <= 1:
        raise TrimtabError(f"false_alarms is a share from 0 to 1, got {false_alarms!r}")
    read_at = as_read_at(read_at)
    count = lm.layout.layers
    chosen = check_layers(lm, range(count // 4, count, 4) if layers is None else layers, 0.5)
    sites = [Site(layer) for layer in chosen]
    activations = read_each(lm, pair_texts(lm, pairs, read_at=read_at), sites, progress=progress)
    rest = range(1, len(pairs), 2)
    choosing, held = rest[::2], rest[1::2]
    areas, fitted = {}, []
    for site in sites:
        candidate = _fit([activations[site][i] for i in range(0, len(pairs), 2)], site, penalty)
        area = _curve(candidate, activations[site], choosing).area
        areas[str(site.layer)] = round(area, 6)
        fitted.append((area, candidate))
    best = max(fitted, key=lambda each: each[0])[1]
    curve = _curve(best, activations[best.site], held)
    point = curve.chosen("youden", false_alarms)
    line = min(max(point.threshold, 0.0), 1.0)
    gate = Threshold(best.site, best.weight.float(), line, "probability", bias=best.bias)
    measured = {
        "pairs": len(pairs),
        "layer": best.site.layer,
        "area": round(curve.area, 6),
        "threshold": round(line, 9),
        "hits": round(point.hits, 6),
        "false_alarms": round(point.false_alarms, 6),
        "held_out": len(held),
        "areas_by_layer": areas,
    }
    options = {"layers": chosen, "read_at": str(read_at), "false_alarms": false_alarms, "penalty": penalty}
    card = Card("probe", lm.identity, digest(pairs), options, measured, versions())
    unit = (best.weight / best.weight.norm()).float()
    return Steering((Edit(best.site, Add(unit), Positions.all()),), card).when(gate)


def _fit(pairs: Sequence[Sequence[Tensor]], site: Site, penalty: float) -> _Fitted:
    """A regression on tokens of these pairs, in units of each activation's spread, put back into the model's own."""
    sides = [[_spread(pair[side]) for pair in pairs] for side in (0, 1)]
    rows = torch.cat([x for side in sides for x in side])
    labels = torch.cat([torch.full((len(x),), 1.0 - side) for side in (0, 1) for x in sides[side]])
    mean, deviation = rows.mean(0), rows.std(0).clamp_min(1e-12)
    weight, bias = logistic((rows - mean) / deviation, labels, penalty)
    weight = weight / deviation
    if not weight.any():
        raise TrimtabError(f"layer {site.layer}: both sides of the pairs read alike there")
    return _Fitted(site, weight, float(bias - weight @ mean))


def _spread(x: Tensor) -> Tensor:
    """`TOKENS` of these rows at most, evenly."""
    step = max(1, math.ceil(len(x) / TOKENS))
    return x[::step]


def _curve(fitted: _Fitted, activations: Sequence[Sequence[Tensor]], which: Sequence[int]) -> Curve:
    return roc(*(fitted.scores([activations[i][side] for i in which]) for side in (0, 1)))
