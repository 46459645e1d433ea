"""A steering of the server, described for a caller of the API."""

from __future__ import annotations

from dataclasses import asdict

from trimtab.serve.library import LoadedSteering
from trimtab.serve.policy import Key, Policy
from trimtab.serve.schema_steerings import SteeringInfo


def steering_info(policy: Policy, key: Key, loaded: LoadedSteering) -> SteeringInfo:
    """What the steering is, where it comes from, and the range of strengths that this caller may request."""
    return SteeringInfo(
        name=loaded.name,
        digest=loaded.digest,
        source=loaded.source,  # type: ignore[arg-type]
        layers=list(loaded.steering.layers),
        edits=[str(edit) for edit in loaded.steering.edits[:64]],
        strength=list(policy.range_of(key)),
        always=loaded.name in {name for name, _ in policy.always},
        card=asdict(loaded.steering.card),
    )
