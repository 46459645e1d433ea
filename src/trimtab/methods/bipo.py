"""BiPO: Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through Bi-directional
Preference Optimization", NeurIPS 2024, arXiv 2406.00045, section 3.

    r(y, d) = log p(y | x, h + d v) - log p(y | x)
    minimise over v:  -E log sigmoid( d beta [r(y+, d) - r(y-, d)] )        d from {-1, 1}

With either sign, the vector should make the model prefer the corresponding answer more than it does unsteered.
Log-probabilities are summed over an answer's tokens. The loss, beta and the start at v = 0 are those of the authors'
code (CaoYuanpu/BiPO). Differences from it: d is drawn per pair instead of per batch; the vector acts from the last
prompt token on instead of on the whole prompt too; Adam has a learning rate in units of activations, the vector's norm
is capped, and held-out pairs decide when to stop; no end-of-text token is appended to answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.engines.transformers.forced import TeacherForcing
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.descent import Descent
from trimtab.learn.inputs import pairs_for
from trimtab.learn.parameters import LowRankParameters
from trimtab.learn.preferences import Plan, Preference, both_logprobs, fit
from trimtab.steering import Card, Steering
from trimtab.text.pairs import Pairs, as_pairs, digest

if TYPE_CHECKING:
    from trimtab.lm import LM


DEPTH = 0.47
"""The paper steers layer 15 of 32 (Llama 2 7B); Mistral 7B at layer 13."""
SIGNS = (1.0, -1.0)


@keywords
def learn_bipo(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    beta: float = 0.1,
    steps: int = 40,
    rate: float = 0.01,
    max_dose: float = 1.0,
    held_out: Pairs | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Steering:
    """Learn a vector that prefers the positive answers at strength 1 and the negative ones at strength -1.

    A `KeyboardInterrupt` during gradient descent ends it with the best vector so far, which the card records.

    Args:
        lm: The model; its weights don't change.
        pairs: Answers to prompts. Each side is read under its own system prompt and messages.
        layers: Blocks to steer after, each with its own vector (default: one, at 0.47 of the depth).
        beta: The scale of the log-ratios in the loss. The smaller it is, the later the loss of a pair saturates as its
            preference grows.
        steps: The maximum number of steps of gradient descent; it stops early when held-out pairs no longer improve.
        rate: Adam's learning rate, in units of the activations' root mean square.
        max_dose: The maximum norm of a vector, relative to the typical activation at its block.
        held_out: Held-out pairs, which decide when to stop; default: one prompt in eight of `pairs`.
        seed: The seed for the order of the pairs and for the signs d.
        progress: `progress(done, total)`: pairs read, then steps.

    Returns:
        A steering of strength 1. Its card has the loss and both sides' log-probabilities per token, before and after.

    Raises:
        TrimtabError: There are no pairs, pairs of another shape, unknown layers, or invalid options.
    """
    pairs = pairs_for(lm, pairs, "training")
    held_out = None if held_out is None else as_pairs(held_out)
    if not beta > 0:
        raise TrimtabError(f"beta scales the log-ratios and is above 0, got {beta}; the paper uses 0.1")
    chosen = check_layers(lm, layers, DEPTH)
    descent = Descent(steps=steps, rate=rate, max_dose=max_dose, seed=seed)

    def objective(
        run: TeacherForcing, parameters: LowRankParameters, some: Sequence[Preference], signs: Sequence[float]
    ) -> Tensor:
        return bipo_loss(run, parameters, some, signs, beta)

    trained, measured = fit(
        lm,
        pairs,
        chosen,
        initialize=lambda scales, widths, device: LowRankParameters.initial(scales, widths, 0, seed, device),
        objective=objective,
        plan=Plan(factors=SIGNS, evaluation_factors=SIGNS, texts_in_memory=lambda pair: [pair.positive, pair.negative]),
        descent=descent,
        held_out=held_out,
        progress=progress,
    )
    options = {"layers": chosen, "beta": beta, "steps": steps, "rate": rate, "max_dose": max_dose, "seed": seed}
    doses = {str(site.layer): round(dose, 6) for site, dose in trained.doses().items()}
    data = digest([*pairs, *(held_out or ())])
    card = Card("bipo", lm.identity, data, options, {**measured, "doses": doses}, versions())
    return Steering(trained.edits(), card)


def bipo_loss(
    run: TeacherForcing, trained: LowRankParameters, pairs: Sequence[Preference], signs: Sequence[float], beta: float
) -> Tensor:
    """The loss, summed over pairs, each with its own sign d."""
    positive, negative = both_logprobs(run, pairs, trained.changes(), signs)
    reference = torch.tensor([pair.reference for pair in pairs], device=positive.device)
    log_ratios = (positive - reference[:, 0]) - (negative - reference[:, 1])
    return -logsigmoid(beta * torch.tensor(signs, device=positive.device) * log_ratios).sum()
