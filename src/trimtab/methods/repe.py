"""Representation engineering (RepE, LAT): Zou et al., "Representation Engineering", arXiv 2310.01405, sections 3 and 4.

v[l] = first principal component of the pairs' members, each minus its pair's mean; the sign by majority vote
h_l[t] <- h_l[t] + c * v[l]        at some middle layers, every token      (or c * sign(h.v) v)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel, keywords
from trimtab.learn.activations import error_prefix, pair_texts, read_activations
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
MIN_COSINE = 0.5
"""If a principal component's cosine with the mean difference is below this, it isn't the pairs' common direction but a
noisier one (which happens with weak contrasts)."""


class ReaderWarning(UserWarning):
    """A reader's direction is far from the mean difference of the pairs."""


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
    """Learn a unit direction for each layer, to add at every token.

    PCA of the differences themselves isn't offered, since centering them removes the wanted direction.

    Args:
        lm: The model.
        pairs: Answers or texts.
        layers: Blocks to read and to steer after (default: the middle third).
        reader: How the direction is computed: `"pca"`, `"random-order"` (PCA of differences in random order),
            `"cluster-mean"`, the name of another estimator, or a function as in `learn_caa`. Only the direction of its
            result matters, not the norm.
        read_at: Where an answer is read, as in `learn_caa` (default: the last token). Several tokens count by their
            mean.
        coefficient: The relative norm of the edits: their strength is this times the mean norm of the activations at
            the layer. The paper's coefficient is in units of the residual stream, which differ between layers and
            models.
        control: `"add"`, or `"sign"`: add along the sign of the activation's projection on the direction.
        keep_norm: Whether to keep each activation's norm.
        positions: The tokens at which to add (default: all).
        seed: The seed of `"random-order"`.
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering. Its card has each layer's cosine with the mean difference.

    Raises:
        TrimtabError: There are no pairs, other shapes, unknown layers or options, or sides that don't differ.

    Warns:
        ReaderWarning: A layer's cosine with the mean difference is below 0.5.
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
    checked_read_at = as_read_at(read_at)
    activations = read_activations(
        lm, pair_texts(lm, pairs, read_at=checked_read_at), sites, pooled=True, progress=progress
    )
    edits, cosines, norms = [], {}, {}
    for site in sites:
        positive = torch.cat([plus for plus, _ in activations[site]])
        negative = torch.cat([minus for _, minus in activations[site]])
        with error_prefix(f"layer {site.layer}"):
            v = unit(estimate(estimator, positive, negative))
            cosines[str(site.layer)] = round(float(v @ unit(mean_difference(positive, negative))), 6)
        norm = float(torch.cat([positive, negative]).norm(dim=-1).mean())
        norms[str(site.layer)] = round(norm, 6)
        add = Add(v.float(), keep_norm=keep_norm) if control == "add" else None
        operation = add or AddScaled(v.float(), by="sign", keep_norm=keep_norm)
        edits.append(Edit(site, operation, positions or Positions.all(), coefficient * norm))
    if far := [layer for layer, cosine in cosines.items() if abs(cosine) < MIN_COSINE]:
        warnings.warn(
            f"the direction read by {estimator_name(reader, readers)} at layer {', '.join(far)} isn't the pairs' mean"
            " difference; use more pairs, or reader cluster-mean",
            ReaderWarning,
            stacklevel=caller_stacklevel(),
        )
    options: dict[str, Any] = {
        "layers": chosen,
        "reader": estimator_name(reader, readers),
        "control": control,
        "coefficient": coefficient,
        "seed": seed,
    }
    options |= (
        {} if checked_read_at == LAST else {"read_at": str(checked_read_at)}
    )  # so that the files of the default don't change
    measured = {"pairs": len(pairs), "cosine_to_mean_difference": cosines, "activation_norm": norms}
    card = Card("repe", lm.identity, digest(pairs), options, measured, versions())
    return Steering(tuple(edits), card)
