"""The card of a steering: the data and the method it was learned with, and the model it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TRAINED = frozenset({"bipo", "distill", "loreft", "reps"})
"""Methods that train their edits by gradient descent on a loss of the model's output."""

AUDIT_VERSION = 2
"""The version of the format of `Card.audit`."""


@dataclass(frozen=True)
class Adapter:
    """An adapter (such as LoRA) that is active on a model: its name there and a digest of its weights."""

    name: str
    digest: str


@dataclass(frozen=True)
class ModelId:
    """The model that a steering was learned on.

    `fingerprint` is a digest of a few rows of the embeddings. It doesn't change if the folder is moved or copied
    under another name, or the dtype changes. `template` is a digest of the chat template. `adapters` are the active
    adapters. `blocks` is a digest of a few weights of every block, without adapters, if the weights are accessible:
    only this digest shows that something was merged into the blocks. It may differ between two copies of one model,
    so it isn't part of the comparison.
    """

    name: str
    revision: str | None
    family: str
    width: int
    layers: int
    fingerprint: str
    template: str | None = None
    adapters: tuple[Adapter, ...] = ()
    blocks: str | None = field(default=None, compare=False)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values. Fields that older files lack are left out if empty, so digests don't change."""
        data = asdict(self)
        return {key: value for key, value in data.items() if value or key not in ("adapters", "blocks")}

    @property
    def adapted(self) -> str:
        """The adapters in words; an empty string if there are none."""
        names = ", ".join(f"{adapter.name} ({adapter.digest[:8]})" for adapter in self.adapters)
        return f"with the adapter{'s' if len(self.adapters) > 1 else ''} {names}" if names else ""


@dataclass(frozen=True)
class Card:
    """The provenance of a steering. Nothing in it changes what the steering does.

    `divergence` and `audit` contain the digest of the `edits` that they describe, which may not be the current ones.

    Args:
        method: The name of the method.
        model: The model that it was learned on.
        data: A digest of the training data.
        options: The method's settings.
        measured: Measurements from learning or evaluation, as JSON values.
        versions: The versions of the software.
        parts: The cards of the summands, if it is a sum.
        divergence: The divergence from the unsteered model: `mean` and `p95`, in nats per token, over `tokens`.
        audit: The findings of `trimtab audit`, with their `version`.
    """

    method: str = "manual"
    model: ModelId | None = None
    data: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Card, ...] = ()
    divergence: Mapping[str, Any] | None = None
    audit: Mapping[str, Any] | None = None

    @property
    def trained(self) -> bool:
        """Whether the method is in `TRAINED`, rather than based on a difference of activations; of a sum, all parts."""
        return all(part.trained for part in self.parts) if self.parts else self.method in TRAINED

    @property
    def models(self) -> tuple[ModelId, ...]:
        """The models of this card and of its parts, each once."""
        models = [self.model] if self.model else []
        for part in self.parts:
            models += [model for model in part.models if model not in models]
        return tuple(models)

    def _repr_html_(self) -> str:
        from trimtab.report.notebook import card_html

        return str(card_html(self))
