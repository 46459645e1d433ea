"""ITI: Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023,
arXiv 2306.03341, section 3.

    a probe for each head, on x = its output at the last token of an answer     trained on 80 of 100 questions
    the K heads with the best accuracy on the others
    u = (mean of true x - mean of false x), normalized;    sigma = the standard deviation of x.u
    x[head] <- x[head] + alpha * sigma * u          at the last prompt token and every generated one
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.engines.contract import query_heads
from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, read_batches, versions
from trimtab.learn.inputs import pairs_for
from trimtab.learn.probes import logistic
from trimtab.methods.caa import answer_texts
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.steering.tensors import check_finite, to_float64
from trimtab.text.chat import Prompt
from trimtab.text.pairs import Pair, Pairs, digest, sides

if TYPE_CHECKING:
    from trimtab.lm import LM


@dataclass(frozen=True)
class Head:
    """One head: its probe's accuracy on unseen questions, the unit direction `[head size]`, the standard deviation."""

    layer: int
    head: int
    accuracy: float
    direction: Tensor
    sigma: float


@keywords
def learn_iti(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    heads: int = 48,
    alpha: float = 15.0,
    direction: str = "mean",
    validation: float = 0.2,
    seed: int = 0,
    bank: Sequence[Prompt] | None = None,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn from true (positive) and false (negative) answers which heads separate them, and steer these heads.

    Args:
        lm: The model.
        pairs: True and false answers. Pairs with the same prompt are one question and stay in the same split.
        layers: The blocks whose heads are candidates (default: all).
        heads: The number of heads to choose, over all layers.
        alpha: The strength of the edits, in standard deviations of the activations along the direction.
        direction: `"mean"` (the difference of means) or `"probe"` (the probe's weight).
        validation: The share of questions on which heads are ranked.
        seed: The seed of the split into questions to train and to rank on.
        bank: Other texts on which to measure the standard deviation (default: the pairs).
        positions: The tokens at which to add (default: from the last prompt token on).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering. Its card has the chosen heads and their probes' accuracies.

    Raises:
        TrimtabError: There are fewer than two questions, fewer heads than requested, or unknown options.
        UnsupportedError: The heads can't be read on this engine, or their number isn't known.
    """
    pairs = pairs_for(lm, pairs)
    ranked = rank_heads(
        lm, pairs, layers, direction=direction, validation=validation, seed=seed, bank=bank, progress=progress
    )
    if isinstance(heads, bool) or not isinstance(heads, int) or not 1 <= heads <= len(ranked):
        raise TrimtabError(f"heads is a whole number from 1 to {len(ranked)} (all heads), got {heads!r}")
    chosen_heads = ranked[:heads]
    size = len(chosen_heads[0].direction)
    edits = []
    for layer in sorted({head.layer for head in chosen_heads}):
        push = torch.zeros(query_heads(lm.layout), size, dtype=torch.float64)
        for head in chosen_heads:
            if head.layer == layer:
                push[head.head] = head.sigma * head.direction
        edit_positions = positions or Positions.from_last_prompt_token()
        edits.append(Edit(Site(layer, "heads"), Add(push.flatten().float()), edit_positions, alpha))
    options: dict[str, Any] = {
        "heads": heads, "alpha": alpha, "direction": direction, "validation": validation, "seed": seed,
    }  # fmt: skip
    measured = {
        "pairs": len(pairs),
        "heads": [[h.layer, h.head, round(h.accuracy, 6), round(h.sigma, 6)] for h in chosen_heads],
    }
    return Steering(tuple(edits), Card("iti", lm.identity, digest(pairs), options, measured, versions()))


def rank_heads(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    direction: str = "mean",
    validation: float = 0.2,
    seed: int = 0,
    bank: Sequence[Prompt] | None = None,
    progress: Progress | None = None,
) -> list[Head]:
    """All heads of these layers (default: all), ranked by their probes' accuracy; ties by layer and head number.

    Raises `TrimtabError` as `learn_iti` does.
    """
    pairs = pairs_for(lm, pairs)
    if direction not in ("mean", "probe"):
        raise TrimtabError(f"unknown direction {direction!r}; directions: mean, probe")
    chosen = check_layers(lm, range(lm.layout.layers) if layers is None else layers, 0)
    fit_indices, held_out = split(pairs, validation, seed)
    lm.check_sites([Site(layer, "heads") for layer in chosen])
    count = query_heads(lm.layout)
    groups = answer_texts(lm, pairs)
    by_layer = _read(lm, groups, chosen, progress)  # {layer: [pairs, 2, heads, size]}
    bank_activations: dict[int, Tensor] = {}
    if bank is not None:
        texts = [lm.encode(prompt) for prompt in bank]
        bank_activations = _read(lm, [[Text(ids, [len(ids) - 1])] for ids in texts], chosen, None)
    heads = []
    for layer in chosen:
        members = by_layer[layer]
        train = members[fit_indices].flatten(0, 1).transpose(0, 1)  # [heads, 2 n, size]
        test = members[held_out].flatten(0, 1).transpose(0, 1)
        weight, bias = logistic(train, torch.tensor([1, 0]).repeat(len(fit_indices)))
        predictions = (test @ weight[..., None])[..., 0] + bias[:, None] > 0
        accuracy = (predictions == torch.tensor([True, False]).repeat(len(held_out))).double().mean(-1)
        directions = members[:, 0].mean(0) - members[:, 1].mean(0) if direction == "mean" else weight
        norms = directions.norm(dim=-1, keepdim=True)
        unit = torch.where(norms > 0, directions / norms.clamp_min(1e-300), 0)
        reference_activations = bank_activations.get(layer, members).flatten(0, 1)  # [texts, heads, size]
        sigma = (reference_activations * unit).sum(-1).std(0, correction=0)
        heads += [Head(layer, h, float(accuracy[h]), unit[h], float(sigma[h])) for h in range(count)]
    return sorted(heads, key=lambda head: (-head.accuracy, head.layer, head.head))


def split(pairs: Sequence[Pair], validation: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    """The indices of the pairs to train probes on and of those to rank heads on, without a common question.

    Raises `TrimtabError` for fewer than two questions, or a share that isn't between 0 and 1.
    """
    if not 0 < validation < 1:
        raise TrimtabError(f"validation is a share between 0 and 1, got {validation}")
    questions: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        questions.setdefault(sides(pair)[0].prompt or i, []).append(i)
    if len(questions) < 2:
        raise TrimtabError(
            f"heads are ranked on questions that probes haven't seen; got {len(questions)}, which is too few"
        )
    question_groups = list(questions.values())
    random.Random(seed).shuffle(question_groups)
    count = min(max(1, round(validation * len(question_groups))), len(question_groups) - 1)
    held_out = sorted(i for group in question_groups[:count] for i in group)
    return sorted(i for group in question_groups[count:] for i in group), held_out


def _read(
    lm: LM, groups: Sequence[Sequence[Text]], layers: Sequence[int], progress: Progress | None
) -> dict[int, Tensor]:
    """The heads' activations by layer, `[groups, members, heads, size]`, float64."""
    sites = [Site(layer, "heads") for layer in layers]
    heads = query_heads(lm.layout)
    by_layer: dict[int, Tensor] = {}
    for batch in read_batches(lm, groups, sites, progress):
        for site in sites:
            values = to_float64(torch.stack([torch.cat(members) for members in batch.values[site]]))
            check_finite(values, site)
            if site.layer not in by_layer:
                shape = (len(groups), values.shape[1], heads, values.shape[2] // heads)
                by_layer[site.layer] = torch.zeros(shape, dtype=torch.float64)
            by_layer[site.layer][batch.groups] = values.view(len(values), values.shape[1], heads, -1)
    return by_layer
