"""What steers a request: what is always on, and what its caller asks for and may have; whatever the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from trimtab.errors import TrimtabError
from trimtab.serve.library import Loaded
from trimtab.serve.policy import Key, Policy
from trimtab.serve.protected import Protected, apart, protected
from trimtab.serve.refusals import Refusal, no_such_steering
from trimtab.serve.schema import SteeringChoice
from trimtab.serve.schema_told import AppliedSteering
from trimtab.serve.structured import Structured
from trimtab.steering import Positions, Steering


@dataclass(frozen=True)
class Choosing:
    """The policy, and the steerings that it is about.

    Args:
        policy: Who may do what.
        find: The steering of a name, a file's or what this owner (`None`: nobody) has brought; `None`: there is none.
        check: Raises `TrimtabError` for a steering that the engine can't run.
    """

    policy: Policy
    find: Callable[[str, str | None], Loaded | None]
    check: Callable[[Steering], None]

    def owner(self, key: str) -> str | None:
        """Who owns what this key adds: itself; without keys, everybody."""
        return key if self.policy.keys else None

    def visible(self, key: Key, known: Sequence[Loaded]) -> list[Loaded]:
        """Of these steerings those that a caller may name, and those that are always on."""
        always = {name for name, _ in self.policy.always}
        return [
            loaded for loaded in known if _allowed(key, loaded) or (loaded.name in always and loaded.source == "file")
        ]

    def chosen(
        self, key: Key, choices: Sequence[SteeringChoice], structured: Structured | None = None
    ) -> tuple[list[AppliedSteering], Steering | None]:
        """What is always on, and what a request asks for: as a list, and as one steering.

        What is asked for doesn't act in the `structured` part of the answer, unless it says where it acts.
        Raises `Refusal` for what isn't there or isn't allowed.
        """
        always = dict(self.policy.always)
        steerings, total = [], None
        pushes: dict[str, tuple[float, float]] = {}  # by digest, as one steering may have several names
        for name, strength in self.policy.always:
            loaded = self.find(name, None)
            assert loaded is not None  # checked at the start
            steerings.append(AppliedSteering(name=name, digest=loaded.digest, strength=strength, always=True))
            total = strength * loaded.steering if total is None else total + strength * loaded.steering
        for i, choice in enumerate(choices):
            where = f"steering.{i}"
            if choice.name in always:
                raise Refusal(403, f"the steering {choice.name!r} is always on; a request can't change it", param=where)
            loaded = self.find(choice.name, self.owner(key.name))
            if loaded is None or not _allowed(key, loaded):  # the same words: what others have is nobody's business
                raise no_such_steering(choice.name, param=f"{where}.name")
            pushes[loaded.digest] = self._pushed(
                key, pushes.get(loaded.digest, (0.0, 0.0)), choice, f"{where}.strength"
            )
            spared = structured if choice.positions is None else None
            placed, lost = self.apart(self._placed(loaded, choice, spared, where), where)
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

    def apart(self, steering: Steering, param: str) -> tuple[Steering, float]:
        """The steering without what it has along what is always on, and how much that was. Raises `Refusal`."""
        try:
            return apart(self.protected, steering)
        except TrimtabError as error:
            raise Refusal(403, str(error), code="always_on", param=param) from None

    @cached_property
    def protected(self) -> Protected:
        """What is always on; it doesn't change while the server runs."""
        always_on = [(name, self.find(name, None)) for name, strength in self.policy.always if strength]
        return protected([(name, loaded.steering) for name, loaded in always_on if loaded is not None])

    def _pushed(self, key: Key, before: tuple[float, float], choice: SteeringChoice, param: str) -> tuple[float, float]:
        """What one steering's strengths in a request add up to: those below zero, and those above.

        They aren't set off against each other: at two layers both act. Raises `Refusal` beyond the caller's range.
        """
        low, high = self.policy.range_of(key)
        strength = choice.strength
        if not low <= strength <= high:
            raise Refusal(403, f"a strength lies between {low:g} and {high:g} for you", param=param)
        down, up = before[0] + min(strength, 0.0), before[1] + max(strength, 0.0)
        if up > max(high, 0.0) or down < min(low, 0.0):
            raise Refusal(
                403,
                f"the strengths of {choice.name!r} add up to {up if up > max(high, 0.0) else down:g} in this request;"
                f" for you they lie between {low:g} and {high:g}, all layers together",
                param=param,
            )
        return down, up

    def _placed(self, loaded: Loaded, choice: SteeringChoice, spared: Structured | None, where: str) -> Steering:
        """The steering where it was made to act, or at another layer, or other positions, but for what is spared."""
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
                steering = spared.spared_by(steering)
        except TrimtabError as error:
            raise Refusal(400, str(error), param=param) from None
        return steering


def _allowed(key: Key, loaded: Loaded) -> bool:
    return loaded.owner is not None or key.steerings is None or loaded.name in key.steerings
