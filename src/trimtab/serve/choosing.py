"""What steers a request, on any engine: the steerings that are always on, and those that its caller may request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from trimtab.errors import TrimtabError
from trimtab.serve.library import LoadedSteering
from trimtab.serve.policy import Key, Policy
from trimtab.serve.protected import Protected, protection_of, remove_protected
from trimtab.serve.refusals import Refusal, no_such_steering
from trimtab.serve.schema import SteeringChoice
from trimtab.serve.schema_output import AppliedSteering
from trimtab.serve.structured import Structured
from trimtab.steering import Positions, Steering


@dataclass(frozen=True)
class SteeringSelector:
    """The policy, and the steerings that it applies to.

    Args:
        policy: Who may do what.
        find: Returns the steering with a name, from a file or added by this owner (`None`: nobody), or `None`.
        check: Raises `TrimtabError` for a steering that the engine can't run.
    """

    policy: Policy
    find: Callable[[str, str | None], LoadedSteering | None]
    check: Callable[[Steering], None]

    def owner(self, key: str) -> str | None:
        """The owner of what this key adds: the key itself; `None` if the policy has no keys."""
        return key if self.policy.keys else None

    def visible(self, key: Key, known: Sequence[LoadedSteering]) -> list[LoadedSteering]:
        """Those of the known steerings that a caller may name, and those that are always on."""
        always = {name for name, _ in self.policy.always}
        return [
            loaded for loaded in known if _allowed(key, loaded) or (loaded.name in always and loaded.source == "file")
        ]

    def select(
        self, key: Key, choices: Sequence[SteeringChoice], structured: Structured | None = None
    ) -> tuple[list[AppliedSteering], Steering | None]:
        """The steerings for a request, always-on ones included: as a list, and as one steering.

        Requested steerings don't act in the `structured` part of the answer, unless the request gives their positions.
        Raises `Refusal` for a steering that doesn't exist or isn't allowed.
        """
        always = dict(self.policy.always)
        steerings, total = [], None
        pushes: dict[str, tuple[float, float]] = {}  # by digest, since one steering may have several names
        for name, strength in self.policy.always:
            loaded = self.find(name, None)
            assert loaded is not None  # checked at startup
            steerings.append(AppliedSteering(name=name, digest=loaded.digest, strength=strength, always=True))
            total = strength * loaded.steering if total is None else total + strength * loaded.steering
        for i, choice in enumerate(choices):
            where = f"steering.{i}"
            if choice.name in always:
                raise Refusal(403, f"the steering {choice.name!r} is always on; a request can't change it", param=where)
            loaded = self.find(choice.name, self.owner(key.name))
            if loaded is None or not _allowed(key, loaded):  # same words: don't reveal what others have
                raise no_such_steering(choice.name, param=f"{where}.name")
            pushes[loaded.digest] = self._pushed(
                key, pushes.get(loaded.digest, (0.0, 0.0)), choice, f"{where}.strength"
            )
            spared = structured if choice.positions is None else None
            placed, lost = self.without_protected(self._placed(loaded, choice, spared, where), where)
            steerings.append(
                AppliedSteering(
                    name=choice.name,
                    digest=loaded.digest,
                    strength=choice.strength,
                    layer=choice.layer,
                    positions=choice.positions,
                    taken_off=lost or None,
                    unsteered=None if spared is None else spared.part,
                )
            )
            scaled = choice.strength * placed
            total = scaled if total is None else total + scaled
        return steerings, total

    def without_protected(self, steering: Steering, param: str) -> tuple[Steering, float]:
        """The steering without its component along always-on directions, and its share. Raises `Refusal`."""
        try:
            return remove_protected(self.protected, steering)
        except TrimtabError as error:
            raise Refusal(403, str(error), code="always_on", param=param) from None

    @cached_property
    def protected(self) -> Protected:
        """The protected directions of always-on steerings, which don't change while the server runs."""
        always_on = [(name, self.find(name, None)) for name, strength in self.policy.always if strength]
        return protection_of([(name, loaded.steering) for name, loaded in always_on if loaded is not None])

    def _pushed(self, key: Key, before: tuple[float, float], choice: SteeringChoice, param: str) -> tuple[float, float]:
        """The sums of one steering's negative strengths and of its positive strengths in a request.

        They don't cancel: at two layers both act. Raises `Refusal` beyond the caller's range.
        """
        low, high = self.policy.range_of(key)
        strength = choice.strength
        if not low <= strength <= high:
            raise Refusal(403, f"you can use strengths from {low:g} to {high:g}", param=param)
        down, up = before[0] + min(strength, 0.0), before[1] + max(strength, 0.0)
        if up > max(high, 0.0) or down < min(low, 0.0):
            raise Refusal(
                403,
                f"the strengths of {choice.name!r} add up to {up if up > max(high, 0.0) else down:g} in this request;"
                f" you can use {low:g} to {high:g}, summed over all layers",
                param=param,
            )
        return down, up

    def _placed(
        self, loaded: LoadedSteering, choice: SteeringChoice, spared: Structured | None, where: str
    ) -> Steering:
        """The steering at its own or the requested layer and positions, except in what is spared."""
        steering, param = loaded.steering, f"{where}.layer"
        try:
            if choice.layer is not None:
                steering = steering.at_layer(choice.layer)
                self.check(steering)
            param = f"{where}.positions"
            if choice.positions is not None:
                steering = steering.at(Positions.parse(choice.positions))
                self.check(steering)
            if spared is not None:
                steering = spared.exclude_from(steering)
        except TrimtabError as error:
            raise Refusal(400, str(error), param=param) from None
        return steering


def _allowed(key: Key, loaded: LoadedSteering) -> bool:
    return loaded.owner is not None or key.steerings is None or loaded.name in key.steerings
