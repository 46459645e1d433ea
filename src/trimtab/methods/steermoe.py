"""SteerMoE: activate or deactivate the experts that a behaviour is routed to (Fayyaz et al., 2025, arXiv 2509.09660).

For each expert e of each layer, over the tokens of the positive and of the negative answers,

    risk difference = (share of positive tokens that are routed to e) - (share of negative tokens that are routed to e)

The experts with the largest risk difference are promoted: before the router selects experts, their logits are set to
the largest logit plus a margin. Those with the smallest are demoted to the smallest logit minus the margin. The other
experts are selected as before.
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

DIGITS = 6
"""The number of digits of a risk difference in the card."""


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
    """Learn to promote the experts that the positive side is routed to more often, and demote the negative side's.

    Args:
        lm: A mixture of experts, on the transformers engine.
        pairs: Answers or texts: the positive shows the behaviour, the negative its opposite.
        layers: The layers whose experts are candidates (default: every layer with a router).
        promote: The number of experts to promote, over all layers (default: the number of layers with a router). Per
            layer it is limited to the number of experts per token. The paper tunes it for each model and behaviour.
        demote: The number of experts to demote (default: the same).
        margin: The distance of a promoted expert's logit above the largest logit, and of a demoted one's below the
            smallest.
        read_at: The tokens of an answer at which routing is counted, as in `learn_caa` (default: all).
        positions: The tokens at which experts are promoted and demoted (default: all).
        progress: `progress(done, total)` counts pairs.

    Returns:
        One `RouteExperts` per layer at the router, of strength 1. A negative strength swaps promotion and demotion. The
        card has the experts' risk differences.

    Raises:
        TrimtabError: There are no pairs, other shapes, unknown layers, counts that are negative, not integers or both
            0, or sides that are routed alike.
        UnsupportedError: The model has no routers, or its routers' selection can't be read, on this engine or at
            all.
    """
    pairs = pairs_for(lm, pairs, "modules")
    sites = _routers(lm, layers)
    expert_limits = _counts(promote, demote, len(sites))
    checked_read_at = as_read_at(read_at)
    texts = pair_texts(lm, pairs, read_at=checked_read_at)
    route_counts = {site: [torch.zeros(0), torch.zeros(0)] for site in sites}
    tokens, experts_per_token = [0, 0], dict.fromkeys(sites, 0)
    for batch in read_batches(lm, texts, sites, progress):
        for site in sites:
            for group in batch.values[site]:
                for side, logits in enumerate(group):
                    selected_experts = chosen_experts(lm.layout, site.layer, logits)  # type: ignore[arg-type]
                    counts = selected_experts.double().sum(0)
                    route_counts[site][side] = (
                        counts if not len(route_counts[site][side]) else route_counts[site][side] + counts
                    )
                    experts_per_token[site] = int(selected_experts.sum(1).max())
                    tokens[side] += len(logits) if site == sites[0] else 0
    risk = {site: route_counts[site][0] / tokens[0] - route_counts[site][1] / tokens[1] for site in sites}
    promoted, demoted = _choose(risk, experts_per_token, *expert_limits)
    if not promoted and not demoted:
        raise TrimtabError("the two sides are routed to the same experts equally often; there is nothing to learn")
    edits = []
    for site in sites:
        up, down = (tuple(e for where, e in experts if where == site) for experts in (promoted, demoted))
        if up or down:
            operation = RouteExperts.of(len(risk[site]), up, down, margin=margin)
            edits.append(Edit(site, operation, positions or Positions.all()))
    options: dict[str, Any] = {
        "layers": [site.layer for site in sites],
        "promote": expert_limits[0],
        "demote": expert_limits[1],
        "margin": margin,
        "read_at": str(checked_read_at),
    }
    options |= {} if positions is None else {"positions": str(positions)}
    differences = {f"{site.layer}.{e}": round(float(risk[site][e]), DIGITS) for site, e in (*promoted, *demoted)}
    measured = {"pairs": len(pairs), "tokens": tokens, "risk_difference": differences}
    return Steering(tuple(edits), Card("steermoe", lm.identity, digest(pairs), options, measured, versions()))


def _routers(lm: LM, layers: int | Sequence[int] | None) -> list[Site]:
    """The router sites of these layers, or of all layers that have a router."""
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
    """The experts with the largest risk differences, at most `most` per layer, and those with the smallest."""
    every = [(site, e) for site in risk for e in range(len(risk[site]))]
    size = {expert: float(risk[expert[0]][expert[1]]) for expert in every}
    promoted: list[tuple[Site, int]] = []
    for expert in sorted(every, key=lambda expert: (-size[expert], expert)):
        here = sum(site == expert[0] for site, _ in promoted)
        if len(promoted) < promote and size[expert] > 0 and here < most[expert[0]]:
            promoted.append(expert)
    fallen = [expert for expert in sorted(every, key=lambda expert: (size[expert], expert)) if size[expert] < 0]
    return promoted, fallen[:demote]
