"""Monitors: a direction is measured at every token during generation, with an action above a threshold.

The value of a generated token is measured on the activation that it was sampled from. So the first value of an answer
comes from the last prompt token, and each token of the answer has one value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.directions import directions
from trimtab.steering.gates import Threshold, measure_of, thresholds
from trimtab.steering.site import Site
from trimtab.steering.steering import Steering, check_steering

ACTIONS = ("log", "stop", "steer")
"""The actions of a monitor at the first token whose value exceeds its threshold."""
FILTERED = "content_filter"
"""The finish reason of an answer that a monitor stopped."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """A direction that is measured at each token, and an action above a threshold.

    Args:
        name: The name of its values.
        condition: The site, the direction and the measure. Its threshold and positions are ignored.
        threshold: A value above it makes the monitor fire, once per answer; `None`: it never fires.
        action: `"log"`: only record in the answer where it fired. `"stop"`: end the answer before the token that would
            have been sampled there. `"steer"`: apply `steering` too, from the next forward pass on.
        steering: The steering to turn on, without gates that read the prompt.
    """

    name: str
    condition: Threshold
    threshold: float | None = None
    action: str = "log"
    steering: Steering | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TrimtabError(f"a monitor has a name, got {self.name!r}")
        if not isinstance(self.condition, Threshold):
            kind = type(self.condition).__name__
            raise TrimtabError(
                f"monitor {self.name}: its condition is a Threshold(…), got {kind}; Monitor.of makes one"
            )
        if self.action not in ACTIONS:
            raise TrimtabError(f"monitor {self.name}: an action is one of {', '.join(ACTIONS)}, got {self.action!r}")
        if self.action != "log" and self.threshold is None:
            raise TrimtabError(
                f"monitor {self.name}: there is no threshold at which to {self.action}; give one (`trimtab learn probe`"
                " writes files that have one)"
            )
        if (self.action == "steer") != (self.steering is not None):
            raise TrimtabError(f"monitor {self.name}: the action steer needs a steering, and no other action takes one")
        if self.threshold is not None and not abs(self.threshold) < float("inf"):
            raise TrimtabError(f"monitor {self.name}: a threshold is a finite number, got {self.threshold!r}")
        for edit in self.steering.edits if self.steering is not None else ():
            if edit.gate.readings or hasattr(edit.operation, "settled"):
                raise TrimtabError(
                    f"monitor {self.name} can't switch on {edit}: it is decided by the prompt, which has been read by"
                    " then"
                )

    @classmethod
    def of(cls, name: str, steering: Steering, layer: int | None = None, **kwargs: Any) -> Monitor:
        """A monitor made from a steering: of its gate's condition, with the threshold, or else of its direction.

        Args:
            name: The name of the values.
            steering: A probe, a steering with a gate, or one with directions.
            layer: The layer to monitor, if the steering has several.
            kwargs: `threshold`, `action` and `steering` of the monitor.

        Returns:
            The monitor. Without a gate, its measure is the dot product with the unit direction.

        Raises:
            TrimtabError: The steering has several conditions or layers and none was chosen, or no direction there.
        """
        check_steering(steering)
        known = list(dict.fromkeys(condition for edit in steering.edits for condition in thresholds(edit.gate)))
        conditions = [condition for condition in known if layer is None or condition.site.layer == layer]
        if len(conditions) == 1:
            return cls(name, conditions[0], **{"threshold": conditions[0].threshold, **kwargs})
        if conditions:
            at = ", ".join(map(str, conditions))
            raise TrimtabError(
                f"monitor {name}: the steering has several conditions ({at}); choose a layer that has one"
            )
        edits = [edit for edit in steering.edits if layer is None or edit.site.layer == layer]
        if len(edits) != 1:
            layers = ", ".join(map(str, steering.layers))
            raise TrimtabError(
                f"monitor {name}: one layer is read, and the steering has {layers}; choose one (FILE@LAYER)"
            )
        (direction,) = directions(Steering(tuple(edits))).values()
        return cls(name, Threshold(edits[0].site, direction, 0.0, "dot"), **kwargs)

    @property
    def site(self) -> Site:
        """The site at which it measures."""
        return self.condition.site

    @property
    def is_probability(self) -> bool:
        """Whether its values are probabilities."""
        return self.condition.measure == "probability"

    def at(self, threshold: float | None) -> Monitor:
        """The same monitor with another threshold."""
        return replace(self, threshold=threshold)

    def fires(self, value: float) -> bool:
        """Whether a value is above the threshold. NaN counts as above."""
        return self.threshold is not None and not value <= self.threshold

    def values(self, x: Tensor) -> Tensor:
        """Its values for activations `[…, width]`: `[…]`, in float32, or in float64 if `x` is."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return measure_conditions([self.condition], x, self.condition.direction[None].to(x))[..., 0]


@dataclass(frozen=True)
class Monitored:
    """The values of a monitor for one answer.

    `values[i]` is measured on the activation that token i was sampled from. `fired` is the first i whose value exceeds
    the threshold, or `None`. `"stop"` ends the answer there, so the last value has no token.
    """

    values: tuple[float, ...]
    fired: int | None = None


def measure_conditions(conditions: Sequence[Threshold], x: Tensor, directions: Tensor) -> Tensor:
    """The values of several conditions for the same activations.

    Args:
        conditions: The conditions, all at one site.
        x: Activations `[…, width]`.
        directions: The conditions' directions, `[conditions, width]`, in the dtype and on the device of `x`.

    Returns:
        The values `[…, conditions]`.
    """
    values = list((x @ directions.mT).unbind(-1))
    for i, condition in enumerate(conditions):
        if condition.measure == "probability":
            values[i] = (values[i] + condition.bias).sigmoid()
        elif condition.measure != "dot":
            values[i] = measure_of(x, directions[i], condition.measure)
    return torch.stack(values, -1)


def check_monitors(monitors: Any) -> tuple[Monitor, ...]:
    """The monitors as a tuple. Raises `TrimtabError` for anything that isn't a monitor and for duplicate names."""
    listed = tuple(monitors or ()) if isinstance(monitors, (list, tuple, type(None))) else (monitors,)
    for monitor in listed:
        if not isinstance(monitor, Monitor):
            raise TrimtabError(
                f"a monitor is a Monitor, got {type(monitor).__name__}; Monitor.of(name, steering) makes one"
            )
    names = [monitor.name for monitor in listed]
    if twice := [name for name in names if names.count(name) > 1]:
        raise TrimtabError(f"two monitors have the name {twice[0]!r}; their values couldn't be distinguished")
    return listed
