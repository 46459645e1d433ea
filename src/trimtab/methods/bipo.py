"""BiPO: Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through Bi-directional
Preference Optimization", NeurIPS 2024, arXiv 2406.00045, section 3.

    r(y, d) = log p(y | x, h + d v) - log p(y | x)
    minimise over v:  -E log sigmoid( d beta [r(y+, d) - r(y-, d)] )        d from {-1, 1}

Each sign of the vector is to prefer its own answer, more than the unsteered model does. Log-probabilities are sums over
an answer's tokens. The loss, beta and the beginning at v = 0 are those of the authors' code (CaoYuanpu/BiPO). Ours: d
is drawn for each pair, where their code draws it for each batch; the vector acts from the last prompt token on, where
theirs acts on all of the prompt too; Adam with a rate in units of activations, a cap on the vector's length, and an
early stop by held-out pairs; and no end-of-text token is added to an answer, where theirs adds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.engines.transformers.forced import Forcing
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.descent import Descent
from trimtab.learn.inputs import pairs_for
from trimtab.learn.preferences import Plan, Preference, both_logprobs, fit
from trimtab.learn.trained import Trained
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
    """Learn a vector whose strength 1 prefers the positive answers, and -1 the negative ones.

    Args:
        lm: The model; its weights don't change.
        pairs: Answers to prompts. Each side is read under its own system prompt and messages.
        layers: Blocks to steer after, each with its own vector (default: one, at 0.47 of the depth).
        beta: The scale of the log-ratios. A smaller one pushes on for longer where the preference is already strong.
        steps: The maximum number of steps of gradient descent; it stops early when held-out pairs no longer improve.
        rate: Adam's learning rate, in units of the activations' root mean square.
        max_dose: The maximum length of a vector, relative to the typical activation at its block.
        held_out: Held-out pairs, which decide when to stop; default: one prompt in eight of `pairs`.
        seed: Of the order of the pairs, and of the signs under which they are learned.
        progress: `progress(done, total)`: pairs read, then steps.

    Returns: A steering of strength 1. Its card has the loss and both sides' log-probabilities per token, before and
        after. A `KeyboardInterrupt` while it descends ends it with the best so far, and the card says so.

    Raises:
        TrimtabError: No pairs, pairs of another shape, unknown layers, or an option that can't be.
    """
    pairs = pairs_for(lm, pairs, "training")
    held_out = None if held_out is None else as_pairs(held_out)
    if not beta > 0:
        raise TrimtabError(f"beta scales the log-ratios and is above 0, got {beta}; the paper has 0.1")
    chosen = check_layers(lm, layers, DEPTH)
    how = Descent(steps=steps, rate=rate, max_dose=max_dose, seed=seed)

    def objective(run: Forcing, trained: Trained, some: Sequence[Preference], signs: Sequence[float]) -> Tensor:
        return bipo_loss(run, trained, some, signs, beta)

    trained, measured = fit(
        lm,
        pairs,
        chosen,
        start=lambda scales, widths, device: Trained.start(scales, widths, 0, seed, device),
        objective=objective,
        plan=Plan(factors=SIGNS, judged=SIGNS, kept=lambda pair: [pair.positive, pair.negative]),
        how=how,
        held_out=held_out,
        progress=progress,
    )
    options = {"layers": chosen, "beta": beta, "steps": steps, "rate": rate, "max_dose": max_dose, "seed": seed}
    doses = {str(site.layer): round(dose, 6) for site, dose in trained.doses().items()}
    data = digest([*pairs, *(held_out or ())])
    card = Card("bipo", lm.identity, data, options, {**measured, "doses": doses}, versions())
    return Steering(trained.edits(), card)


def bipo_loss(
    run: Forcing, trained: Trained, pairs: Sequence[Preference], signs: Sequence[float], beta: float
) -> Tensor:
    """The loss, summed over pairs, each under its own sign d."""
    positive, negative = both_logprobs(run, pairs, trained.changes(), signs)
    reference = torch.tensor([pair.reference for pair in pairs], device=positive.device)
    log_ratios = (positive - reference[:, 0]) - (negative - reference[:, 1])
    return -logsigmoid(beta * torch.tensor(signs, device=positive.device) * log_ratios).sum()
