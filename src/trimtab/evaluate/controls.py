"""Controls: what any push of the same strength would do, whatever its direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.files.steering_file import steering_digest
from trimtab.steering import Add, Card, ReadWrite, SetProjection, Site, Steering
from trimtab.steering.operations import Directed
from trimtab.steering.random_edits import random_edits
from trimtab.steering.tensors import to_float64

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt


def means_for(lm: LM, steerings: Iterable[Steering], prompts: Sequence[Prompt]) -> dict[Site, Tensor] | None:
    """What `random_like` needs to push as hard as these steerings do: the mean of the prompts' last tokens, `[width]`
    in float64, at each site where a projection is set or read; `None` where none is, and nothing is read."""
    edits = [edit for steering in steerings for edit in steering.edits]
    sites = sorted({edit.site for edit in edits if isinstance(edit.operation, (ReadWrite, SetProjection))})
    if not sites:
        return None
    read = lm.capture(list(prompts), sites)
    return {site: torch.stack([to_float64(captured[site][-1]) for captured in read]).mean(0) for site in sites}


def random_like(steering: Steering, seed: int = 0, means: Mapping[Site, Tensor] | None = None) -> Steering:
    """The same edits in random directions: a control for what the learned direction is worth.

    Sites, positions, strengths, gates and kinds of operation stay. Each direction becomes one drawn evenly from the
    sphere, of the same norm; edits that share a direction share the random one. A random direction of an `Ablate`
    removes what little lies along it, so that control is a weak one. Masks and thresholds of elements are shuffled.
    What a `ReadWrite` reads and writes is turned as one, so that lengths and angles among it stay, and so is the plane
    of a `RotateInPlane`.

    A `SetProjection` pushes by `target - x.u`, which depends on the activation. `means`, an activation `[width]` for
    each site, sets the new target to where a mean activation is pushed as far as before: `target' = m.r + (target -
    m.u)`; likewise the rows of a `ReadWrite` read the same from it as before. Without it the target stays as it is, and
    so the push differs in length; compare the doses.

    The same steering and seed give the same control. Raises `TrimtabError` for an operation without a direction, a
    missing mean, or one of another width.
    """
    models = steering.card.models
    card = Card(
        method="random",
        model=models[0] if models else None,
        options={"seed": seed, "like": steering_digest(steering), "targets": "shifted" if means else "kept"},
    )
    return Steering(random_edits(steering, seed, means), card)


def orthogonal_like(steering: Steering, seed: int = 0, means: Mapping[Site, Tensor] | None = None) -> Steering:
    """`random_like` whose additions and projections are orthogonal to the steering's own directions.

    A random direction has a little of any other in it, and in a narrow model not so little. What is neither added nor
    projected is as `random_like` has it.

    Raises:
        TrimtabError: As `random_like` does.
    """
    control = random_like(steering, seed, means)
    edits = []
    for old, new in zip(steering.edits, control.edits, strict=True):
        if not isinstance(old.operation, (Add, SetProjection)):
            edits.append(new)
            continue
        assert isinstance(new.operation, Directed)
        own, drawn = old.operation.direction.double(), new.operation.direction.double()
        if not own.any():  # nothing is as long as nothing, whatever its direction
            edits.append(old)
            continue
        away = drawn - (drawn @ own) * own / own.norm() ** 2
        away = (away * drawn.norm() / away.norm()).to(old.operation.direction.dtype)
        change: dict[str, object] = {"direction": away}
        if isinstance(old.operation, SetProjection) and means is not None:
            mean = to_float64(means[old.site])
            change["target"] = float(mean @ away.double()) + old.operation.target - float(mean @ own)
        edits.append(replace(new, operation=replace(new.operation, **change)))  # type: ignore[arg-type]
    options = {**control.card.options, "orthogonal": True}
    return Steering(tuple(edits), replace(control.card, options=options))
