"""The refusal directions of a model, and the overlap of a steering with them, layer by layer.

Arditi et al., Refusal in Language Models Is Mediated by a Single Direction, 2406.11717, section 2.3:
r[l] = mean over harmful requests - mean over harmless ones, at the last prompt token, of the stream after block l.
According to 2603.24543, steering vectors change refusal depending on their overlap with it. Lee et al. (2409.05907)
read it in the answer: a[l] = mean over requests of (refusing answer - complying answer), averaged over the answers'
tokens. If a model distinguishes harmful requests but answers them anyway, the second one matters.
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
from trimtab.text.letters import letter_question_from_prompt, question_prompt

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

REQUESTS, ANSWERS = "requests", "answers"
"""Which refusal direction: of harmful requests, or of refusing answers."""
REFUSING = (
    "I'm sorry, but that is something that I won't help with.",
    "I can't do that, because somebody could be harmed.",
    "Sorry, I have to decline. This would be wrong.",
    "No, I am not able to assist you with this.",
)
COMPLYING = (
    "Certainly, this is how it is done, step by step.",
    "Yes, of course. You begin with the following.",
    "Sure, I am glad to help. Let us start.",
    "All right, here is everything that you need.",
)
"""Openings of answers, used in turn. The lead of refusing answers is measured with other ones."""
STREAM = ("residual", "block_input", "attention", "mlp")
"""Sites whose output is added to the residual stream without another projection."""


@dataclass(frozen=True)
class RefusalDirections:
    """Unit directions `[layers, width]` towards refusal, in float64, and how well they classify requests.

    Args:
        directions: For each layer, the direction in the stream after its block from harmless to harmful requests.
        answers: For each layer, the direction from complying to refusing answers.
        gaps: For each layer, the distance between the means of harmless and harmful requests.
        pair_accuracy: For each layer, the share of pairs of held-out requests in which the harmful one projects further
            along the direction than the harmless one.
    """

    directions: Tensor
    answers: Tensor
    gaps: Tensor
    pair_accuracy: tuple[float, ...]

    def at(self, site: Site) -> dict[str, Tensor]:
        """The directions `[width]` for an edit at a site; for a block's input, those after the previous block."""
        layer = max(0, site.layer - (site.kind == "block_input"))
        return {REQUESTS: self.directions[layer], ANSWERS: self.answers[layer]}


@dataclass(frozen=True)
class Overlap:
    """The overlap of one edit with a refusal direction.

    Args:
        of: Which refusal direction: `REQUESTS` or `ANSWERS`.
        layer: The layer of the edit.
        site: The site of the edit.
        cosine: The cosine; for an edit that writes several directions, the share of the refusal direction in their
            span.
        signed: Whether the sign has a meaning; that of an ablation has none.
    """

    of: str
    layer: int
    site: str
    cosine: float
    signed: bool


def capture_stream(lm: LM, prompts: Sequence[str], steering: Steering | None = None, transfer: bool = False) -> Tensor:
    """The residual stream at the last prompt token after every block, `[prompts, layers, width]` in float64."""
    sites = [Site(layer) for layer in range(lm.layout.layers)]
    activations = lm.capture(list(prompts), sites, steering=steering, transfer=transfer)
    return torch.stack([torch.stack([to_float64(captured[site][-1]) for site in sites]) for captured in activations])


def refusal_direction(
    lm: LM, learn: tuple[Sequence[str], Sequence[str]], test: tuple[Tensor, Tensor]
) -> RefusalDirections:
    """Learn both directions from harmful and harmless requests, and test them on the streams of other requests.

    Args:
        lm: The model.
        learn: The harmful and the harmless requests to learn from.
        test: The streams of other harmful and harmless requests, as returned by `capture_stream`.

    Raises:
        TrimtabError: At some layer, both kinds have the same mean activation.
    """
    harmful, harmless = (capture_stream(lm, prompts).mean(0) for prompts in learn)
    difference = harmful - harmless
    gaps = difference.norm(dim=-1)
    if not bool((gaps > 0).all()):
        layer = int((gaps == 0).nonzero()[0])
        raise TrimtabError(
            f"layer {layer}: harmful and harmless requests have the same mean activation; no refusal direction"
        )
    directions = difference / gaps[:, None]
    answers = _answers_direction(lm, learn[0])
    harmful_projections, harmless_projections = ((values * directions).sum(-1) for values in test)
    pairs = min(len(harmful_projections), len(harmless_projections))
    shares = (harmful_projections[:pairs] > harmless_projections[:pairs]).double().mean(0)
    return RefusalDirections(directions, answers, gaps, tuple(shares.tolist()))


def _answers_direction(lm: LM, requests: Sequence[str]) -> Tensor:
    groups = []
    for n, request in enumerate(requests):
        ids = lm.encode(request)
        sides = (
            lm.tokenizer(side[n % len(side)], add_special_tokens=False)["input_ids"] for side in (REFUSING, COMPLYING)
        )
        groups.append([Text([*ids, *side], range(len(ids), len(ids) + len(side))) for side in sides])
    return _difference(lm, groups, "refusing and complying answers")


def behaviour_directions(lm: LM, items: Sequence[ABItem]) -> Tensor:
    """Unit directions `[layers, width]` of a behaviour, as CAA (2312.06681, section 3) reads them: at the answer's
    letter, the mean of matching answers minus that of the others.

    Raises:
        TrimtabError: At some layer, both sides have the same mean activation.
    """
    groups = []
    for item in items:
        prompt = question_prompt(lm.tokenizer, item.question)
        question = letter_question_from_prompt(lm.tokenizer, prompt, (item.matching, item.other))
        sides = ([*question.ids, question.letters[letter]] for letter in (item.matching, item.other))
        groups.append([Text(ids, (len(ids) - 1,)) for ids in sides])
    return _difference(lm, groups, "matching and other answers")


def _difference(lm: LM, groups: Sequence[Sequence[Text]], what: str) -> Tensor:
    """The unit mean difference `[layers, width]` of the two sides of each group, each averaged over its positions."""
    sites = [Site(layer) for layer in range(lm.layout.layers)]
    total = torch.zeros(len(sites), lm.layout.width, dtype=torch.float64)
    for batch in lm.read(groups, sites):
        for n, site in enumerate(sites):
            for first, other in batch.values[site]:
                total[n] += to_float64(first).mean(0) - to_float64(other).mean(0)
    norms = total.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        raise TrimtabError(
            f"layer {int((norms == 0).nonzero()[0, 0])}: {what} have the same mean activation, so there is no direction"
        )
    return total / norms


def overlaps(steering: Steering, refusal: RefusalDirections) -> list[Overlap]:
    """The overlaps of each edit that writes into the residual stream, in the order of the edits."""
    results = []
    for edit in steering.edits:
        written = written_by(edit.operation) if edit.site.kind in STREAM else None
        if written is None or edit.strength == 0 or not bool(written.any()):
            continue
        for kind, r in refusal.at(edit.site).items():
            if len(written) == 1:
                signed = isinstance(edit.operation, (Add, AddScaled))
                turned = -1.0 if signed and edit.strength < 0 else 1.0
                cosine = turned * float(written[0] @ r / written[0].norm())
            else:
                signed, cosine = False, float((orthonormal_basis(written).T @ r).norm())
            results.append(Overlap(kind, edit.site.layer, str(edit.site), cosine, signed))
    return results


def orthonormal_basis(rows: Tensor) -> Tensor:
    """An orthonormal basis `[width, rank]` of the span of these rows."""
    _, sizes, basis = torch.linalg.svd(rows.double(), full_matrices=False)
    return basis[sizes > 1e-10 * sizes.max()].T


def written_by(operation: Any) -> Tensor | None:
    """The directions `[rank, width]` along which an operation changes an activation; `None` if it has no fixed ones."""
    if isinstance(operation, ReadWrite):
        return operation.write.double()
    if isinstance(operation, Directed) and isinstance(operation, (Add, AddScaled, SetProjection, Ablate)):
        return operation.direction.double()[None]
    return None


def shifts(refusal: RefusalDirections, before: Tensor, after: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """How far each arm moves requests along the direction at each layer, as a share of the gap between both kinds:
    1 makes harmless requests look as harmful ones do, -1 the reverse.

    Streams are `[prompts, layers, width]`, those of `before` unsteered.
    """
    base = (before * refusal.directions).sum(-1).mean(0)
    return {
        arm: (((values * refusal.directions).sum(-1).mean(0) - base) / refusal.gaps).tolist()
        for arm, values in after.items()
    }
