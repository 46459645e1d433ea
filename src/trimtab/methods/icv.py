"""In-context vectors (ICV): Liu et al., "In-context Vectors", arXiv 2311.06668, section 3.

D_i = g(y_i) - g(x_i),  g(z) = the last token's hidden states at all layers, concatenated
v = the common direction of the D_i, such as their mean
u' = |u| norm( norm(u) + lambda (1 + max(0, cos(u, -v_l))) norm(v_l) )        u: the output of the MLP of layer l
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import pair_texts, read_activations
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import ESTIMATORS, Estimator, as_estimator, estimate, estimator_name, mean_difference
from trimtab.learn.inputs import pairs_for
from trimtab.steering import AddScaled, Card, Edit, Positions, Site, Steering
from trimtab.text.pairs import Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


KNOWN: dict[str, Any] = {"mean": mean_difference, **ESTIMATORS}


@keywords
def learn_icv(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    scale: float = 0.1,
    estimator: str | Estimator = "mean",
    site: Literal["mlp", "residual"] = "mlp",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn one vector over all layers from demonstrations.

    Args:
        lm: The model.
        pairs: Demonstrations: the negative is a text as it is, the positive as it should be.
        layers: The blocks (default: all).
        scale: The strength of the edits, the paper's lambda.
        estimator: How the vector is computed from all layers together, `[pairs, layers * width]` of each side:
            `"mean"`, another name that `learn_caa` accepts, or a function. `"pca"` is the first principal direction of
            the differences without centering. (The authors' code adds a centered component of arbitrary sign to the
            mean, which has a much larger norm, so its result is approximately the mean; with one demonstration they are
            equal.)
        site: Where to add: the outputs of the MLPs (`"mlp"`, as in the authors' code) or the residual stream
            (`"residual"`, as in their text).
        positions: The tokens at which to add (default: all).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering, with one `AddScaled` per layer that keeps the norm.

    Raises:
        TrimtabError: There are no pairs, other shapes, unknown layers or options, or texts that don't differ.
    """
    pairs = pairs_for(lm, pairs)
    estimator_function = as_estimator(estimator, KNOWN)
    if site not in ("mlp", "residual"):
        raise TrimtabError(f"ICV acts at the sites mlp and residual; got {site}")
    chosen = check_layers(lm, range(lm.layout.layers) if layers is None else layers, 0.5)
    sites = [Site(layer) for layer in chosen]
    activations = read_activations(lm, pair_texts(lm, pairs), sites, progress=progress)
    positive, negative = (
        torch.cat([torch.cat([pair[m] for pair in activations[each_site]]) for each_site in sites], 1) for m in (0, 1)
    )
    vector = estimate(estimator_function, positive, negative).view(len(chosen), -1)  # [layers, width]
    edits = []
    for layer, v in zip(chosen, vector, strict=True):
        norm = float(v.norm())
        if not norm > 0:
            raise TrimtabError(f"layer {layer}: the demonstrations' two sides don't differ there; leave it out")
        operation = AddScaled((v / norm).float(), by="opposed", keep_norm=True)
        edits.append(Edit(Site(layer, site), operation, positions or Positions.all(), scale))
    options = {"layers": chosen, "scale": scale, "estimator": estimator_name(estimator, KNOWN), "site": site}
    card = Card("icv", lm.identity, digest(pairs), options, {"pairs": len(pairs)}, versions())
    return Steering(tuple(edits), card)
