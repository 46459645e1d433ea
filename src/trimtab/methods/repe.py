"""Representation engineering (RepE, LAT): Zou et al., "Representation Engineering", arXiv 2310.01405, sections 3 and 4.

v[l] = first principal component of the pairs' members, each less its pair's mean; its sign by majority
h_l[t] <- h_l[t] + c * v[l]        at some middle layers, every token      (or c * sign(h.v) v)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords, outside
from trimtab.learn.activations import naming, pair_texts, read_each
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import (
    ESTIMATORS,
    Estimator,
    as_estimator,
    estimate,
    estimator_name,
    mean_difference,
    random_order,
    unit,
)
from trimtab.learn.inputs import pairs_for
from trimtab.steering import Add, AddScaled, Card, Edit, Positions, Site, Steering
from trimtab.text.answers import LAST, ReadAt, as_read_at
from trimtab.text.pairs import Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


Control = Literal["add", "sign"]
APART = 0.5
"""Below this cosine to the mean difference, a principal component has found something else than what the pairs have in
common: a noisier direction (with weak contrasts it does)."""


class ReaderWarning(UserWarning):
    """A reader's direction is far from what the pairs differ in on the mean."""


@keywords
def learn_repe(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    reader: str | Estimator = "pca",
    read_at: str | ReadAt = "last",
    coefficient: float = 1.0,
    control: Control = "add",
    keep_norm: bool = False,
    positions: Positions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Steering:
    """A unit direction for each layer (default: the middle third), added at every token.

    The paper's coefficient is in units of the residual stream, which differ from layer to layer and model to model;
    here it is a share of the mean activation's norm there (the edit's strength is their product). `control="sign"`
    adds along what the activation already has of the direction, whichever way.

    An answer is read at its last token, or at `read_at` as `learn_caa` has it: then it counts by its mean there.

    `reader` is `"pca"`, `"random-order"` (PCA of differences in random order, drawn from `seed`), `"cluster-mean"`, the
    name of another estimator, or a function such as `learn_caa` takes; only its direction counts, not its length.

    PCA of the differences themselves is not offered: centring them removes the direction that is sought. The card has
    each layer's cosine to the mean difference. Warns (`ReaderWarning`) where it is below 0.5.

    Raises `TrimtabError` for no pairs, other shapes, unknown layers or options, and sides that don't differ.
    """
    pairs = pairs_for(lm, pairs)
    readers = {"pca": ESTIMATORS["pca"], "random-order": random_order(seed), "cluster-mean": mean_difference}
    readers |= ESTIMATORS
    estimator = as_estimator(reader, readers)
    if control not in ("add", "sign"):
        raise TrimtabError(f"unknown control {control!r}; known: add, sign")
    if layers is None:
        count = lm.layout.layers
        layers = range(count // 3, max(count // 3 + 1, 2 * count // 3))
    chosen = check_layers(lm, layers, 0.5)
    sites = [Site(layer) for layer in chosen]
    at = as_read_at(read_at)
    activations = read_each(lm, pair_texts(lm, pairs, read_at=at), sites, pooled=True, progress=progress)
    edits, cosines, norms = [], {}, {}
    for site in sites:
        positive = torch.cat([plus for plus, _ in activations[site]])
        negative = torch.cat([minus for _, minus in activations[site]])
        with naming(f"layer {site.layer}"):
            v = unit(estimate(estimator, positive, negative))
            cosines[str(site.layer)] = round(float(v @ unit(mean_difference(positive, negative))), 6)
        norm = float(torch.cat([positive, negative]).norm(dim=-1).mean())
        norms[str(site.layer)] = round(norm, 6)
        add = Add(v.float(), keep_norm=keep_norm) if control == "add" else None
        operation = add or AddScaled(v.float(), by="sign", keep_norm=keep_norm)
        edits.append(Edit(site, operation, positions or Positions.all(), coefficient * norm))
    if far := [layer for layer, cosine in cosines.items() if abs(cosine) < APART]:
        warnings.warn(
            f"the direction read by {estimator_name(reader, readers)} at layer {', '.join(far)} is not what the pairs"
            " differ in on the mean; use more pairs, or reader cluster-mean",
            ReaderWarning,
            stacklevel=outside(),
        )
    options: dict[str, Any] = {
        "layers": chosen,
        "reader": estimator_name(reader, readers),
        "control": control,
        "coefficient": coefficient,
        "seed": seed,
    }
    options |= {} if at == LAST else {"read_at": str(at)}  # files that are read by default stay as they were
    measured = {"pairs": len(pairs), "cosine_to_mean_difference": cosines, "activation_norm": norms}
    card = Card("repe", lm.identity, digest(pairs), options, measured, versions())
    return Steering(tuple(edits), card)
