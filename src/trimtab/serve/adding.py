"""Steerings added while the server runs: permissions, learning from pairs, and their lines in the audit log."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import dataclass

from trimtab.learn.contrast import Progress
from trimtab.methods.caa import learn_caa
from trimtab.methods.instruct import learn_instruct
from trimtab.serve.library import LoadedSteering
from trimtab.serve.policy import Key
from trimtab.serve.refusals import Refusal, no_such_steering
from trimtab.serve.scheduler import Draining
from trimtab.serve.schema_steerings import LearnRequest
from trimtab.serve.service import Service
from trimtab.steering import Steering
from trimtab.text.pairs import pairs_from_rows


def check_may_add(service: Service, key: Key, name: str) -> None:
    """Raises `Refusal` for a key that may not add steerings, and for a name that is taken."""
    if not key.add:
        raise Refusal(403, "your key may not add steerings")
    if any(loaded.name == name for loaded in service.visible(key)):  # hidden steerings don't take names
        raise Refusal(400, "there is already a steering of this name; choose another", param="name")


@dataclass(frozen=True)
class Learned:
    """A steering, and the warnings while it was learned."""

    steering: Steering
    remarks: tuple[str, ...] = ()


async def learn_steering(service: Service, request: LearnRequest, progress: Progress | None = None) -> Learned:
    """Learn from the request's pairs, between two steps of the batch. `progress` is called in the model's thread.

    Raises `TrimtabError` for pairs that nothing can be learned from, and `Refusal` when the server is shutting down.
    """
    pairs = pairs_from_rows(request.model_dump()["pairs"])
    learn = learn_caa if request.method == "caa" else learn_instruct

    def job() -> Learned:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = learn(service.lm, pairs, request.layers, progress=progress)
        return Learned(made, tuple(dict.fromkeys(str(warning.message) for warning in caught)))

    try:
        future = service.scheduler.run(job)
    except Draining as draining:
        raise Refusal(503, str(draining), retry=5) from None
    made: Learned = await asyncio.wrap_future(future)
    return made


def add_steering(
    service: Service, audit_fields: dict[str, str], name: str, steering: Steering, source: str
) -> LoadedSteering:
    """Add a steering to the key's own, and log that. `audit_fields`: the request's id, its key's name, the route.

    Raises `Refusal` if it can't be logged; then it isn't added.
    """
    owner = service.owner(audit_fields["key"])
    loaded = service.library.add(name, steering, source, owner)
    try:
        service.audit.write(
            {"event": "added", **audit_fields, "added": name, "digest": loaded.digest, "source": source}
        )
    except Refusal:
        service.library.remove(name, owner)
        raise
    return loaded


def remove_steering(service: Service, audit_fields: dict[str, str], key: Key, name: str) -> None:
    """Remove a steering that the key has added, and log that.

    Raises `Refusal` for a key that may not add, a file of the server, and a name that doesn't exist.
    """
    if not key.add:
        raise Refusal(403, "your key may not add or delete steerings")
    loaded = next((entry for entry in service.visible(key) if entry.name == name), None)
    if loaded is None:
        raise no_such_steering(name)
    if loaded.source == "file":
        raise Refusal(403, f"{name!r} is one of the server's files; only steerings that were added can be deleted")
    service.audit.write({"event": "removed", **audit_fields, "removed": name, "digest": loaded.digest})
    service.library.remove(name, loaded.owner)
