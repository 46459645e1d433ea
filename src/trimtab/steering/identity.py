"""Checks whether a steering was learned on a given model."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel
from trimtab.steering.card import ModelId
from trimtab.steering.operations import Operation
from trimtab.steering.steering import Steering, check_steering


class MismatchWarning(UserWarning):
    """A steering was learned on a model that differs in a detail, such as the chat template or the revision."""


def check_learned_on(steering: Steering, current: ModelId, *, transfer: bool = False) -> None:
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
        same = learned.fingerprint == current.fingerprint or learned.name == current.name
        differences = [
            f"{what} {expected} instead of {actual}"
            for what, expected, actual in (
                ("family", learned.family, current.family),
                ("width", learned.width, current.width),
                ("number of layers", learned.layers, current.layers),
            )
            if expected != actual
        ]
        if learned.width != current.width or (not transfer and (differences or not same)):
            detail = f" ({', '.join(differences)})" if differences else " (same shape, different weights)"
            hint = "learn it on this model" + ("" if learned.width != current.width else ", or allow transfer")
            raise TrimtabError(f"the steering was learned on {learned.name}, this is {current.name}{detail}; {hint}")
        if not transfer and _digests(learned) != _digests(current):
            there, mine = (model_id.adapted or "without an adapter" for model_id in (learned, current))
            raise TrimtabError(
                f"the steering was learned on {learned.name} {there}, this is {current.name} {mine}; switch to the same"
                " adapters, learn it on this model, or allow transfer"
            )
        comparable = not learned.adapters and None not in (learned.blocks, current.blocks)
        if not transfer and comparable and learned.blocks != current.blocks:
            message = (
                f"the blocks of {current.name} have different weights than when the steering was learned (an adapter"
                " merged into them, or a different finetuning, revision or dtype?)"
            )
            warnings.warn(message, MismatchWarning, stacklevel=caller_stacklevel())
        elif not transfer and learned.fingerprint != current.fingerprint:
            message = (
                f"{current.name} has different weights than when the steering was learned (revision, quantization?)"
            )
            warnings.warn(message, MismatchWarning, stacklevel=caller_stacklevel())
        if learned.template != current.template:
            message = (
                f"{current.name} has a different chat template than {learned.name} had when the steering was learned"
            )
            warnings.warn(message, MismatchWarning, stacklevel=caller_stacklevel())


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
