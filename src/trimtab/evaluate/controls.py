"""Control steerings: what any push of the same strength would do, whatever its direction or the phrase it is at."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.files.steering_file import steering_digest
from trimtab.steering import Add, Card, Positions, ReadWrite, SetProjection, Site, Steering
from trimtab.steering.operations import Directed
from trimtab.steering.random_edits import random_edits
from trimtab.steering.tensors import to_float64
from trimtab.text.chat import has_template
from trimtab.text.spans import Emphasis, Part

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt


def means_for(lm: LM, steerings: Iterable[Steering], prompts: Sequence[Prompt]) -> dict[Site, Tensor] | None:
    """The means that `random_like` needs in order to push as hard as these steerings.

    The mean activation of the prompts' last tokens, `[width]` in float64, for each site with a `SetProjection` or
    `ReadWrite`. `None` if there is no such site; then no forward pass is run.
    """
    edits = [edit for steering in steerings for edit in steering.edits]
    sites = sorted({edit.site for edit in edits if isinstance(edit.operation, (ReadWrite, SetProjection))})
    if not sites:
        return None
    activations = lm.capture(list(prompts), sites)
    return {site: torch.stack([to_float64(captured[site][-1]) for captured in activations]).mean(0) for site in sites}


def random_like(steering: Steering, seed: int = 0, means: Mapping[Site, Tensor] | None = None) -> Steering:
    """The same edits in random directions: a control that shows what the learned direction is worth.

    Sites, positions, strengths, gates and kinds of operation stay. Each direction is replaced by one drawn uniformly
    from the sphere of the same norm; edits that share a direction share the random one. An `Ablate` along a random
    direction removes little, so that control is weak. Masks and thresholds of elements are shuffled. The directions
    that a `ReadWrite` reads and writes are rotated together, so that the lengths and angles among them stay, and so is
    the plane of a `RotateInPlane`.

    A `SetProjection` pushes by `target - x.u`, which depends on the activation. `means` has an activation `[width]` for
    each site, and sets the new target so that a mean activation is pushed as far as before: `target' = m.r + (target -
    m.u)`. Likewise, the rows of a `ReadWrite` read the same values from it as before. Without `means`, the target stays
    as it is, so the size of the push differs; compare the doses.

    The same steering and seed give the same control. Raises `TrimtabError` for an operation without a direction, a
    missing mean, or a mean of another width.
    """
    models = steering.card.models
    card = Card(
        method="random",
        model=models[0] if models else None,
        options={"seed": seed, "like": steering_digest(steering), "targets": "shifted" if means else "kept"},
    )
    return Steering(random_edits(steering, seed, means), card)


def orthogonal_like(steering: Steering, seed: int = 0, means: Mapping[Site, Tensor] | None = None) -> Steering:
    """`random_like`, with additions and projections made orthogonal to the steering's own directions.

    A random direction overlaps a little with any other, and in a narrow model not so little. Operations other than
    `Add` and `SetProjection` are the same as in `random_like`.

    Raises:
        TrimtabError: As in `random_like`.
    """
    control = random_like(steering, seed, means)
    edits = []
    for old, new in zip(steering.edits, control.edits, strict=True):
        if not isinstance(old.operation, (Add, SetProjection)):
            edits.append(new)
            continue
        assert isinstance(new.operation, Directed)
        learned, random_direction = old.operation.direction.double(), new.operation.direction.double()
        if not learned.any():  # a zero vector has no orthogonal part to scale
            edits.append(old)
            continue
        orthogonal_part = random_direction - (random_direction @ learned) * learned / learned.norm() ** 2
        orthogonal_part = (orthogonal_part * random_direction.norm() / orthogonal_part.norm()).to(
            old.operation.direction.dtype
        )
        change: dict[str, object] = {"direction": orthogonal_part}
        if isinstance(old.operation, SetProjection) and means is not None:
            mean = to_float64(means[old.site])
            change["target"] = float(mean @ orthogonal_part.double()) + old.operation.target - float(mean @ learned)
        edits.append(replace(new, operation=replace(new.operation, **change)))  # type: ignore[arg-type]
    options = {**control.card.options, "orthogonal": True}
    return Steering(tuple(edits), replace(control.card, options=options))


def at_random_span(lm: LM, steering: Steering, prompt: Prompt, phrases: Emphasis | Sequence[Emphasis]) -> Steering:
    """The same edits at a random span of the prompt: a control that shows what the choice of the phrase is worth.

    Args:
        lm: The model.
        steering: A steering that emphasizes these phrases of this prompt.
        prompt: The prompt.
        phrases: The phrases; the span is as long as all of them together, and is drawn by `random_span`.

    Raises:
        TrimtabError: A phrase isn't in the prompt.
    """
    return steering.at(Positions.span(*random_span(lm, prompt, phrases)))


def random_span(lm: LM, prompt: Prompt, phrases: Emphasis | Sequence[Emphasis]) -> tuple[int, int]:
    """A span `(start, stop)` of the user's message that is as long as the phrases and overlaps them as little as
    possible; of several, one is drawn. The same prompt gives the same span.

    Without a chat template, the span is anywhere in the prompt, except for a BOS token.

    Raises:
        TrimtabError: A phrase isn't in the prompt.
    """
    spans = lm.spans(prompt, phrases)
    if not isinstance(prompt, str) or has_template(lm.tokenizer):
        ((first, last), *_) = lm.spans(prompt, Part("user"))
    else:
        ids = lm.encode(prompt)
        first, last = int(ids[0] == lm.bos_token_id), len(ids)
    taken = {token for start, stop in spans for token in range(start, stop)}
    length = min(len(taken), last - first)
    overlap = {at: len(taken & set(range(at, at + length))) for at in range(first, last - length + 1)}
    least = min(overlap.values())
    at = random.Random(str(prompt)).choice([at for at, shared in overlap.items() if shared == least])
    return at, at + length
