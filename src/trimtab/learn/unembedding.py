"""The unembedding: directions after the last block that read a token's logit, and that change only this logit.

Between the last block and the logits are a norm and a matrix. With `z` the activation divided by its root mean square

    logit_k(x) - mean of all logits  ~  r_k . z    r_k: row k of the matrix, minus the mean row, times the norm's gain
    d_k = C⁻¹ r_k / (r_k . C⁻¹ r_k)                C: the covariance of all rows

Adding `d_k` raises token k's logit by one nat, and of all directions that do so it changes the other tokens' logits
least, averaged over the vocabulary. (Adding the row itself would change thousands of them, since rows are similar.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import PromptAnswer, group_by_pass, teacher_forcing
from trimtab.engines.transformers.weights import in_memory
from trimtab.errors import UnsupportedError
from trimtab.steering import Site

if TYPE_CHECKING:
    from trimtab.lm import LM

SKIPPED_TOKENS = 2
"""The number of tokens at the beginning that aren't read: in many models their activations have outsized norms."""
RIDGE = 0.02
"""The ridge term, relative to the mean diagonal of the rows' covariance."""
MIN_EXPLAINED = 0.9
"""The minimum share of the logits' variance that has to be explained."""
CHUNK = 8192


@dataclass(frozen=True)
class Unembedding:
    """`rows[k] @ x / typical` is token `k`'s logit minus the mean logit, for an activation with the typical norm.

    Args:
        site: The residual stream after the last block.
        rows: `[vocabulary, width]`, in nats for an activation whose elements' root mean square is 1.
        covariance: The covariance of the rows, `[width, width]`, float64.
        typical_scale: The root mean square of an activation's elements, the median over tokens.
        explained: The share of the logits' variance, over the vocabulary, that the rows explain.
    """

    site: Site
    rows: Tensor
    covariance: Tensor
    typical_scale: float
    explained: float

    def read(self, token: int) -> Tensor:
        """The direction that reads the token's logit from an activation, in nats: `[width]`."""
        return self.rows[token].double() / self.typical_scale

    def write(self, token: int) -> Tensor:
        """The direction that raises the token's logit by one nat and others as little as possible: `[width]`."""
        row = self.rows[token].double()
        ridge = RIDGE * float(self.covariance.diagonal().mean())
        held = self.covariance + ridge * torch.eye(len(row), dtype=row.dtype, device=row.device)
        solved = torch.linalg.solve(held, row)
        return self.typical_scale * solved / (row @ solved)


@torch.no_grad()
def unembedding(lm: LM, prompts: Sequence[str]) -> Unembedding:
    """Read a model's unembedding matrix, and estimate the effect of the norm before it from a few prompts.

    Args:
        lm: The model, on the transformers engine.
        prompts: Any prompts; a few are enough.

    Returns:
        The unembedding.

    Raises:
        UnsupportedError: The prompts are too short, or the model's logits can't be computed from its output embeddings
            and a norm.
    """
    site = Site(lm.layout.layers - 1)
    texts = [
        PromptAnswer(tuple(ids[:SKIPPED_TOKENS]), tuple(ids[SKIPPED_TOKENS:]))
        for ids in map(lm.encode, prompts)
        if len(ids) > SKIPPED_TOKENS + 1
    ]
    if not texts:
        raise UnsupportedError(f"all {len(prompts)} prompts are too short to read; give longer ones")
    x, logits = _read(lm, texts, site)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    z = x / rms
    module = lm.model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise UnsupportedError(f"{type(lm.model).__name__} has no readable matrix of output embeddings")
    with in_memory(module):
        rows = module.weight.detach().float()
    if rows.shape != (logits.shape[1], x.shape[1]):
        raise UnsupportedError(
            f"the output embeddings have shape {list(rows.shape)}, but there are {logits.shape[1]} logits and"
            f" activations of width {x.shape[1]}"
        )
    rows = rows - rows.mean(0)
    # recover the normalized activations from the logits, then estimate the norm's gain for each element
    normed = _product(logits, rows) @ torch.linalg.pinv(_gram_matrix(rows), hermitian=True)
    gain = (normed * z).sum(0) / z.square().sum(0)
    rows = rows * gain.to(rows)
    predicted = torch.cat([(z.to(rows) @ part.T) for part in rows.split(CHUNK)], 1).double()
    centred_logits = logits.double() - logits.double().mean(1, keepdim=True)
    explained = 1 - float((centred_logits - predicted).square().sum() / centred_logits.square().sum())
    if not explained >= MIN_EXPLAINED:
        raise UnsupportedError(
            f"the logits of {type(lm.model).__name__} can't be predicted from its output embeddings and a norm"
            f" (explained share of their variance: {explained:.2f}, at least {MIN_EXPLAINED} is needed), so a word's"
            " logit can't be moved there; learn from prompts instead"
        )
    return Unembedding(site, rows, _gram_matrix(rows) / len(rows), float(rms.median()), explained)


def _read(lm: LM, texts: Sequence[PromptAnswer], site: Site) -> tuple[Tensor, Tensor]:
    """Activations after the last block `[tokens, width]`, float64, and their logits `[tokens, vocabulary]`."""
    states: list[Tensor] = []
    logits: list[Tensor] = []
    with teacher_forcing(lm.model, lm.layout, [site]) as run, torch.no_grad():
        for numbers in group_by_pass(lm.model, texts):
            some = [texts[i] for i in numbers]
            states += run.states(some, {}, [site])[site]
            logits += run.logits(some, {})
    return torch.cat(states).double(), torch.cat(logits)


def _gram_matrix(rows: Tensor) -> Tensor:
    """`rows.T @ rows`, `[width, width]`, float64."""
    moment = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        moment += (part.T @ part).double()
    return moment


def _product(logits: Tensor, rows: Tensor) -> Tensor:
    """`logits @ rows`, float64. Since the rows have mean 0, it equals the product with centered logits, as computed."""
    centred = logits - logits.mean(1, keepdim=True)
    return (centred.to(rows) @ rows).double()
