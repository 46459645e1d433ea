"""TDA: Ma et al., "First Activations Matter: Training-Free Methods for Dynamic Activation in Large Language Models",
arXiv 2408.11393.

    n_j = neuron_j * W_down[:, j],    |n_j| = |neuron_j| * |W_down[:, j]|
    CETT(x) = |sum of the n_j with |n_j| < eps| / |MLP(x)|
    eps of a layer = the largest whose mean CETT over calibration tokens is at most the target
    m_j = 1 if |n_j| over the prompt exceeds eps, else 0;    neuron <- neuron * m     at generated tokens

The prompt is computed in full, and so the first generated token is unaffected. As far as accessible, the paper doesn't
specify the statistic over the prompt (a neuron's largest value, or its root mean square) or the target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.request import Text
from trimtab.engines.transformers.places import output_weight
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.inputs import check_lm
from trimtab.steering import Card, Edit, MaskNeurons, Positions, Site, Steering
from trimtab.steering.tensors import to_float64
from trimtab.text.chat import Prompt

if TYPE_CHECKING:
    from trimtab.lm import LM


LEVELS = 4096
"""The number of quantiles of the neurons' magnitudes among which the threshold is searched."""


@keywords
def learn_tda(
    lm: LM,
    texts: Sequence[Prompt],
    layers: int | Sequence[int] | None = None,
    *,
    cett: float = 0.2,
    statistic: str = "any",
    tokens: int = 512,
    progress: Progress | None = None,
) -> Steering:
    """Learn each layer's threshold below which neurons are masked. Each prompt gets its own mask; see `kept`.

    The first token of a text is ignored, both here and in the prompts that masks are computed from, since in most
    models its activations have a different scale.

    Args:
        lm: The model.
        texts: Texts to calibrate on, similar to the prompts.
        layers: The blocks (default: all).
        cett: The maximum mean error of an MLP's output, as a share of its norm, from 0 to below 1.
        statistic: A neuron's magnitude over the prompt: its largest value (`"any"`) or its root mean square (`"rms"`).
        tokens: The maximum number of calibration tokens, over all texts.
        progress: `progress(done, total)` counts layers.

    Returns:
        The steering, which acts at generated tokens. Its card has the thresholds and their mean errors.

    Raises:
        TrimtabError: No text has a second token, `cett` is out of range, or the model's MLPs aren't plain or are
            quantized.
    """
    check_lm(lm, "training")
    if not 0 <= cett < 1:
        raise TrimtabError(f"cett is a share from 0 to below 1, got {cett}")
    chosen = check_layers(lm, range(lm.layout.layers) if layers is None else layers, 0)
    sites = [Site(layer, "neurons") for layer in chosen]
    weights = {site: to_float64(output_weight(lm.layout, site)) for site in sites}
    activations = _read(lm, texts, chosen, tokens)
    edits, thresholds, errors = [], {}, {}
    for done, site in enumerate(sites, 1):
        neurons, output = activations[site], activations[Site(site.layer, "mlp")]
        eps, error = find_threshold(neurons, weights[site], output, cett)
        column_norms = weights[site].norm(dim=0)
        limits = torch.where(column_norms > 0, eps / column_norms.clamp_min(1e-300), 0)
        operation = MaskNeurons(limits.float(), statistic=statistic)
        edits.append(Edit(site, operation, Positions.generated()))
        thresholds[str(site.layer)], errors[str(site.layer)] = round(eps, 9), round(error, 6)
        if progress is not None:
            progress(done, len(sites))
    options = {"cett": cett, "statistic": statistic, "tokens": tokens}
    measured = {"texts": len(texts), "tokens": len(next(iter(activations.values()))), "eps": thresholds, "cett": errors}
    return Steering(tuple(edits), Card("tda", lm.identity, _digest(lm, texts), options, measured, versions()))


def errors_at(eps: float, neurons: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    """`CETT` of each token: the norm of the lost part relative to the norm of the MLP's output, `[tokens]`.

    `neurons` is `[tokens, size]`, `weight` `[width, size]`, `output` `[tokens, width]`.
    """
    small = neurons.abs() * weight.norm(dim=0) < eps
    lost = torch.where(small, neurons, 0) @ weight.T
    return lost.norm(dim=-1) / output.norm(dim=-1).clamp_min(1e-300)


def find_threshold(neurons: Tensor, weight: Tensor, output: Tensor, target: float) -> tuple[float, float]:
    """The largest threshold, among `LEVELS` quantiles, with a mean error of at most `target`; and its mean error.

    Found by bisection, since the mean error increases with the threshold, apart from small fluctuations.
    """
    sizes = (neurons.abs() * weight.norm(dim=0)).flatten().sort().values
    low, high = 0, min(LEVELS, len(sizes))  # at level 0 nothing is lost
    steps = high

    def threshold_at(level: int) -> float:
        return 0.0 if level == 0 else float(sizes[level * (len(sizes) - 1) // steps])

    error = 0.0
    while low < high:
        middle = (low + high + 1) // 2
        middle_error = float(errors_at(threshold_at(middle), neurons, weight, output).mean())
        if middle_error <= target:
            low, error = middle, middle_error
        else:
            high = middle - 1
    return threshold_at(low), error


def kept(lm: LM, steering: Steering, prompts: Sequence[Prompt]) -> list[dict[int, float]]:
    """For each prompt, the share of each layer's neurons that its mask keeps, an exact count.

    Raises `TrimtabError` if the steering doesn't mask neurons.
    """
    masks = [edit for edit in steering.edits if isinstance(edit.operation, MaskNeurons)]
    if not masks:
        raise TrimtabError("this steering masks no neurons")
    captured = lm.capture(prompts, sorted({edit.site for edit in masks}), Positions.all())
    return [
        {edit.site.layer: float(edit.operation.kept(activations[edit.site]).double().mean()) for edit in masks}
        for activations in captured
    ]


def _digest(lm: LM, texts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([lm.encode(text) for text in texts]).encode()).hexdigest()


def _read(lm: LM, texts: Sequence[Prompt], layers: Sequence[int], tokens: int) -> dict[Site, Tensor]:
    """The neurons and the MLP's output `[tokens, …]` at each layer, for all tokens of the texts except the first."""
    groups = []
    remaining = tokens
    for text in texts:
        ids = lm.encode(text)
        count = min(len(ids) - 1, remaining)
        if count > 0:
            groups.append([Text(ids, range(1, 1 + count))])
            remaining -= count
    if not groups:
        raise TrimtabError("there is nothing to calibrate on: give texts of at least two tokens, and tokens from 1")
    sites = [Site(layer, kind) for layer in layers for kind in ("neurons", "mlp")]
    parts: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(groups) for site in sites}
    for batch in lm.read(groups, sites):
        for site in sites:
            for g, members in zip(batch.groups, batch.values[site], strict=True):
                parts[site][g] = to_float64(members[0])
    return {site: torch.cat(pieces) for site, pieces in parts.items()}
