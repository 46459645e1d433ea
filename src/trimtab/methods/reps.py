"""RePS: Wu, Yu, Arora, Manning and Potts, "Improved Representation Steering for Language Models", NeurIPS 2025, arXiv
2505.20809: reference-free preference steering, of one vector and both ways.

    Delta+ = b+/|y+| log p(y+ | x, h + f v)  - 1/|y-| log p(y- | x, h + f v)      b+ = max(log p(y-|x) - log p(y+|x), 1)
    Delta- = b-/|y-| log p(y- | x, null(h))  - 1/|y+| log p(y+ | x, null(h))      b- = max(log p(y+|x) - log p(y-|x), 1)
    minimise over v:  -E [ log sigmoid(Delta+) + log sigmoid(Delta-) ],      null(h) = h - ReLU(h.v) v / |v|^2

y+ is the positive answer, p without an edit the unsteered model (it weights the winning side and is no reference of a
ratio), f a steering factor that is drawn each time. Objective, weights and null are the paper's and its code's
(stanfordnlp/axbench), which draws f from 2, 4, …, 20; here it is a tenth of that, so that strength 1 is in the middle.
Ours: one f for both answers of a pair, as in the formula (the code draws one for each); |y| is the answer's length (the
code we have seen counts the prompt's tokens, too); no learned bias on f and in null; the vector acts from the last
prompt token on; no dropout; a rate in units of activations, a cap on the vector's length, and an early stop by held-out
pairs at f = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.engines.transformers.forced import Change, Forcing
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.descent import Descent
from trimtab.learn.inputs import pairs_for
from trimtab.learn.preferences import Plan, Preference, both_logprobs, fit
from trimtab.learn.trained import Trained
from trimtab.steering import Add, Card, Edit, SetProjection, Site, Steering
from trimtab.text.pairs import Pairs, as_pairs, digest

if TYPE_CHECKING:
    from trimtab.lm import LM


DEPTH = 0.4
"""AxBench, which the paper measures on, steers Gemma 2 2B at layers 10 and 20 of 26."""
FACTORS = tuple(round(0.2 * k, 1) for k in range(1, 11))
"""The paper's 2, 4, …, 20 in units of their middle."""
FIRST = 0.05
"""How long the vector is to begin with, in typical activations: null needs a direction."""


@keywords
def learn_reps(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    factors: Sequence[float] = FACTORS,
    steps: int = 40,
    rate: float = 0.01,
    max_dose: float = 1.0,
    held_out: Pairs | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Steering:
    """Learn a vector that brings the positive answers about when it is added, and the negative ones when it is nulled.

    It is learned over a range of strengths, so the strength is adjustable. For the opposite effect, use `nulled`.

    Args:
        lm: The model; its weights don't change.
        pairs: Answers to prompts: the positive as steered, the negative as the unsteered model answers. Each side is
            read under its own system prompt and messages.
        layers: Blocks to steer after, each with its own vector (default: one, at 0.4 of the depth).
        factors: The strengths at which it is learned, above 0.
        steps: The maximum number of steps of gradient descent; it stops early when held-out pairs no longer improve.
        rate: Adam's learning rate, in units of the activations' root mean square.
        max_dose: The maximum length of a vector, relative to the typical activation at its block.
        held_out: Held-out pairs, which decide when to stop; default: one prompt in eight of `pairs`.
        seed: Of the first vector, the order of the pairs, and the factors.
        progress: `progress(done, total)`: pairs read, then steps.

    Returns: A steering of strength 1. Its card has the loss and both sides' log-probabilities per token, before and
        after. A `KeyboardInterrupt` while it descends ends it with the best so far, and the card says so.

    Raises:
        TrimtabError: No pairs, pairs of another shape, unknown layers, or an option that can't be.
    """
    pairs = pairs_for(lm, pairs, "training")
    held_out = None if held_out is None else as_pairs(held_out)
    strengths = tuple(float(factor) for factor in factors)
    if not strengths or not all(factor > 0 and math.isfinite(factor) for factor in strengths):
        raise TrimtabError(f"factors are strengths above 0, at least one, got {list(factors)}; (1.0,) is strength 1")
    chosen = check_layers(lm, layers, DEPTH)
    trained, measured = fit(
        lm,
        pairs,
        chosen,
        start=lambda scales, widths, device: _start(Trained.start(scales, widths, 0, seed, device), seed),
        objective=reps_loss,
        plan=Plan(factors=strengths, judged=(1.0,), kept=lambda pair: 2 * [pair.positive, pair.negative]),
        how=Descent(steps=steps, rate=rate, max_dose=max_dose, seed=seed),
        held_out=held_out,
        progress=progress,
    )
    options = {"layers": chosen, "factors": list(strengths), "steps": steps, "rate": rate, "max_dose": max_dose}
    doses = {str(site.layer): round(dose, 6) for site, dose in trained.doses().items()}
    data = digest([*pairs, *(held_out or ())])
    card = Card("reps", lm.identity, data, {**options, "seed": seed}, {**measured, "doses": doses}, versions())
    return Steering(trained.edits(), card)


def nulled(steering: Steering) -> Steering:
    """The other way of a steering that adds: null(h), which takes away what activations have of its vectors.

    At strength 1, `h - ReLU(h.v) v / |v|^2`.

    Args:
        steering: Additions, such as of `learn_reps`.

    Returns:
        The same steering with one-sided projections to 0 in place of its additions.

    Raises:
        TrimtabError: An edit that isn't an addition, or whose vector is zero.
    """
    edits = []
    for edit in steering.edits:
        if not isinstance(edit.operation, Add) or edit.operation.keep_norm:
            raise TrimtabError(f"only the vector of an addition can be nulled, and this edit is {edit}")
        vector = edit.operation.direction
        if not vector.norm() > 0:
            raise TrimtabError(f"the vector at {edit.site} is zero, so it has no direction to null")
        operation = SetProjection(-vector / vector.norm(), 0.0, one_sided=True)
        edits.append(Edit(edit.site, operation, edit.positions))
    card = replace(steering.card, options={**steering.card.options, "nulled": True})
    return replace(steering, edits=tuple(edits), card=card)


def reps_loss(run: Forcing, trained: Trained, pairs: Sequence[Preference], factors: Sequence[float]) -> Tensor:
    """The objective, summed over pairs, each steered by its own factor."""
    positive, negative = both_logprobs(run, pairs, trained.changes(), factors)
    device = positive.device
    long_positive = torch.tensor([len(pair.positive.answer) for pair in pairs], device=device)
    long_negative = torch.tensor([len(pair.negative.answer) for pair in pairs], device=device)
    ahead = torch.tensor([pair.reference[0] - pair.reference[1] for pair in pairs], device=device)
    plus = (-ahead).clamp(min=1) * positive / long_positive - negative / long_negative
    positive, negative = both_logprobs(run, pairs, _nulling(trained))
    minus = ahead.clamp(min=1) * negative / long_negative - positive / long_positive
    return -(logsigmoid(plus) + logsigmoid(minus)).sum()


def _nulling(trained: Trained) -> dict[Site, Change]:
    return {site: partial(_null, part.vector) for site, part in trained.parts.items()}


def _null(vector: Tensor, x: Tensor) -> Tensor:
    """What null adds to activations `[tokens, width]`."""
    along = (x.float() @ vector).clamp(min=0) / vector.square().sum()
    return -along[:, None] * vector


@torch.no_grad()
def _start(trained: Trained, seed: int) -> Trained:
    """A short vector in a random direction at each site."""
    generator = torch.Generator().manual_seed(seed)
    for site in sorted(trained.parts):
        vector = trained.parts[site].vector
        vector.copy_(FIRST * torch.randn(len(vector), generator=generator))
    return trained
