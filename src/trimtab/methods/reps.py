"""RePS: Wu, Yu, Arora, Manning and Potts, "Improved Representation Steering for Language Models", NeurIPS 2025, arXiv
2505.20809: reference-free preference steering, of one vector and both ways.

    Delta+ = b+/|y+| log p(y+ | x, h + f v)  - 1/|y-| log p(y- | x, h + f v)      b+ = max(log p(y-|x) - log p(y+|x), 1)
    Delta- = b-/|y-| log p(y- | x, null(h))  - 1/|y+| log p(y+ | x, null(h))      b- = max(log p(y+|x) - log p(y-|x), 1)
    minimise over v:  -E [ log sigmoid(Delta+) + log sigmoid(Delta-) ],      null(h) = h - ReLU(h.v) v / |v|^2

y+ is the positive answer, p without an edit is the unsteered model (which only weights the winning side, without being
the reference of a ratio), and f is a steering factor that is drawn each time. Objective, weights and null are those of
the paper and its code (stanfordnlp/axbench), which draws f from 2, 4, …, 20; here f is a tenth of that, so that
strength 1 is in the middle. Differences: one f for both answers of a pair, as in the formula (the code draws one for
each); |y| is the answer's length (the code counts the prompt's tokens too); no learned bias on f and in null; the
vector acts from the last prompt token on; no dropout; the learning rate is in units of activations, the vector's norm
is capped, and held-out pairs at f = 1 decide when to stop.
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

from trimtab.engines.transformers.forced import Change, TeacherForcing
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.descent import Descent
from trimtab.learn.inputs import pairs_for
from trimtab.learn.parameters import LowRankParameters
from trimtab.learn.preferences import Plan, Preference, both_logprobs, fit
from trimtab.steering import Add, Card, Edit, SetProjection, Site, Steering
from trimtab.text.pairs import Pairs, as_pairs, digest

if TYPE_CHECKING:
    from trimtab.lm import LM


DEPTH = 0.4
"""AxBench, the paper's benchmark, steers Gemma 2 2B at layers 10 and 20 of 26."""
FACTORS = tuple(round(0.2 * k, 1) for k in range(1, 11))
"""The paper's 2, 4, …, 20 divided by 10."""
INITIAL_NORM = 0.05
"""The initial norm of the vector, relative to the typical activation. It isn't zero, since null needs a direction."""


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
    """Learn a vector that produces the positive answers when it is added, and the negative ones when it is nulled.

    It is learned over a range of strengths, so the strength is adjustable. For the opposite effect, use `nulled`.
    A `KeyboardInterrupt` during gradient descent ends it with the best vector so far, which the card records.

    Args:
        lm: The model; its weights don't change.
        pairs: Answers to prompts: the positive as the steered model should answer, the negative as the unsteered one
            does. Each side is read under its own system prompt and messages.
        layers: Blocks to steer after, each with its own vector (default: one, at 0.4 of the depth).
        factors: The strengths at which it is learned, above 0.
        steps: The maximum number of steps of gradient descent; it stops early when held-out pairs no longer improve.
        rate: Adam's learning rate, in units of the activations' root mean square.
        max_dose: The maximum norm of a vector, relative to the typical activation at its block.
        held_out: Held-out pairs, which decide when to stop; default: one prompt in eight of `pairs`.
        seed: The seed of the initial vector, the order of the pairs, and the factors.
        progress: `progress(done, total)`: pairs read, then steps.

    Returns:
        A steering of strength 1. Its card has the loss and both sides' log-probabilities per token, before and after.

    Raises:
        TrimtabError: There are no pairs, pairs of another shape, unknown layers, or invalid options.
    """
    pairs = pairs_for(lm, pairs, "training")
    held_out = None if held_out is None else as_pairs(held_out)
    strengths = tuple(float(factor) for factor in factors)
    if not strengths or not all(factor > 0 and math.isfinite(factor) for factor in strengths):
        raise TrimtabError(f"factors are strengths above 0, at least one, got {list(factors)}; (1.0,) is strength 1")
    chosen = check_layers(lm, layers, DEPTH)
    parameters, measured = fit(
        lm,
        pairs,
        chosen,
        initialize=lambda scales, widths, device: _randomize(
            LowRankParameters.initial(scales, widths, 0, seed, device), seed
        ),
        objective=reps_loss,
        plan=Plan(
            factors=strengths,
            evaluation_factors=(1.0,),
            texts_in_memory=lambda pair: 2 * [pair.positive, pair.negative],
        ),
        descent=Descent(steps=steps, rate=rate, max_dose=max_dose, seed=seed),
        held_out=held_out,
        progress=progress,
    )
    options = {"layers": chosen, "factors": list(strengths), "steps": steps, "rate": rate, "max_dose": max_dose}
    doses = {str(site.layer): round(dose, 6) for site, dose in parameters.doses().items()}
    data = digest([*pairs, *(held_out or ())])
    card = Card("reps", lm.identity, data, {**options, "seed": seed}, {**measured, "doses": doses}, versions())
    return Steering(parameters.edits(), card)


def nulled(steering: Steering) -> Steering:
    """The opposite of a steering that adds: null(h), which removes the vectors' positive components from activations.

    At strength 1, `h - ReLU(h.v) v / |v|^2`.

    Args:
        steering: A steering of additions, such as of `learn_reps`.

    Returns:
        The same steering with one-sided projections to 0 instead of additions.

    Raises:
        TrimtabError: An edit isn't an addition, or its vector is zero.
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


def reps_loss(
    run: TeacherForcing, trained: LowRankParameters, pairs: Sequence[Preference], factors: Sequence[float]
) -> Tensor:
    """The objective, summed over pairs, each steered with its own factor."""
    positive, negative = both_logprobs(run, pairs, trained.changes(), factors)
    device = positive.device
    long_positive = torch.tensor([len(pair.positive.answer) for pair in pairs], device=device)
    long_negative = torch.tensor([len(pair.negative.answer) for pair in pairs], device=device)
    ahead = torch.tensor([pair.reference[0] - pair.reference[1] for pair in pairs], device=device)
    plus = (-ahead).clamp(min=1) * positive / long_positive - negative / long_negative
    positive, negative = both_logprobs(run, pairs, _null_changes(trained))
    minus = ahead.clamp(min=1) * negative / long_negative - positive / long_positive
    return -(logsigmoid(plus) + logsigmoid(minus)).sum()


def _null_changes(trained: LowRankParameters) -> dict[Site, Change]:
    return {site: partial(_null, part.vector) for site, part in trained.by_site.items()}


def _null(vector: Tensor, x: Tensor) -> Tensor:
    """The change that null makes to activations `[tokens, width]`."""
    along = (x.float() @ vector).clamp(min=0) / vector.square().sum()
    return -along[:, None] * vector


@torch.no_grad()
def _randomize(trained: LowRankParameters, seed: int) -> LowRankParameters:
    """A short vector in a random direction at each site."""
    generator = torch.Generator().manual_seed(seed)
    for site in sorted(trained.by_site):
        vector = trained.by_site[site].vector
        vector.copy_(INITIAL_NORM * torch.randn(len(vector), generator=generator))
    return trained
