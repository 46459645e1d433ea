"""A probe for a monitor: a logistic regression that predicts whether a token belongs to a positive answer.

At each requested layer, a probe is fitted to single tokens of half of the pairs. A quarter of the pairs selects the
layer, and the last quarter measures the probe and sets its threshold. A monitor measures every token and fires at the
first one above the threshold, so an answer's score is its largest value: the threshold is set so that at most a chosen
share of the negative answers has a token above it.
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
from trimtab.learn.activations import pair_texts, read_activations
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.inputs import check_lm, pairs_for
from trimtab.learn.probes import logistic
from trimtab.learn.thresholds import Curve, roc
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering, Threshold
from trimtab.text.answers import ReadAt, as_read_at
from trimtab.text.pairs import Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

MIN_PAIRS = 8
"""The minimum number of pairs, of which two measure the probe."""
TOKENS = 16
"""The maximum number of tokens per answer to fit, evenly spaced, so that long answers don't dominate."""


@dataclass(frozen=True)
class _FittedProbe:
    site: Site
    weight: Tensor
    bias: float

    def scores(self, sides: Sequence[Tensor]) -> list[float]:
        """The largest probability among each answer's tokens."""
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
    """Learn a probe that separates the tokens of positive answers from those of negative ones, with a threshold.

    Args:
        lm: The model.
        pairs: Answers or texts. Every other pair is for fitting; of the rest, one half selects the layer and the other
            half measures the probe.
        layers: The candidate blocks (default: every fourth block from a quarter of the depth on).
        read_at: The tokens of an answer: `"answer"` (all), `"first:K"`, `"after:MARKER"`, `"last"`.
        false_alarms: The maximum share of held-out negative answers with a token above the threshold, 0 to 1.
        penalty: The penalty of the regression, on activations with mean 0 and variance 1.
        progress: `progress(done, total)` counts pairs.

    Returns:
        A steering with one edit, whose gate is the probe: `Monitor.of(name, probe)` measures it at each token. The edit
        adds the probe's unit direction. The card has `area` (under the held-out curve), `threshold`, `hits` and
        `false_alarms`.

    Raises:
        TrimtabError: There are too few pairs, unknown layers, or `false_alarms` is out of range.
    """
    check_lm(lm)
    pairs = pairs_for(lm, pairs)
    if len(pairs) < MIN_PAIRS:
        raise TrimtabError(
            f"a probe needs at least {MIN_PAIRS} pairs, half of them to fit it, and there are {len(pairs)}"
        )
    if isinstance(false_alarms, bool) or not 0 <= false_alarms <= 1:
        raise TrimtabError(f"false_alarms is a share from 0 to 1, got {false_alarms!r}")
    read_at = as_read_at(read_at)
    count = lm.layout.layers
    chosen = check_layers(lm, range(count // 4, count, 4) if layers is None else layers, 0.5)
    sites = [Site(layer) for layer in chosen]
    activations = read_activations(lm, pair_texts(lm, pairs, read_at=read_at), sites, progress=progress)
    held_out = range(1, len(pairs), 2)
    selection_indices, test_indices = held_out[::2], held_out[1::2]
    areas, candidates = {}, []
    for site in sites:
        candidate = _fit([activations[site][i] for i in range(0, len(pairs), 2)], site, penalty)
        area = _curve(candidate, activations[site], selection_indices).area
        areas[str(site.layer)] = round(area, 6)
        candidates.append((area, candidate))
    best = max(candidates, key=lambda each: each[0])[1]
    curve = _curve(best, activations[best.site], test_indices)
    point = curve.best_point("youden", false_alarms)
    threshold = min(max(point.threshold, 0.0), 1.0)
    gate = Threshold(best.site, best.weight.float(), threshold, "probability", bias=best.bias)
    measured = {
        "pairs": len(pairs),
        "layer": best.site.layer,
        "area": round(curve.area, 6),
        "threshold": round(threshold, 9),
        "hits": round(point.hits, 6),
        "false_alarms": round(point.false_alarms, 6),
        "held_out": len(test_indices),
        "areas_by_layer": areas,
    }
    options = {"layers": chosen, "read_at": str(read_at), "false_alarms": false_alarms, "penalty": penalty}
    card = Card("probe", lm.identity, digest(pairs), options, measured, versions())
    unit = (best.weight / best.weight.norm()).float()
    return Steering((Edit(best.site, Add(unit), Positions.all()),), card).when(gate)


def _fit(pairs: Sequence[Sequence[Tensor]], site: Site, penalty: float) -> _FittedProbe:
    """Fit a regression to tokens of these pairs, on standardized activations, and convert it to the original units."""
    sides = [[_spread(pair[side]) for pair in pairs] for side in (0, 1)]
    rows = torch.cat([x for side in sides for x in side])
    labels = torch.cat([torch.full((len(x),), 1.0 - side) for side in (0, 1) for x in sides[side]])
    mean, deviation = rows.mean(0), rows.std(0).clamp_min(1e-12)
    weight, bias = logistic((rows - mean) / deviation, labels, penalty)
    weight = weight / deviation
    if not weight.any():
        raise TrimtabError(f"layer {site.layer}: the two sides of the pairs don't differ there")
    return _FittedProbe(site, weight, float(bias - weight @ mean))


def _spread(x: Tensor) -> Tensor:
    """At most `TOKENS` of these rows, evenly spaced."""
    step = max(1, math.ceil(len(x) / TOKENS))
    return x[::step]


def _curve(fitted: _FittedProbe, activations: Sequence[Sequence[Tensor]], which: Sequence[int]) -> Curve:
    return roc(*(fitted.scores([activations[i][side] for i in which]) for side in (0, 1)))
