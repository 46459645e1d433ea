"""A steering of the server's, as the API tells a caller of it."""

from __future__ import annotations

from dataclasses import asdict

from trimtab.serve.library import Loaded
from trimtab.serve.policy import Key
from trimtab.serve.schema_steerings import SteeringTold
from trimtab.serve.service import Service


def described(service: Service, key: Key, one: Loaded) -> SteeringTold:
    """What it is and where it comes from, and how strong this caller may ask for it."""
    return SteeringTold(
        name=one.name,
        digest=one.digest,
        source=one.source,  # type: ignore[arg-type]
        layers=list(one.steering.layers),
        edits=[str(edit) for edit in one.steering.edits[:64]],
        strength=list(service.policy.range_of(key)),
        always=one.name in {name for name, _ in service.policy.always},
        card=asdict(one.steering.card),
    )
