"""SteerMoE: activate or deactivate the experts that a behaviour is routed to (Fayyaz et al., 2025, arXiv 2509.09660).

For each expert e of each layer, over the tokens of the positive and of the negative answers,

    risk difference = (share of positive tokens that are routed to e) - (share of negative tokens that are routed to e)

The experts with the largest one are promoted: before the router chooses, their logits become the largest logit and a
margin. Those with the smallest are demoted below the smallest logit. The others stay, and are chosen among as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.engines.transformers.routers import chosen_experts
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import keywords
from trimtab.learn.activations import pair_texts
from trimtab.learn.contrast import Progress, check_layers, read_batches, versions
from trimtab.learn.inputs import Pairs, pairs_for
from trimtab.steering import Card, Edit, Positions, RouteExperts, Site, Steering
from trimtab.text.answers import ReadAt, as_read_at
from trimtab.text.pairs import digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

SHOWN = 6
"""Digits of a risk difference in the card."""


@keywords
def learn_steermoe(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    promote: int | None = None,
    demote: int | None = None,
    margin: float = 0.01,
    read_at: str | ReadAt = "answer",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn to promote the experts that the positive side is routed to more often, and to demote those of the
    negative side.

    Args:
        lm: A mixture of experts, on the transformers engine.
        pairs: Answers or texts: the positive shows the behaviour, the negative its opposite.
        layers: Where experts may be chosen (default: every layer with a router).
        promote: How many experts are promoted, over all layers (default: as many as there are layers with a router). In
            a layer at most as many as a token is routed to. The paper tunes it for each model and behaviour.
        demote: How many are demoted (default: the same).
        margin: By how much a promoted expert's logit exceeds the largest one, and a demoted one's lies below the
            smallest.
        read_at: At which tokens of an answer routing is counted, as `learn_caa` has it (default: at all).
        positions: At which tokens experts are moved (default: at all).
        progress: `progress(done, total)` counts pairs.

    Returns:
        By layer a `RouteExperts` at the router, of strength 1. Its negative promotes what it demotes. The card has the
        experts' risk differences.

    Raises:
        TrimtabError: No pairs, other shapes, unknown layers, counts that aren't whole numbers from 0 or are both 0, and
            sides that are routed alike.
        UnsupportedError: A model without routers, or one whose routers don't say which experts they choose.
    """
    pairs = pairs_for(lm, pairs)
    sites = _routers(lm, layers)
    wanted = _counts(promote, demote, len(sites))
    at = as_read_at(read_at)
    texts = pair_texts(lm, pairs, read_at=at)
    used = {site: [torch.zeros(0), torch.zeros(0)] for site in sites}
    tokens, most = [0, 0], dict.fromkeys(sites, 0)
    for batch in read_batches(lm, texts, sites, progress):
        for site in sites:
            for group in batch.values[site]:
                for side, logits in enumerate(group):
                    chosen = chosen_experts(lm.layout, site.layer, logits)  # type: ignore[arg-type]
                    counts = chosen.double().sum(0)
                    used[site][side] = counts if not len(used[site][side]) else used[site][side] + counts
                    most[site] = int(chosen.sum(1).max())
                    tokens[side] += len(logits) if site == sites[0] else 0
    risk = {site: used[site][0] / tokens[0] - used[site][1] / tokens[1] for site in sites}
    promoted, demoted = _choose(risk, most, *wanted)
    if not promoted and not demoted:
        raise TrimtabError("the two sides are routed to the same experts equally often; there is nothing to learn")
    edits = []
    for site in sites:
        up, down = (tuple(e for where, e in those if where == site) for those in (promoted, demoted))
        if up or down:
            operation = RouteExperts.of(len(risk[site]), up, down, margin=margin)
            edits.append(Edit(site, operation, positions or Positions.all()))
    options: dict[str, Any] = {
        "layers": [site.layer for site in sites],
        "promote": wanted[0],
        "demote": wanted[1],
        "margin": margin,
        "read_at": str(at),
    }
    options |= {} if positions is None else {"positions": str(positions)}
    differences = {f"{site.layer}.{e}": round(float(risk[site][e]), SHOWN) for site, e in (*promoted, *demoted)}
    measured = {"pairs": len(pairs), "tokens": tokens, "risk_difference": differences}
    return Steering(tuple(edits), Card("steermoe", lm.identity, digest(pairs), options, measured, versions()))


def _routers(lm: LM, layers: int | Sequence[int] | None) -> list[Site]:
    """The routers of these layers, or all that there are."""
    if layers is not None:
        sites = [Site.router(layer) for layer in check_layers(lm, layers, 0.5)]
        lm.check_sites(sites)
        return sites
    routers, reason = [], ""
    for layer in range(lm.layout.layers):
        try:
            lm.check_sites([Site.router(layer)])
            routers.append(Site.router(layer))
        except UnsupportedError as error:
            reason = str(error)
    if not routers:
        raise UnsupportedError(f"{lm.name} has no layer whose experts can be steered: {reason}")
    return routers


def _counts(promote: int | None, demote: int | None, usual: int) -> tuple[int, int]:
    both = [usual if count is None else count for count in (promote, demote)]
    for name, count in zip(("promote", "demote"), both, strict=True):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise TrimtabError(f"{name} is a number of experts, 0 or more, got {count!r}")
    if not any(both):
        raise TrimtabError("promote and demote are both 0, so no expert would be moved")
    return both[0], both[1]


def _choose(
    risk: dict[Site, Tensor], most: dict[Site, int], promote: int, demote: int
) -> tuple[list[tuple[Site, int]], list[tuple[Site, int]]]:
    """The experts with the largest risk differences, at most `most` in a layer, and those with the smallest."""
    every = [(site, e) for site in risk for e in range(len(risk[site]))]
    size = {expert: float(risk[expert[0]][expert[1]]) for expert in every}
    promoted: list[tuple[Site, int]] = []
    for expert in sorted(every, key=lambda expert: (-size[expert], expert)):
        here = sum(site == expert[0] for site, _ in promoted)
        if len(promoted) < promote and size[expert] > 0 and here < most[expert[0]]:
            promoted.append(expert)
    fallen = [expert for expert in sorted(every, key=lambda expert: (size[expert], expert)) if size[expert] < 0]
    return promoted, fallen[:demote]
