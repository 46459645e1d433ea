"""Conditional activation steering (CAST): Lee et al., "Programming Refusal with Conditional Activation Steering",
ICLR 2025, arXiv 2409.05907, section 3.

    if f(h_c(prompt)) > theta:        c, theta and f's direction learned from prompts that should open it, and others
        h_l[t] <- h_l[t] + strength * v[l]        every token, at the behaviour's layers
    v[l] = first principal component of contrasting answers, each minus its pair's mean

Here, both the condition and the behaviour are learned and applied at the outputs of blocks. The released code
(github.com/IBM/activation-steering) learns them at the output of block l, but applies them at its *input*, one block
earlier; `at="input"` does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import (
    digest_of,
    error_prefix,
    pair_texts,
    read_activations,
    read_pooled,
    split_alternating,
)
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
AT_CHOICES = ("output", "input")
MIN_LOWER_LAYERS = 3
"""The condition's layer is chosen among those below the behaviour if there are at least this many. The first layer
alone separates worse: on SmolLM2-135M-Instruct, a condition on harmful requests opens for 22 of 100 safe ones there,
and for 13 at the best layer."""


@dataclass(frozen=True)
class Condition:
    """A learned gate, and its entries for a card: the layer, the ROC curve, and the chosen threshold."""

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
    """Learn a gate that opens for prompts like `when` and stays closed for prompts like `unless`.

    Half of the prompts determine the direction at each layer, the other half its threshold and the layer: the best one
    by `choice`, with ties broken by the area under the curve. The direction is the mean difference. For the measures
    `ratio` and `cast`, which ignore the sign, it is the first principal component of both sides around their midpoint
    (the released code pairs the prompts by default, and uses each pair's midpoint).

    The default is a signed measure on tokens scaled to norm 1. The paper's (`cast` with `mean`) can't distinguish a
    direction from its opposite, and depends mostly on the few largest activations, and so on the prompt's length.

    Gates combine: `a.gate | ~b.gate`.

    Args:
        lm: The model.
        when: Prompts for which the gate should open.
        unless: Prompts for which it should stay closed.
        layers: The candidate blocks for the condition (default: the first half of the blocks).
        measure: The measure, as in `Threshold`, except `"probability"`.
        pool: The pooling over tokens, as in `Threshold`.
        positions: The tokens of the prompt to read (default: all).
        choice: How the threshold is chosen: `"f1"`, `"youden"` or `"midpoint"` (see `trimtab.learn.thresholds`).
        false_alarms: The maximum share of `unless` that may open the gate.
        at: `"output"`, or `"input"`: then the gate reads the input of the block at whose output the direction was
            learned, as in the released code. The threshold and the layer are chosen at the input too.
        progress: `progress(done, total)`.

    Returns:
        The gate, and its entries for a card.

    Raises:
        TrimtabError: There are too few prompts, unknown layers or options, or sides that don't differ.
    """
    check_lm(lm)
    if measure not in MEASURES or measure == "probability" or pool not in POOLS:
        raise TrimtabError(f"a condition's measure is one of dot, cosine, ratio, cast, pooled by {', '.join(POOLS)}")
    fit_on, held_out_on = split_alternating(when, "prompts on which to act")
    fit_off, held_out_off = split_alternating(unless, "prompts on which not to")
    chosen = check_layers(lm, range((lm.layout.layers + 1) // 2) if layers is None else layers, 0.5)
    kind = _kind(at)
    readings = [Reading(Site(layer, kind), positions or Positions.all(), pool) for layer in chosen]
    learned_readings = [replace(reading, site=Site(reading.site.layer)) for reading in readings]
    on, off = read_pooled(lm, fit_on, learned_readings, progress=progress), read_pooled(lm, fit_off, learned_readings)
    test_on, test_off = read_pooled(lm, held_out_on, readings), read_pooled(lm, held_out_off, readings)
    candidates = []
    for reading, source in zip(readings, learned_readings, strict=True):
        direction = _condition_direction(on[source], off[source], measure, reading.site.layer).float()
        probe = Threshold(reading.site, direction, 0.0, measure, positions=reading.positions, pool=pool)
        scores = [[probe.value(x) for x in side[reading]] for side in (test_on, test_off)]
        # with ratio and cast, either side may have the larger scores
        inverted = measure in ("ratio", "cast") and sum(scores[0]) / len(held_out_on) < sum(scores[1]) / len(
            held_out_off
        )
        if inverted:
            scores = [[-score for score in side] for side in scores]
        point, curve = learn_threshold(scores[0], scores[1], by=choice)
        if false_alarms is not None:
            point = curve.best_point(choice, false_alarms)
        choice_score = _choice_score(
            point.hits * len(held_out_on),
            point.false_alarms * len(held_out_off),
            len(held_out_on),
            len(held_out_off),
            choice,
        )
        gate_threshold = -point.threshold if inverted else point.threshold
        gate = Threshold(reading.site, direction, gate_threshold, measure, positions=reading.positions, pool=pool)
        card_entries = {"layer": reading.site.layer, "below": inverted, **curve.for_card(point)}
        candidates.append((round(choice_score, 12), curve.area, ~gate if inverted else gate, card_entries))
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
    """Learn a behaviour from pairs of answers that acts on prompts like `when`, and not on prompts like `unless`.

    The behaviour's direction at each layer is read over all tokens of the answers. It has norm 1, and the edits'
    strength is `coefficient` times the median norm of the activations there (the paper's strengths are in units of the
    residual stream). The condition is learned by `learn_condition`.

    For several conditions, learn each one separately and combine them: `behaviour.when(a.gate | b.gate)`,
    `behaviour.when(a.gate & ~b.gate)`.

    Args:
        lm: The model.
        pairs: Answers or texts that differ in the behaviour.
        layers: Blocks to steer after (default: from 0.3 to 0.5 of the depth).
        when: Prompts on which the behaviour should act.
        unless: Prompts on which it should not act.
        coefficient: The relative norm of the edits.
        behaviour: The behaviour's direction: `"pca"` (the paper's) or `"mean"`.
        measure: The condition's measure, as in `Threshold`.
        pool: The condition's pooling, as in `Threshold`.
        choice: How the condition's threshold is chosen, as in `learn_condition`.
        condition_layer: The condition's layer. By default the best one below all layers of the behaviour, so that the
            prefill itself decides the gate; if there are fewer than three of these, the best one in the first half of
            the blocks.
        at: `"output"`, or `"input"`: read the condition and add one block earlier than learned, as in the released
            code.
        positions: The tokens at which to add (default: all).
        progress: `progress(done, total)`.

    Returns:
        The steering. Its card has the condition's curve.

    Raises:
        TrimtabError: As in `learn_condition`, or for pairs of other shapes.
    """
    pairs = pairs_for(lm, pairs)
    if not when or not unless:
        raise TrimtabError("CAST needs prompts on which to act (when) and others (unless)")
    edits, norms = learn_behaviour(
        lm, pairs, layers, coefficient=coefficient, behaviour=behaviour, at=at, positions=positions, progress=progress
    )
    chosen = [edit.site.layer for edit in edits]
    lower_layers = range(min(chosen)) if min(chosen) >= MIN_LOWER_LAYERS else None
    condition_layers = lower_layers if condition_layer is None else condition_layer
    condition = learn_condition(lm, when, unless, condition_layers, measure=measure, pool=pool, choice=choice, at=at)
    options = {"layers": chosen, "coefficient": coefficient, "behaviour": behaviour, "measure": measure, "pool": pool}
    options |= {} if at == "output" else {"at": at}
    prompt_counts = {"when": len(when), "unless": len(unless)}
    measured = {"pairs": len(pairs), **prompt_counts, "activation_norm": norms, "condition": condition.measured}
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
    """The edits of `learn_cast` without the condition, and the median norm of the activations at each layer.

    Raises `TrimtabError` for an unknown direction or layer, pairs of other shapes, or sides that don't differ.
    """
    pairs = pairs_for(lm, pairs)
    if behaviour not in ("pca", "mean"):
        raise TrimtabError(f"unknown behaviour direction {behaviour!r}; known: pca, mean")
    if layers is None:
        count = lm.layout.layers
        layers = range(round(0.3 * count), max(round(0.3 * count) + 1, round(0.5 * count)))
    sites = [Site(layer) for layer in check_layers(lm, layers, 0.4)]
    activations = read_activations(lm, pair_texts(lm, pairs, suffix=True), sites, progress=progress)
    edits, norms = [], {}
    for site in sites:
        positive, negative = (torch.stack([pair[m].mean(0) for pair in activations[site]]) for m in (0, 1))
        with error_prefix(f"layer {site.layer}"):
            v = unit((pca if behaviour == "pca" else mean_difference)(positive, negative))
        norm = float(torch.cat([x for pair in activations[site] for x in pair]).norm(dim=-1).median())
        norms[str(site.layer)] = round(norm, 6)
        edit_site = Site(site.layer, _kind(at))
        edits.append(Edit(edit_site, Add(v.float()), positions or Positions.all(), coefficient * norm))
    return tuple(edits), norms


def _kind(at: str) -> str:
    if at not in AT_CHOICES:
        raise TrimtabError(f"a condition and a behaviour act at a block's {' or '.join(AT_CHOICES)}, got {at!r}")
    return "residual" if at == "output" else "block_input"


def _condition_direction(on: Tensor, off: Tensor, measure: str, layer: int) -> Tensor:
    try:
        if measure in ("dot", "cosine"):
            return unit(on.mean(0) - off.mean(0))
        centred = torch.cat([on, off]) - (on.mean(0) + off.mean(0)) / 2
        return torch.linalg.svd(centred, full_matrices=False).Vh[0]
    except TrimtabError:
        raise TrimtabError(f"layer {layer}: the two kinds of prompts don't differ there") from None


def _choice_score(hits: float, alarms: float, on: int, off: int, choice: str) -> float:
    return hits / on - alarms / off if choice == "youden" else 2 * hits / (hits + alarms + on)
