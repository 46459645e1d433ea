"""Householder pseudo-rotation (HPR): Pham and Nguyen, "Householder Pseudo-Rotation: A Novel Approach to Activation
Editing in LLMs with Direction-Magnitude Perspective", EMNLP 2024, arXiv 2409.10053.

    p(x) = sigmoid(w.x)        a probe without bias: its hyperplane goes through the origin
    g(x) = pi sigmoid(MLP(x))        the angle by which to rotate x
    x <- x rotated towards w by alpha * g(x), with its norm kept        if p(x) < 1/2; at the best layers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import pair_texts, read_activations
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.inputs import pairs_for
from trimtab.steering import Card, Edit, Positions, Rotate, RotatePredicted, Site, Steering
from trimtab.steering.rotations import angle_sizes, predicted_angle
from trimtab.text.pairs import Pairs, digest

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


Turn = Literal["predicted", "fixed", "reflect"]
TURNS = ("predicted", "fixed", "reflect")
RATE, BATCH, WARM_UP_SHARE = 5e-4, 16, 0.05
HELD_OUT = 5
"""One in this many pairs is held out, for the probes' accuracy."""
RIDGE = 1e-3
"""The probe's L2 penalty, for activations scaled to a root mean square of 1."""


@keywords
def learn_hpr(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    keep: int = 5,
    turn: Turn = "predicted",
    alpha: float = 1.0,
    epochs: int = 5,
    seed: int = 0,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn a probe at each layer, and rotate activations on the negative side of the `keep` best ones.

    The two answers of a pair are read token by token from where they diverge to the end of the shorter one, and token j
    of one is paired with token j of the other. The angle network is trained on negatives only, since positives are
    never rotated. It sees normalized activations, since an angle doesn't depend on their norm (the authors' network
    sees them unnormalized).

    Args:
        lm: The model.
        pairs: Answers or texts.
        layers: The candidate blocks (default: all).
        keep: The number of layers to steer, those whose probes are the most accurate on held-out pairs.
        turn: The angle: `"predicted"` by the network, `"fixed"` (the mean angle of the pairs), or `"reflect"` (the
            reflection on the probe's hyperplane).
        alpha: The strength of the edits. With 1, the rotation is by the full angle, which may end before the
            hyperplane.
        epochs: Training epochs of the angle network.
        seed: The seed for the network's initial weights and the order of its batches.
        positions: The tokens at which to rotate (default: from the last prompt token on).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering. Its card has the probes' accuracies and the mean angles.

    Raises:
        TrimtabError: There are fewer than two pairs, other shapes, unknown layers or options, or answers that are equal
            up to the end of the shorter one.
    """
    pairs = pairs_for(lm, pairs)
    if turn not in TURNS:
        raise TrimtabError(f"unknown turn {turn!r}; known: {', '.join(TURNS)}")
    if keep < 1 or epochs < 1:
        raise TrimtabError(f"keep and epochs are 1 or more, got {keep} and {epochs}")
    if len(pairs) < 2:
        raise TrimtabError(f"a probe is learned from two pairs or more, got {len(pairs)}")
    chosen = check_layers(lm, range(lm.layout.layers) if layers is None else layers, 0.5)
    sites = [Site(layer) for layer in chosen]
    groups = [_aligned(*group) for group in pair_texts(lm, pairs, suffix=True)]
    activations = read_activations(lm, groups, sites, progress=progress)
    held_out = [i for i in range(len(pairs)) if i % HELD_OUT == HELD_OUT - 1] or [len(pairs) - 1]
    fit_indices = [i for i in range(len(pairs)) if i not in set(held_out)]
    probes, accuracy = {}, {}
    for site in sites:
        plus, minus = (torch.cat([activations[site][i][m] for i in fit_indices]) for m in (0, 1))
        probes[site] = fit_probe(plus, minus)
        held_out_projections = [torch.cat([activations[site][i][m] for i in held_out]) @ probes[site] for m in (0, 1)]
        accuracy[site] = float(torch.cat([held_out_projections[0] > 0, held_out_projections[1] < 0]).double().mean())
    best = sorted(sorted(sites, key=lambda site: (-accuracy[site], site))[:keep])
    edits, angles = [], {}
    for site in best:
        plus, minus = (torch.cat([activations[site][i][m] for i in range(len(pairs))]) for m in (0, 1))
        u = probes[site].float()
        pair_angles = angle_between(minus, plus)
        angles[str(site.layer)] = round(float(pair_angles.mean()), 6)
        operation: Rotate | RotatePredicted
        if turn == "predicted":
            operation = RotatePredicted(u, fit_angles(minus, pair_angles, epochs=epochs, seed=seed))
        else:
            operation = Rotate(u, None if turn == "reflect" else float(pair_angles.mean()))
        edits.append(Edit(site, operation, positions or Positions.from_last_prompt_token(), alpha))
    options = {"layers": chosen, "keep": keep, "turn": turn, "alpha": alpha, "epochs": epochs, "seed": seed}
    accuracies = {str(site.layer): round(value, 6) for site, value in accuracy.items()}
    measured = {"pairs": len(pairs), "probe_accuracy": accuracies, "mean_angle": angles}
    return Steering(tuple(edits), Card("hpr", lm.identity, digest(pairs), options, measured, versions()))


def _aligned(positive: Text, negative: Text) -> list[Text]:
    """Both answers, to be read from the token where they diverge to the end of the shorter one."""
    a, b = list(positive.positions), list(negative.positions)
    count = min(len(a), len(b))
    part = next((j for j in range(count) if positive.ids[a[j]] != negative.ids[b[j]]), None)
    if part is None:
        raise TrimtabError("two answers don't differ before the shorter one ends; give answers with different words")
    return [Text(positive.ids, a[part:count]), Text(negative.ids, b[part:count])]


def fit_probe(positive: Tensor, negative: Tensor) -> Tensor:
    """The unit normal `[width]` of a logistic probe without bias, from both sides' activations `[tokens, width]`."""
    x = torch.cat([positive, -negative]).double()  # without a bias, -x with label 1 is equivalent to x with label 0
    x = x / x.square().mean().sqrt().clamp_min(1e-300)
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.softplus(-(x @ w)).mean() + RIDGE * w.square().sum()
        value.backward()
        return value

    solver.step(loss)
    direction = w.detach()
    if not bool(direction.norm() > 0):
        raise TrimtabError("the two sides of the pairs don't differ there, so there is no direction")
    return direction / direction.norm()


def angle_between(x: Tensor, y: Tensor) -> Tensor:
    """The angles between activations `[tokens, width]`, in radians: `[tokens]`. Unlike arccos, accurate near 0."""
    a, b = (v / v.norm(dim=-1, keepdim=True).clamp_min(1e-300) for v in (x, y))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def fit_angles(x: Tensor, angles: Tensor, *, epochs: int = 5, seed: int = 0) -> Tensor:
    """The weights of a network that predicts `angles` `[tokens]` from activations `[tokens, width]` (least squares).

    AdamW with a rate of 5e-4 after a warm-up over 5% of the steps, in batches of 16. The same seed gives the same
    weights.
    """
    x, angles = x.float(), angles.float()
    generator = torch.Generator().manual_seed(seed)
    sizes = angle_sizes(x.shape[1])
    parts = []
    for a, b in pairwise(sizes):  # torch's default initialization: uniform within ±1 / sqrt(inputs)
        parts += [(2 * torch.rand(n, generator=generator) - 1) / math.sqrt(a) for n in (a * b, b)]
    weights = torch.cat(parts).requires_grad_()
    solver = torch.optim.AdamW([weights], lr=RATE)
    steps = epochs * math.ceil(len(x) / BATCH)
    warm = max(1, round(WARM_UP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(solver, lambda step: min(1.0, (step + 1) / warm))
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            solver.zero_grad()
            error = predicted_angle(x[batch], weights)[:, 0] - angles[batch]
            error.square().mean().backward()
            solver.step()
            schedule.step()
    return weights.detach()
