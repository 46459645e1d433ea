"""The refusal direction of a model, and how a steering lies along it, layer by layer.

Arditi et al., Refusal in Language Models Is Mediated by a Single Direction, 2406.11717, section 2.3:
r[l] = mean over harmful requests - mean over harmless ones, at the last prompt token, of the stream after block l.
That steering vectors move refusal by their overlap with it was found by 2603.24543.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import ABItem
from trimtab.steering import Ablate, Add, ReadWrite, SetProjection, Site, Steering
from trimtab.steering.operations import Directed
from trimtab.steering.scaled import AddScaled
from trimtab.steering.tensors import to_float64
from trimtab.text.letters import ask_prompt, question_prompt

if TYPE_CHECKING:
    from trimtab.lm import LM

STREAM = ("residual", "block_input", "attention", "mlp")
"""Sites at which what is written goes into the residual stream as it is."""


@dataclass(frozen=True)
class Refusal:
    """Unit directions `[layers, width]` in float64 from harmless towards harmful requests, and what they tell apart.

    Args:
        directions: One a layer, of the stream after its block.
        gaps: How far apart the means of both kinds lie along each, in units of the stream.
        told: At each layer, the share of pairs of requests that nothing was learned from, of which the harmful one lies
            further along the direction.
    """

    directions: Tensor
    gaps: Tensor
    told: tuple[float, ...]

    def at(self, site: Site) -> Tensor:
        """The direction `[width]` that what is written at a site meets: a block's input is the output of the last."""
        return self.directions[max(0, site.layer - (site.kind == "block_input"))]


@dataclass(frozen=True)
class Overlap:
    """How one edit lies along a direction: the cosine, or for one that writes several directions, the share of the
    direction that lies in their span. `signed` says whether its sign means something: an ablation has none."""

    layer: int
    site: str
    cosine: float
    signed: bool


def stream(lm: LM, prompts: Sequence[str], steering: Steering | None = None, transfer: bool = False) -> Tensor:
    """The residual stream at the last prompt token after every block, `[prompts, layers, width]` in float64."""
    sites = [Site(layer) for layer in range(lm.layout.layers)]
    read = lm.capture(list(prompts), sites, steering=steering, transfer=transfer)
    return torch.stack([torch.stack([to_float64(one[site][-1]) for site in sites]) for one in read])


def refusal_direction(lm: LM, learn: tuple[Sequence[str], Sequence[str]], test: tuple[Tensor, Tensor]) -> Refusal:
    """The direction, learned from harmful and harmless requests, and looked at on the streams of others.

    Raises:
        TrimtabError: At a layer both kinds read alike.
    """
    harmful, harmless = (stream(lm, prompts).mean(0) for prompts in learn)
    difference = harmful - harmless
    gaps = difference.norm(dim=-1)
    if not bool((gaps > 0).all()):
        layer = int((gaps == 0).nonzero()[0])
        raise TrimtabError(f"layer {layer}: harmful and harmless requests read alike there; no refusal direction")
    directions = difference / gaps[:, None]
    on, off = ((values * directions).sum(-1) for values in test)
    pairs = min(len(on), len(off))
    told = (on[:pairs] > off[:pairs]).double().mean(0)
    return Refusal(directions, gaps, tuple(told.tolist()))


def behaviour_directions(lm: LM, items: Sequence[ABItem]) -> Tensor:
    """Unit directions `[layers, width]` of a behaviour, as CAA (2312.06681, section 3) reads them: at the answer's
    letter, the mean of matching answers minus that of the others.

    Raises:
        TrimtabError: Both sides read alike at a layer.
    """
    groups = []
    for item in items:
        prompt = question_prompt(lm.tokenizer, item.question)
        asked = ask_prompt(lm.tokenizer, prompt, (item.matching, item.other))
        sides = ([*asked.ids, asked.letters[letter]] for letter in (item.matching, item.other))
        groups.append([Text(ids, (len(ids) - 1,)) for ids in sides])
    sites = [Site(layer) for layer in range(lm.layout.layers)]
    total = torch.zeros(len(sites), lm.layout.width, dtype=torch.float64)
    for batch in lm.read(groups, sites):
        for n, site in enumerate(sites):
            for matching, other in batch.values[site]:
                total[n] += to_float64(matching[0]) - to_float64(other[0])
    norms = total.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        raise TrimtabError(
            "matching and other answers read alike at some layer, so the behaviour has no direction there"
        )
    return total / norms


def overlaps(steering: Steering, refusal: Refusal) -> list[Overlap]:
    """The overlap of each edit that writes into the residual stream, in the order of the edits."""
    found = []
    for edit in steering.edits:
        written = written_by(edit.operation) if edit.site.kind in STREAM else None
        if written is None or edit.strength == 0 or not bool(written.any()):
            continue
        r = refusal.at(edit.site)
        if len(written) == 1:
            signed = isinstance(edit.operation, (Add, AddScaled))
            turned = -1.0 if signed and edit.strength < 0 else 1.0
            cosine = turned * float(written[0] @ r / written[0].norm())
        else:
            signed, cosine = False, float((span(written).T @ r).norm())
        found.append(Overlap(edit.site.layer, str(edit.site), cosine, signed))
    return found


def span(rows: Tensor) -> Tensor:
    """An orthonormal basis `[width, rank]` of what these rows span."""
    _, sizes, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    return basis[sizes > 1e-10 * sizes.max()].T


def written_by(operation: Any) -> Tensor | None:
    """The directions `[rank, width]` along which an operation changes an activation; `None` where it has none."""
    if isinstance(operation, ReadWrite):
        return operation.write.double()
    if isinstance(operation, Directed) and isinstance(operation, (Add, AddScaled, SetProjection, Ablate)):
        return operation.direction.double()[None]
    return None


def shifts(refusal: Refusal, before: Tensor, after: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """How far each arm moves requests along the direction at each layer, as a share of the gap between both kinds:
    1 makes harmless requests look as harmful ones do, -1 the reverse.

    Streams are `[prompts, layers, width]`, those of `before` unsteered.
    """
    base = (before * refusal.directions).sum(-1).mean(0)
    return {
        arm: (((values * refusal.directions).sum(-1).mean(0) - base) / refusal.gaps).tolist()
        for arm, values in after.items()
    }
