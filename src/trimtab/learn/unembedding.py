"""What the last block's output says about each token of the vocabulary, and how to move one token's logit alone.

Between the last block and the logits stand a norm and a matrix. With `z` the activation over its root mean square

    logit_k(x) - mean of all logits  ~  r_k . z    r_k: row k of the matrix, less the mean row, times the norm's gain
    d_k = C⁻¹ r_k / (r_k . C⁻¹ r_k)                C: the covariance of all rows

Adding `d_k` raises token k's logit by one nat, and of all directions that do so it moves the other tokens' logits
least, in the mean over the vocabulary. (The row itself moves thousands of them: rows have much in common.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import Forced, forcing, passes
from trimtab.engines.transformers.weights import in_memory
from trimtab.errors import UnsupportedError
from trimtab.steering import Site

if TYPE_CHECKING:
    from trimtab.lm import LM

FIRST = 2
"""Tokens at the beginning that aren't read: in many models they are far longer than all others."""
RIDGE = 0.02
"""Of the mean diagonal of the rows' covariance."""
LEAST = 0.9
"""The share of the logits' variance that has to be told right."""
CHUNK = 8192


@dataclass(frozen=True)
class Unembedding:
    """`rows[k] @ x / typical` is the logit of token `k`, less the mean of all, of an activation of typical length.

    Args:
        site: The residual stream after the last block.
        rows: `[vocabulary, width]`, in nats for an activation whose elements' root mean square is 1.
        covariance: Of the rows, `[width, width]`, float64.
        typical: The root mean square of an activation's elements, the median over tokens.
        explained: The share of the logits' variance, over the vocabulary, that the rows tell right.
    """

    site: Site
    rows: Tensor
    covariance: Tensor
    typical: float
    explained: float

    def read(self, token: int) -> Tensor:
        """What reads the token's logit from an activation, in nats: `[width]`."""
        return self.rows[token].double() / self.typical

    def write(self, token: int) -> Tensor:
        """What raises the token's logit by one nat where it is added, and all others as little as may be: `[width]`."""
        row = self.rows[token].double()
        ridge = RIDGE * float(self.covariance.diagonal().mean())
        held = self.covariance + ridge * torch.eye(len(row), dtype=row.dtype, device=row.device)
        solved = torch.linalg.solve(held, row)
        return self.typical * solved / (row @ solved)


@torch.no_grad()
def unembedding(lm: LM, prompts: Sequence[str]) -> Unembedding:
    """Read a model's unembedding, and what the norm before it does to the activations of a few prompts.

    Args:
        lm: The model, on the transformers engine.
        prompts: Some; a few tell what the norm does.

    Raises:
        UnsupportedError: The model's logits aren't told by its unembedding and a norm.
    """
    site = Site(lm.layout.layers - 1)
    texts = [Forced(tuple(ids[:FIRST]), tuple(ids[FIRST:])) for ids in map(lm.encode, prompts) if len(ids) > FIRST + 1]
    if not texts:
        raise UnsupportedError(f"all {len(prompts)} prompts are too short to read; give longer ones")
    x, logits = _read(lm, texts, site)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    z = x / rms
    module = lm.model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise UnsupportedError(f"{type(lm.model).__name__} has no matrix of output embeddings that could be read")
    with in_memory(module):
        rows = module.weight.detach().float()
    if rows.shape != (logits.shape[1], x.shape[1]):
        raise UnsupportedError(
            f"the output embeddings are {list(rows.shape)}, and there are {logits.shape[1]} logits of activations of"
            f" width {x.shape[1]}"
        )
    rows = rows - rows.mean(0)
    # the activations after the norm, as the logits have them; then the norm's gain, element by element
    normed = _product(logits, rows) @ torch.linalg.pinv(_moment(rows), hermitian=True)
    gain = (normed * z).sum(0) / z.square().sum(0)
    rows = rows * gain.to(rows)
    predicted = torch.cat([(z.to(rows) @ part.T) for part in rows.split(CHUNK)], 1).double()
    wanted = logits.double() - logits.double().mean(1, keepdim=True)
    explained = 1 - float((wanted - predicted).square().sum() / wanted.square().sum())
    if not explained >= LEAST:
        raise UnsupportedError(
            f"the logits of {type(lm.model).__name__} aren't told by its output embeddings and a norm (share of their"
            f" variance: {explained:.2f}, at least {LEAST} is needed), so a word's logit can't be moved there; learn"
            " from prompts instead"
        )
    return Unembedding(site, rows, _moment(rows) / len(rows), float(rms.median()), explained)


def _read(lm: LM, texts: Sequence[Forced], site: Site) -> tuple[Tensor, Tensor]:
    """Activations after the last block `[tokens, width]`, float64, and the logits there `[tokens, vocabulary]`."""
    states: list[Tensor] = []
    logits: list[Tensor] = []
    with forcing(lm.model, lm.layout, [site]) as run, torch.no_grad():
        for numbers in passes(lm.model, texts):
            some = [texts[i] for i in numbers]
            states += run.states(some, {}, [site])[site]
            logits += run.logits(some, {})
    return torch.cat(states).double(), torch.cat(logits)


def _moment(rows: Tensor) -> Tensor:
    """The sum of the rows' products, `[width, width]`, float64."""
    moment = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(CHUNK):
        moment += (part.T @ part).double()
    return moment


def _product(logits: Tensor, rows: Tensor) -> Tensor:
    """`logits @ rows`, float64; the rows have mean 0, so that it is that of the logits less their mean."""
    centred = logits - logits.mean(1, keepdim=True)
    return (centred.to(rows) @ rows).double()
