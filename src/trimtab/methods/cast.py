"""Conditional activation steering (CAST): Lee et al., "Programming Refusal with Conditional Activation Steering",
ICLR 2025, arXiv 2409.05907, section 3.

    if f(h_c(prompt)) > theta:        c, theta and f's direction learned from prompts that should open it, and others
        h_l[t] <- h_l[t] + strength * v[l]        every token, at the behaviour's layers
    v[l] = first principal component of contrasting answers, each less its pair's mean

Both are learned and used at blocks' outputs here. The released code (github.com/IBM/activation-steering) learns them at
the output of block l, and checks and adds them at its *input*, one block earlier; `at="input"` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import digest_of, in_two, naming, pair_texts, read_each, read_pooled
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import mean_difference, pca, unit
from trimtab.learn.inputs import check_lm, pairs_for
from trimtab.learn.thresholds import Choice, learn_threshold
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering, Threshold
from trimtab.steering.gates import MEASURES, POOLS, Gate, Reading
from trimtab.text.chat import Prompt
from trimtab.text.pairs import Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress

At = Literal["output", "input"]
AT = ("output", "input")
ENOUGH = 3
"""So many layers below the behaviour are enough to choose the condition's from. The first one alone tells less: on
SmolLM2-135M-Instruct a condition on harmful requests opens for 22 of 100 safe ones there, and for 13 at the best."""


@dataclass(frozen=True)
class Condition:
    """A learned gate, and for a card: where it reads, the curve of its thresholds, and the chosen one."""

    gate: Gate
    measured: dict[str, Any]


@keywords
def learn_condition(
    lm: LM,
    when: Sequence[Prompt],
    unless: Sequence[Prompt],
    layers: int | Sequence[int] | None = None,
    *,
    measure: str = "dot",
    pool: str = "unit-mean",
    positions: Positions | None = None,
    choice: Choice = "f1",
    false_alarms: float | None = None,
    at: At = "output",
    progress: Progress | None = None,
) -> Condition:
    """A gate that opens for prompts like `when` and stays shut for those like `unless`.

    Half of the prompts give the direction at each layer (default: the first half of the blocks), the other half its
    threshold and the choice of the layer: the best by `choice`, then by the area under its curve. The direction is the
    mean difference; for the sign-blind measures `ratio` and `cast` it is the first principal component of both sides
    about their midpoint (the released code's default pairs the prompts, and takes each pair's own midpoint).
    `false_alarms` bounds the share of `unless` that opens the gate. With `at="input"` the gate, its threshold and the
    choice of the layer are about the input of the block at whose output the direction was learned, as released.

    `positions` are all tokens of the prompt unless told otherwise, `measure` and `pool` those of a `Threshold`. A
    signed measure of tokens scaled to length 1 is the default, since the paper's (`cast` of `mean`) can't tell a
    direction from its opposite, and follows the few largest activations, and with them a prompt's length.

    Gates combine: `a.gate | ~b.gate`. Raises `TrimtabError` for too few prompts, unknown layers and options, or sides
    that don't differ.
    """
    check_lm(lm)
    if measure not in MEASURES or measure == "probability" or pool not in POOLS:
        raise TrimtabError(f"a condition's measure is one of dot, cosine, ratio, cast, pooled by {', '.join(POOLS)}")
    fit_on, held_on = in_two(when, "prompts on which to act")
    fit_off, held_off = in_two(unless, "prompts on which not to")
    chosen = check_layers(lm, range((lm.layout.layers + 1) // 2) if layers is None else layers, 0.5)
    kind = _kind(at)
    readings = [Reading(Site(layer, kind), positions or Positions.all(), pool) for layer in chosen]
    learned = [replace(reading, site=Site(reading.site.layer)) for reading in readings]
    on, off = read_pooled(lm, fit_on, learned, progress=progress), read_pooled(lm, fit_off, learned)
    test_on, test_off = read_pooled(lm, held_on, readings), read_pooled(lm, held_off, readings)
    candidates = []
    for reading, source in zip(readings, learned, strict=True):
        direction = _condition(on[source], off[source], measure, reading.site.layer).float()
        probe = Threshold(reading.site, direction, 0.0, measure, positions=reading.positions, pool=pool)
        scores = [[probe.value(x) for x in side[reading]] for side in (test_on, test_off)]
        # the sign-blind measures don't say which side is the larger
        turned = measure in ("ratio", "cast") and sum(scores[0]) / len(held_on) < sum(scores[1]) / len(held_off)
        if turned:
            scores = [[-score for score in side] for side in scores]
        point, curve = learn_threshold(scores[0], scores[1], by=choice)
        if false_alarms is not None:
            point = curve.chosen(choice, false_alarms)
        worth = _worth(
            point.hits * len(held_on), point.false_alarms * len(held_off), len(held_on), len(held_off), choice
        )
        line = -point.threshold if turned else point.threshold
        gate = Threshold(reading.site, direction, line, measure, positions=reading.positions, pool=pool)
        card = {"layer": reading.site.layer, "below": turned, **curve.for_card(point)}
        candidates.append((round(worth, 12), curve.area, ~gate if turned else gate, card))
    best = max(candidates, key=lambda candidate: candidate[:2])
    return Condition(best[2], best[3])


@keywords
def learn_cast(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    when: Sequence[Prompt] | None = None,
    unless: Sequence[Prompt] | None = None,
    coefficient: float = 0.2,
    behaviour: Literal["pca", "mean"] = "pca",
    measure: str = "dot",
    pool: str = "unit-mean",
    choice: Choice = "f1",
    condition_layer: int | None = None,
    at: At = "output",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """A behaviour learned from pairs of answers, on prompts like `when` and not on those like `unless`.

    The behaviour's direction at each layer (default: from 0.3 to 0.5 of the depth) is read over all tokens of the
    answers. It has length 1; the edits' strength is `coefficient` times the mean activation's norm there (the paper's
    strengths are in units of the residual stream). The condition is `learn_condition`'s, by default at a layer below
    all of the behaviour's, so that the pass that generates decides it on its way; where there are fewer than three
    such layers, in the first half of the blocks. For several conditions learn them apart, and put them together:
    `behaviour.when(a.gate | b.gate)`, `behaviour.when(a.gate & ~b.gate)`. `at="input"` checks and adds one block
    earlier than it learns, as the released code does.

    Raises `TrimtabError` as `learn_condition` does, and for pairs of other shapes.
    """
    pairs = pairs_for(lm, pairs)
    if not when or not unless:
        raise TrimtabError("CAST needs prompts on which to act (when) and others (unless)")
    edits, norms = learn_behaviour(
        lm, pairs, layers, coefficient=coefficient, behaviour=behaviour, at=at, positions=positions, progress=progress
    )
    chosen = [edit.site.layer for edit in edits]
    below = range(min(chosen)) if min(chosen) >= ENOUGH else None
    where = below if condition_layer is None else condition_layer
    condition = learn_condition(lm, when, unless, where, measure=measure, pool=pool, choice=choice, at=at)
    options = {"layers": chosen, "coefficient": coefficient, "behaviour": behaviour, "measure": measure, "pool": pool}
    options |= {} if at == "output" else {"at": at}
    prompts = {"when": len(when), "unless": len(unless)}
    measured = {"pairs": len(pairs), **prompts, "activation_norm": norms, "condition": condition.measured}
    data = digest_of(pairs=[digest(pairs)], when=list(when), unless=list(unless))
    card = Card("cast", lm.identity, data, {**options, "choice": choice}, measured, versions())
    return Steering(edits, card).when(condition.gate)


def learn_behaviour(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    coefficient: float = 0.2,
    behaviour: Literal["pca", "mean"] = "pca",
    at: At = "output",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> tuple[tuple[Edit, ...], dict[str, float]]:
    """`learn_cast`'s edits without their condition, and by layer the median norm of the activations they were read of.

    Raises `TrimtabError` for an unknown direction or layer, pairs of other shapes, and sides that don't differ.
    """
    pairs = pairs_for(lm, pairs)
    if behaviour not in ("pca", "mean"):
        raise TrimtabError(f"unknown behaviour direction {behaviour!r}; known: pca, mean")
    if layers is None:
        count = lm.layout.layers
        layers = range(round(0.3 * count), max(round(0.3 * count) + 1, round(0.5 * count)))
    sites = [Site(layer) for layer in check_layers(lm, layers, 0.4)]
    activations = read_each(lm, pair_texts(lm, pairs, suffix=True), sites, progress=progress)
    edits, norms = [], {}
    for site in sites:
        positive, negative = (torch.stack([pair[m].mean(0) for pair in activations[site]]) for m in (0, 1))
        with naming(f"layer {site.layer}"):
            v = unit((pca if behaviour == "pca" else mean_difference)(positive, negative))
        norm = float(torch.cat([x for pair in activations[site] for x in pair]).norm(dim=-1).median())
        norms[str(site.layer)] = round(norm, 6)
        where = Site(site.layer, _kind(at))
        edits.append(Edit(where, Add(v.float()), positions or Positions.all(), coefficient * norm))
    return tuple(edits), norms


def _kind(at: str) -> str:
    if at not in AT:
        raise TrimtabError(f"a condition and a behaviour act at a block's {' or '.join(AT)}, got {at!r}")
    return "residual" if at == "output" else "block_input"


def _condition(on: Tensor, off: Tensor, measure: str, layer: int) -> Tensor:
    try:
        if measure in ("dot", "cosine"):
            return unit(on.mean(0) - off.mean(0))
        centred = torch.cat([on, off]) - (on.mean(0) + off.mean(0)) / 2
        return torch.linalg.svd(centred, full_matrices=False).Vh[0]
    except TrimtabError:
        raise TrimtabError(f"layer {layer}: prompts of both kinds read alike there") from None


def _worth(hits: float, alarms: float, on: int, off: int, choice: str) -> float:
    return hits / on - alarms / off if choice == "youden" else 2 * hits / (hits + alarms + on)
