"""SADI: Wang et al., "Semantics-Adaptive Activation Intervention for LLMs via Dynamic Steering Vectors", ICLR 2025,
arXiv 2410.12299.

    s = mean over pairs of (x[positive] - x[negative])     at the last token, for every element of every layer
    M = 1 for the K elements (or whole heads) with the highest score of s, over all layers together
    x <- x + delta * (x * M)                               at the last prompt token

The change depends on the input, since the activation's own elements are scaled. The score here is the absolute value of
s (for a head, the norm of its part of s). The released code (github.com/weixuan-wang123/SADI) differs in four ways,
each available as an option: it ranks by s with its sign (`score="signed"`); it takes neurons at the output of the
activation function, before the product with the other half (`site="act_fn"`); it overwrites the site in all layers with
scaled activations of an unsteered pass, so that no layer sees the changes of earlier ones (`mode="frozen"`); and it
multiplies by a strength, `delta + 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from trimtab.engines.contract import query_heads
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, read_batches, versions
from trimtab.learn.inputs import pairs_for
from trimtab.learn.moments import PairMoments
from trimtab.methods.caa import answer_texts
from trimtab.steering import Add, Card, Edit, HoldElements, Operation, Positions, ScaleElements, Site, Steering
from trimtab.steering.tensors import check_finite
from trimtab.text.pairs import Pair, Pairs, digest

if TYPE_CHECKING:
    from trimtab.lm import LM

SITE_KINDS = {"heads": "heads", "neurons": "neurons", "act_fn": "act_fn", "hidden": "mlp"}
DEFAULT_COUNTS = {"heads": 8, "neurons": 100, "act_fn": 100, "hidden": 10}
"""Our defaults. The paper takes the best value per task: of 1 to 10 heads, 3 to 500 neurons, 1 to 20 elements."""

Score = Literal["norm", "signed", "absolute"]
"""The score of a head: the norm of its mean difference; the mean over its elements, as in the released code, in which
elements of opposite signs cancel; or that mean's absolute value. For single elements, norm and absolute are both the
absolute value, while the released code takes the elements with the largest signed value."""


@keywords
def learn_sadi(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    site: str = "heads",
    k: int | None = None,
    delta: float = 1.0,
    score: Score = "norm",
    operation: str = "scale",
    mode: str = "live",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn which heads or elements separate the sides of the pairs, to scale them at the last prompt token.

    The settings of the released code are `site="heads"`, `"act_fn"` or `"hidden"`, `score="signed"`, `mode="frozen"`.

    Args:
        lm: The model.
        pairs: Right and wrong answers, or texts.
        layers: The candidate blocks (default: all).
        site: `"heads"` (whole heads), `"neurons"`, `"act_fn"` (neurons at the output of the activation function), or
            `"hidden"` (elements of the MLP's output). In live mode, scaling a neuron is the same at `"neurons"` and
            `"act_fn"`, but each ranks neurons by its own differences.
        k: The number of heads or elements to choose, over all layers (default: 8 heads, 100 neurons or 10 elements).
        delta: The strength of the edits. With 1, a chosen element is doubled.
        score: The score of a head or element; see `Score`.
        operation: `"scale"`, or `"add"`: add `delta` times the mean difference under the mask, which is the paper's
            baseline of a fixed vector.
        mode: `"live"`, or `"frozen"` as in the released code, for comparison: at the last prompt token, each of the
            `layers` gets the activation of an unsteered pass, scaled under the mask. For a single layer, both are the
            same. With `"neurons"` this freezes the whole product; with `"act_fn"` only the output of the activation
            function, so that the product's other half still depends on the edits at lower layers.
        positions: The tokens at which to act (default: the last prompt token).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering. Its card has the chosen heads or elements by layer.

    Raises:
        TrimtabError: There are no pairs, an unknown site, score, operation or mode, fewer heads or elements than `k`,
            or a frozen mode with `"add"` or other positions.
        UnsupportedError: The site can't be read on this engine, or the number of heads isn't known.
    """
    pairs = pairs_for(lm, pairs)
    _check_mode(operation, mode, positions)
    differences = read_differences(lm, pairs, layers, site=site, progress=progress)
    count = DEFAULT_COUNTS.get(site, 1) if k is None else k
    masks = choose(lm, differences, k=count, score=score)
    edits = edits_of(differences, masks, delta=delta, operation=operation, mode=mode, positions=positions)
    options = {"site": site, "k": count, "delta": delta, "score": score, "operation": operation}
    options |= {} if mode == "live" else {"mode": mode}
    measured = {"pairs": len(pairs), "chosen": _chosen(lm, masks)}
    card = Card("sadi", lm.identity, digest(pairs), options, measured, versions())
    return Steering(edits, card)


def edits_of(
    differences: dict[Site, Tensor],
    masks: dict[Site, Tensor],
    *,
    delta: float = 1.0,
    operation: str = "scale",
    mode: str = "live",
    positions: Positions | None = None,
) -> tuple[Edit, ...]:
    """The edits of `learn_sadi` from the results of `read_differences` and `choose`, to try several settings."""
    _check_mode(operation, mode, positions)
    where = positions or Positions.last_prompt_token()
    if mode == "frozen":
        held = {site: masks.get(site, torch.zeros(len(difference))) for site, difference in differences.items()}
        return tuple(Edit(site, HoldElements(mask), where, delta) for site, mask in sorted(held.items()))
    edits = []
    for site, mask in masks.items():
        what: Operation = ScaleElements(mask) if operation == "scale" else Add(mask * differences[site].float())
        edits.append(Edit(site, what, where, delta))
    return tuple(edits)


def _check_mode(operation: str, mode: str, positions: Positions | None) -> None:
    if operation not in ("scale", "add"):
        raise TrimtabError(f"unknown operation {operation!r}; known: scale, add")
    if mode not in ("live", "frozen"):
        raise TrimtabError(f"unknown mode {mode!r}; known: live, frozen")
    if mode == "frozen" and (operation != "scale" or positions not in (None, Positions.last_prompt_token())):
        raise TrimtabError(
            "the frozen mode only scales, and only at the last prompt token; leave out the other options, or mode"
        )


def read_differences(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    site: str = "heads",
    progress: Progress | None = None,
) -> dict[Site, Tensor]:
    """The mean difference of the pairs' sides, `[width of the site]`, at each layer (default: all), float64."""
    pairs = pairs_for(lm, pairs)
    if site not in SITE_KINDS:
        raise TrimtabError(f"unknown site {site!r}; sites: {', '.join(SITE_KINDS)}")
    if not pairs:
        raise TrimtabError("there are no pairs to learn from")
    chosen = check_layers(lm, range(lm.layout.layers) if layers is None else layers, 0)
    return differences_at(lm, pairs, [Site(layer, SITE_KINDS[site]) for layer in chosen], progress=progress)


def differences_at(
    lm: LM, pairs: Sequence[Pair], sites: Sequence[Site], *, progress: Progress | None = None
) -> dict[Site, Tensor]:
    """Like `read_differences`, at any sites, also of different kinds, in one pass."""
    lm.check_sites(sites)
    if any(where.kind == "heads" for where in sites):
        query_heads(lm.layout)  # raises before anything is read
    moments: dict[Site, PairMoments] = {}
    groups = answer_texts(lm, pairs)
    for batch in read_batches(lm, groups, sites, progress):
        for where in sites:
            values = torch.stack([torch.cat(members) for members in batch.values[where]])  # [pairs, 2, width]
            check_finite(values, where)
            moments.setdefault(where, PairMoments(values.shape[-1])).add(values[:, 0], values[:, 1])
    return {where: moment.difference for where, moment in moments.items()}


def choose(lm: LM, differences: dict[Site, Tensor], *, k: int, score: Score = "norm") -> dict[Site, Tensor]:
    """Masks `[width of the site]` of ones and zeros, for the sites that have some of the K highest scores.

    Heads are chosen whole, elements of other sites individually. With equal scores, lower layers come first. The masks
    have other uses too: `Add(mask * direction)` adds only the chosen elements.

    Raises `TrimtabError` for an unknown score, or a K that isn't between 1 and the number of candidates.
    """
    if score not in get_args(Score):
        raise TrimtabError(f"unknown score {score!r}; scores: {', '.join(get_args(Score))}")
    sites = sorted(differences)
    scores = [_scores(lm, site, differences[site], score) for site in sites]
    all_scores = torch.cat(scores)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(all_scores):
        raise TrimtabError(f"k is a whole number from 1 to {len(all_scores)} (all elements), got {k!r}")
    best = torch.zeros(len(all_scores))
    best[torch.sort(all_scores, descending=True, stable=True).indices[:k]] = 1
    masks = {}
    for where, part in zip(sites, best.split([len(site_scores) for site_scores in scores]), strict=True):
        if bool(part.any()):
            masks[where] = part.repeat_interleave(len(differences[where]) // len(part))
    return masks


def _scores(lm: LM, site: Site, difference: Tensor, score: Score) -> Tensor:
    """The score of each head, or of each element."""
    units = difference.view(query_heads(lm.layout) if site.kind == "heads" else len(difference), -1)
    if score == "norm":
        return units.norm(dim=-1)
    return units.mean(-1) if score == "signed" else units.mean(-1).abs()


def _chosen(lm: LM, masks: dict[Site, Tensor]) -> dict[str, list[int]]:
    """The indices of the chosen heads or elements, by layer."""
    by_layer = {}
    for site, mask in masks.items():
        units = mask.view(query_heads(lm.layout), -1)[:, 0] if site.kind == "heads" else mask
        by_layer[str(site.layer)] = units.nonzero().flatten().tolist()
    return by_layer
