"""Checks whether a steering was learned on a given model."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import outside
from trimtab.steering.card import ModelId
from trimtab.steering.operations import Operation
from trimtab.steering.steering import Steering, check_steering


class MismatchWarning(UserWarning):
    """A steering was learned on a model that differs in a detail, such as the chat template or the revision."""


def check_learned_on(steering: Steering, here: ModelId, *, transfer: bool = False) -> None:
    """Raise `TrimtabError`, with the differences, if the steering was learned on another model.

    It also raises if one of the steering's tensors was changed in place. Adapters are part of a model. With
    `transfer`, only the width has to match. Other weights in the blocks, another chat template or another revision
    only give a `MismatchWarning`.
    """
    check_steering(steering)
    for edit in steering.edits:
        if isinstance(edit.operation, Operation):
            edit.operation.check_unchanged()
    for learned in steering.card.models:
        same = learned.fingerprint == here.fingerprint or learned.name == here.name
        differ = [
            f"{what} {there} instead of {mine}"
            for what, there, mine in (
                ("family", learned.family, here.family),
                ("width", learned.width, here.width),
                ("number of layers", learned.layers, here.layers),
            )
            if there != mine
        ]
        if learned.width != here.width or (not transfer and (differ or not same)):
            detail = f" ({', '.join(differ)})" if differ else " (same shape, different weights)"
            hint = "learn it on this model" + ("" if learned.width != here.width else ", or allow transfer")
            raise TrimtabError(f"the steering was learned on {learned.name}, this is {here.name}{detail}; {hint}")
        if not transfer and _digests(learned) != _digests(here):
            there, mine = (model_id.adapted or "without an adapter" for model_id in (learned, here))
            raise TrimtabError(
                f"the steering was learned on {learned.name} {there}, this is {here.name} {mine}; switch to the same"
                " adapters, learn it on this model, or allow transfer"
            )
        looked_at = not learned.adapters and None not in (learned.blocks, here.blocks)
        if not transfer and looked_at and learned.blocks != here.blocks:
            message = (
                f"the blocks of {here.name} have different weights than when the steering was learned (an adapter"
                " merged into them, or a different finetuning, revision or dtype?)"
            )
            warnings.warn(message, MismatchWarning, stacklevel=outside())
        elif not transfer and learned.fingerprint != here.fingerprint:
            message = f"{here.name} has different weights than when the steering was learned (revision, quantization?)"
            warnings.warn(message, MismatchWarning, stacklevel=outside())
        if learned.template != here.template:
            message = f"{here.name} has a different chat template than {learned.name} had when the steering was learned"
            warnings.warn(message, MismatchWarning, stacklevel=outside())


def _digests(model: ModelId) -> frozenset[str]:
    """The digests of a model's adapters, which identify them regardless of their names."""
    return frozenset(adapter.digest for adapter in model.adapters)


def sampled_rows(vocabulary: int) -> list[int]:
    """The rows of the embeddings that go into a fingerprint."""
    return torch.linspace(0, vocabulary - 1, 16).long().tolist()


def fingerprint(family: str, shape: Sequence[int], rows: Tensor) -> str:
    """A digest of the family, the embeddings' `shape` and their `sampled_rows`, in bfloat16 to be dtype-independent."""
    sample = rows.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
    described = json.dumps([family, list(shape)])
    return hashlib.sha256(described.encode() + sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
