"""SADI: Wang et al., "Semantics-Adaptive Activation Intervention for LLMs via Dynamic Steering Vectors", ICLR 2025,
arXiv 2410.12299.

    s = mean over pairs of (x[positive] - x[negative])     at the last token, for every element of every layer
    M = 1 on the K elements (or whole heads) of the highest score of s, over all layers together
    x <- x + delta * (x * M)                               at the last prompt token

What is added depends on the input: it is the activation's own elements that grow. The score is s's size here (of a
head, the norm of its part of s). The released code (github.com/weixuan-wang123/SADI) does four things otherwise, each
an option: it ranks by s with its sign (`score="signed"`); takes neurons where the activation function puts them out,
before the product with the other half (`site="act_fn"`); overwrites the site in all layers with what a clean pass had
there, so that no layer sees what was done before it (`mode="frozen"`); and multiplies by a strength, `delta + 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from trimtab.engines.transformers.places import query_heads
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, read_batches, versions
from trimtab.learn.inputs import pairs_for
from trimtab.learn.moments import PairMoments
from trimtab.methods.caa import answer_texts
from trimtab.steering import Add, Card, Edit, HoldElements, Operation, Positions, ScaleElements, Site, Steering
from trimtab.text.pairs import Pair, Pairs, digest

if TYPE_CHECKING:
    from trimtab.lm import LM

KINDS = {"heads": "heads", "neurons": "neurons", "act_fn": "act_fn", "hidden": "mlp"}
USUAL = {"heads": 8, "neurons": 100, "act_fn": 100, "hidden": 10}
"""The paper has no default, but takes each task's best: of 1 to 10 heads, 3 to 500 neurons, 1 to 20 elements."""

Score = Literal["norm", "signed", "absolute"]
"""What a head is chosen by: the norm of its mean difference; its mean over the head's elements, as the released code
has it, where elements of opposite signs cancel; or that mean's size. Of one element norm and absolute are the same: its
size, whatever its sign, where the released code takes those that grow most."""


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
    """Learn which heads or elements separate the sides of the pairs, and scale them (default: of all layers).

    The strength of the edits is `delta`: at 1 a chosen element is doubled. With `operation="add"` the mean difference
    is added under the mask, which is the paper's fixed vector to compare with; `delta` is then its multiple.

    `mode="frozen"` is the released code's: at the last prompt token, every one of the `layers` has what an unsteered
    pass had there, scaled under the mask. It is there to compare with; for one layer it is the same. With `neurons` the
    whole product is held then; with `act_fn`, as released, the activation function's output alone, and the product's
    other half still reacts to what was done below. Live, scaling a neuron at the one is scaling it at the other, but
    each ranks by its own differences.

    The released code's is `site="heads"`, `"act_fn"` or `"hidden"`, `score="signed"`, `mode="frozen"`.

    Raises `TrimtabError` for no pairs, an unknown site, score, operation or mode, a K beyond what there is, and a
    frozen mode that is to add or to act at other positions.
    """
    pairs = pairs_for(lm, pairs)
    _check_mode(operation, mode, positions)
    differences = read_differences(lm, pairs, layers, site=site, progress=progress)
    wanted = USUAL.get(site, 1) if k is None else k
    masks = choose(lm, differences, k=wanted, score=score)
    edits = edits_of(differences, masks, delta=delta, operation=operation, mode=mode, positions=positions)
    options = {"site": site, "k": wanted, "delta": delta, "score": score, "operation": operation}
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
    """What `learn_sadi` makes of `read_differences`' and `choose`'s; for several settings of one reading."""
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
        raise TrimtabError("the frozen mode scales, and at the last prompt token alone; leave out the rest, or mode")


def read_differences(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    site: str = "heads",
    progress: Progress | None = None,
) -> dict[Site, Tensor]:
    """The mean difference of the pairs' sides `[width there]` at each layer's site (default: all), float64."""
    pairs = pairs_for(lm, pairs)
    if site not in KINDS:
        raise TrimtabError(f"unknown site {site!r}; sites: {', '.join(KINDS)}")
    if not pairs:
        raise TrimtabError("there are no pairs to learn from")
    chosen = check_layers(lm, range(lm.layout.layers) if layers is None else layers, 0)
    return differences_at(lm, pairs, [Site(layer, KINDS[site]) for layer in chosen], progress=progress)


def differences_at(
    lm: LM, pairs: Sequence[Pair], sites: Sequence[Site], *, progress: Progress | None = None
) -> dict[Site, Tensor]:
    """`read_differences` at any sites, of several kinds in one pass."""
    lm.check_sites(sites)
    moments: dict[Site, PairMoments] = {}
    groups = answer_texts(lm, pairs)
    for batch in read_batches(lm, groups, sites, progress):
        for where in sites:
            values = torch.stack([torch.cat(members) for members in batch.values[where]])  # [pairs, 2, width]
            if not torch.isfinite(values).all():
                raise TrimtabError(f"activations at {where} are not finite; load the model in float32 or bfloat16")
            moments.setdefault(where, PairMoments(values.shape[-1])).add(values[:, 0], values[:, 1])
    return {where: moment.difference for where, moment in moments.items()}


def choose(lm: LM, differences: dict[Site, Tensor], *, k: int, score: Score = "norm") -> dict[Site, Tensor]:
    """Masks `[width there]` of ones and zeros, for the sites where something is among the K of the highest score.

    Heads are chosen whole, elements of other sites one by one; of equal scores the earlier layer's come first. The
    masks can be put to other uses: `Add(mask * direction)` adds where they are.

    Raises `TrimtabError` for an unknown score, or a K that is not between 1 and what there is.
    """
    if score not in get_args(Score):
        raise TrimtabError(f"unknown score {score!r}; scores: {', '.join(get_args(Score))}")
    sites = sorted(differences)
    scores = [_scores(lm, where, differences[where], score) for where in sites]
    together = torch.cat(scores)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(together):
        raise TrimtabError(f"k is a whole number from 1 to {len(together)}, which is all there is, got {k!r}")
    best = torch.zeros(len(together))
    best[torch.sort(together, descending=True, stable=True).indices[:k]] = 1
    masks = {}
    for where, part in zip(sites, best.split([len(site_scores) for site_scores in scores]), strict=True):
        if bool(part.any()):
            masks[where] = part.repeat_interleave(len(differences[where]) // len(part))
    return masks


def _scores(lm: LM, site: Site, difference: Tensor, score: Score) -> Tensor:
    """A score for each head, or for each element."""
    units = difference.view(query_heads(lm.layout) if site.kind == "heads" else len(difference), -1)
    if score == "norm":
        return units.norm(dim=-1)
    return units.mean(-1) if score == "signed" else units.mean(-1).abs()


def _chosen(lm: LM, masks: dict[Site, Tensor]) -> dict[str, list[int]]:
    """The numbers of the heads or elements that were chosen, by layer."""
    by_layer = {}
    for site, mask in masks.items():
        units = mask.view(query_heads(lm.layout), -1)[:, 0] if site.kind == "heads" else mask
        by_layer[str(site.layer)] = units.nonzero().flatten().tolist()
    return by_layer
