"""What a steering was learned from, how, and for which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TRAINED = frozenset({"bipo", "distill", "loreft", "reps"})
"""Methods that train on the model's own text, by descending on what it says: they see what their edits do to it."""

AUDIT_VERSION = 1
"""Of what stands in `Card.audit`."""


@dataclass(frozen=True)
class Adapter:
    """An adapter (LoRA and the like) that acts on a model: what it is called there, and a digest of its weights."""

    name: str
    digest: str


@dataclass(frozen=True)
class ModelId:
    """Which model a steering belongs to.

    `fingerprint` is a digest of a few rows of the embeddings and survives a moved folder, a renamed copy and a change
    of dtype. `template` is a digest of the chat template. `adapters` are those that act on the model. `blocks` is a
    digest of a few weights of every block, adapters left out, where they can be looked at: what is merged into them
    shows there, and only there. Two names of one model may differ in it, so it isn't compared.
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
        """As plain values; of what older files don't have only what there is, so that these keep their digests."""
        data = asdict(self)
        return {key: value for key, value in data.items() if value or key not in ("adapters", "blocks")}

    @property
    def adapted(self) -> str:
        """With which adapters it is, in words; empty where there are none."""
        names = ", ".join(f"{adapter.name} ({adapter.digest[:8]})" for adapter in self.adapters)
        return f"with the adapter{'s' if len(self.adapters) > 1 else ''} {names}" if names else ""


@dataclass(frozen=True)
class Card:
    """The provenance of a steering; nothing in it changes what the steering does.

    `options` are the method's settings, `data` a digest of what was learned from, `measured` whatever was measured
    while learning or evaluating (JSON values), `parts` the cards of a sum. `divergence` is that from the unsteered
    model (`mean` and `p95`, in nats per token, over `tokens`), and `audit` what `trimtab audit` found, with its
    `version`; both name the digest of the `edits` that they describe, which may differ from the current ones.
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
        """Whether it was trained (`TRAINED`), not read off a difference of activations; of a sum, whether all parts."""
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
