"""LoReFT: Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024, arXiv 2404.03592, section 3.

    h <- h + R^T (W h + b - R h)        R, W [rank, width], b [rank]; the rows of R orthonormal
    minimise over R, W and b the cross-entropy of the answers

In the subspace spanned by the rows of R, the activation is replaced by W h + b. The formula and the loss are the
paper's. Differences: the edit acts from the last prompt token on, instead of only at chosen tokens of the prompt (its
first and last few); it starts at W = R and b = 0, where it changes nothing (as in one variant of the authors' pyreft);
R is made orthonormal after each step by a QR decomposition, while pyreft trains a parametrization of such matrices;
each answer has the same weight, regardless of its length; there is no dropout; the learning rate is in units of
activations, b is capped, and held-out pairs decide when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import TeacherForcing
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress, check_layers, versions
from trimtab.learn.descent import Descent
from trimtab.learn.inputs import pairs_for
from trimtab.learn.parameters import ParameterSet, nonzero_sites
from trimtab.learn.preferences import Plan, Preference, answers_logprobs, fit
from trimtab.steering import Card, ReadWrite, Site, Steering
from trimtab.text.pairs import Pairs, as_pairs, digest

if TYPE_CHECKING:
    from trimtab.lm import LM


DEPTHS = (0.2, 0.4, 0.6, 0.8)
MAX_DOSE = 1.0
"""The maximum of the elements of b, relative to the norm of the typical activation."""


@dataclass(frozen=True)
class RotationParameters:
    """The parameters at one site: `h + Rᵀ (W h + b - R h)`, in units of the activations there.

    `scale` is the root mean square of an activation's elements at the site, and d is the width. `rotation` is √d R and
    `source` is √d W, both `[rank, width]`. `bias` `[rank]` is b divided by the norm of a typical activation,
    `scale` √d. So one learning rate suits all three at every site.
    """

    scale: float
    rotation: Tensor
    source: Tensor
    bias: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.rotation, self.source, self.bias

    @property
    def sqrt_width(self) -> float:
        return math.sqrt(self.rotation.shape[1])

    def change(self, factor: float, x: Tensor) -> Tensor:
        """The change of activations `[tokens, width]`, times `factor`."""
        read = (self.source - self.rotation) / self.sqrt_width
        rotated = x.float() @ read.T + self.scale * self.sqrt_width * self.bias
        return factor * rotated @ self.rotation / self.sqrt_width

    def operation(self) -> ReadWrite:
        """The equivalent operation: it reads along W - R, with the bias b, and writes along R."""
        rotation, source, bias = (tensor.detach().double().cpu() for tensor in self.tensors)
        read, bias = (source - rotation) / self.sqrt_width, self.scale * self.sqrt_width * bias
        return ReadWrite(read.float(), (rotation / self.sqrt_width).float(), bias.float())


class RotationParameterSet(ParameterSet[RotationParameters]):
    """The parameters of all sites."""

    @classmethod
    def initial(
        cls, scales: Mapping[Site, float], widths: Mapping[Site, int], rank: int, seed: int, device: torch.device
    ) -> RotationParameterSet:
        """The initial parameters: random R, W = R and b = 0, which change nothing.

        Args:
            scales: The root mean square of an activation's elements, by site.
            widths: The width of activations, by site.
            rank: The number of rows of R.
            seed: The seed of R.
            device: The device of the tensors.

        Raises:
            TrimtabError: Activations are zero or not finite, or the rank is above the width.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = {}
        for site in nonzero_sites(scales):
            if rank > widths[site]:
                raise TrimtabError(f"the rank is {rank}, and activations at {site} are only {widths[site]} wide")
            rotation = orthonormal(torch.randn(rank, widths[site], generator=generator)) * math.sqrt(widths[site])
            tensors = (rotation, rotation.clone(), torch.zeros(rank))
            parts[site] = RotationParameters(
                scales[site], *(tensor.float().to(device).requires_grad_() for tensor in tensors)
            )
        return cls(parts)

    @torch.no_grad()
    def cap(self, dose: float) -> None:
        """Make the rows of R orthonormal again, and clamp b to `dose` times the norm of the typical activation."""
        for part in self.by_site.values():
            part.rotation.copy_(orthonormal(part.rotation) * part.sqrt_width)
            part.bias.clamp_(-dose, dose)


@keywords
def learn_loreft(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    rank: int = 4,
    steps: int = 40,
    rate: float = 0.01,
    held_out: Pairs | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Steering:
    """Learn to generate the positive answers, by a low-rank edit of activations.

    A `KeyboardInterrupt` during gradient descent ends it with the best steering so far, which the card records.

    Args:
        lm: The model; its weights don't change.
        pairs: Answers to prompts. The positives are learned; the negatives are only measured. Each side is read under
            its own system prompt and messages.
        layers: Blocks to edit after (default: four, at 0.2, 0.4, 0.6 and 0.8 of the depth).
        rank: The dimension of the subspace at each block.
        steps: The maximum number of steps of gradient descent; it stops early when held-out pairs no longer improve.
        rate: Adam's learning rate, in units of the activations' root mean square.
        held_out: Held-out pairs, which decide when to stop; default: one prompt in eight of `pairs`.
        seed: The seed of the initial subspaces and of the order of the pairs.
        progress: `progress(done, total)`: pairs read, then steps.

    Returns:
        One `ReadWrite` per layer, of strength 1, with R in `write` and W - R in `read`. Its card has the loss and both
        sides' log-probabilities per token, before and after.

    Raises:
        TrimtabError: There are no pairs, pairs of another shape, unknown layers, or invalid options.
    """
    pairs = pairs_for(lm, pairs, "training")
    held_out = None if held_out is None else as_pairs(held_out)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise TrimtabError(f"the rank is a whole number, 1 or more, got {rank!r}")
    chosen = check_layers(lm, _layers(lm) if layers is None else layers, DEPTHS[0])
    parameters, measured = fit(
        lm,
        pairs,
        chosen,
        initialize=lambda scales, widths, device: RotationParameterSet.initial(scales, widths, rank, seed, device),
        objective=loreft_loss,
        plan=Plan(factors=(1.0,), evaluation_factors=(1.0,), texts_in_memory=lambda pair: [pair.positive]),
        descent=Descent(steps=steps, rate=rate, max_dose=MAX_DOSE, seed=seed),
        held_out=held_out,
        progress=progress,
    )
    options = {"layers": chosen, "rank": rank, "steps": steps, "rate": rate, "seed": seed}
    data = digest([*pairs, *(held_out or ())])
    card = Card("loreft", lm.identity, data, options, measured, versions())
    return Steering(parameters.edits(), card)


def loreft_loss(
    run: TeacherForcing, trained: RotationParameterSet, pairs: Sequence[Preference], factors: Sequence[float]
) -> Tensor:
    """The cross-entropy of the positive answers: the mean over an answer's tokens, summed over pairs."""
    texts = [pair.positive for pair in pairs]
    totals = answers_logprobs(run, texts, trained.changes(), factors)
    return -(totals / torch.tensor([len(text.answer) for text in texts], device=totals.device)).sum()


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormalize rows `[rank, width]` one after the other (Gram-Schmidt, by a QR decomposition).

    Computed in float64 on the CPU, so that the result is the same on every device.
    """
    q, r = torch.linalg.qr(rows.detach().double().cpu().T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).T


def _layers(lm: LM) -> list[int]:
    last = lm.layout.layers - 1
    return sorted({min(last, round(depth * lm.layout.layers)) for depth in DEPTHS})
