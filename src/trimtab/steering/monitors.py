"""A monitor: a direction that is read at every token while an answer is generated, and what happens beyond a line.

What is read of a token is the activation from which the next one is chosen. So the first value of an answer is that of
the last prompt token, and there is one value for each token of the answer.
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
"""What a monitor does at the first token whose value is beyond its threshold."""
FILTERED = "content_filter"
"""Why an answer has ended that a monitor stopped."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """A direction that is read at each token, and an action above a threshold.

    Args:
        name: What its values are called.
        condition: The site, the direction and the measure. Its own threshold and positions don't matter.
        threshold: The line. A value above it makes the monitor fire, once an answer; `None`: it never does.
        action: `"log"`: the answer says where it fired, and nothing else happens. `"stop"`: the answer ends before the
            token that would have been chosen there. `"steer"`: from the next token that is read, `steering` acts too.
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
            raise TrimtabError(f"monitor {self.name}: what is read is a Threshold(…), got {kind}; Monitor.of makes one")
        if self.action not in ACTIONS:
            raise TrimtabError(f"monitor {self.name}: an action is one of {', '.join(ACTIONS)}, got {self.action!r}")
        if self.action != "log" and self.threshold is None:
            raise TrimtabError(
                f"monitor {self.name}: there is no threshold at which to {self.action}; give one (`trimtab learn probe`"
                " writes files that have one)"
            )
        if (self.action == "steer") != (self.steering is not None):
            raise TrimtabError(f"monitor {self.name}: a steering belongs to the action steer, and to no other")
        if self.threshold is not None and not abs(self.threshold) < float("inf"):
            raise TrimtabError(f"monitor {self.name}: a threshold is a finite number, got {self.threshold!r}")
        for edit in self.steering.edits if self.steering is not None else ():
            if edit.gate.readings or hasattr(edit.operation, "settled"):
                raise TrimtabError(
                    f"monitor {self.name} can't switch on {edit}: the prompt decides it, and that has been read by then"
                )

    @classmethod
    def of(cls, name: str, steering: Steering, layer: int | None = None, **kwargs: Any) -> Monitor:
        """What a steering reads: the condition of its gate, with its threshold; without one, its direction.

        Args:
            name: What the values are called.
            steering: A probe, a steering with a gate, or any with directions of the residual stream.
            layer: Which of its layers, where it has several.
            kwargs: `threshold`, `action` and `steering` of the monitor.

        Raises:
            TrimtabError: It has several conditions or layers, and none was chosen; or no direction there.
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
        """Where it reads."""
        return self.condition.site

    @property
    def is_probability(self) -> bool:
        """Whether its values are probabilities."""
        return self.condition.measure == "probability"

    def at(self, threshold: float | None) -> Monitor:
        """The same with another line."""
        return replace(self, threshold=threshold)

    def fires(self, value: float) -> bool:
        """Whether a value is beyond the line; one that isn't a number is."""
        return self.threshold is not None and not value <= self.threshold

    def values(self, x: Tensor) -> Tensor:
        """What it reads of activations `[…, width]`: `[…]`, in float32 or the dtype of `x`."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return measured([self.condition], x, self.condition.direction[None].to(x))[..., 0]


@dataclass(frozen=True)
class Monitored:
    """What a monitor read of one answer.

    `values[i]` is that of the activation from which token i was chosen. `fired` is the first i whose value was beyond
    the threshold, `None` where none was. A `"stop"` ends the answer there, so that its last value has no token.
    """

    values: tuple[float, ...]
    fired: int | None = None


def measured(conditions: Sequence[Threshold], x: Tensor, directions: Tensor) -> Tensor:
    """What conditions measure of activations.

    Args:
        conditions: All of one site.
        x: `[…, width]`.
        directions: Those of the conditions, `[conditions, width]`, in the dtype of `x` and where it is.

    Returns:
        `[…, conditions]`.
    """
    values = list((x @ directions.mT).unbind(-1))
    for i, condition in enumerate(conditions):
        if condition.measure == "probability":
            values[i] = (values[i] + condition.bias).sigmoid()
        elif condition.measure != "dot":
            values[i] = measure_of(x, directions[i], condition.measure)
    return torch.stack(values, -1)


def check_monitors(monitors: Any) -> tuple[Monitor, ...]:
    """The monitors as a tuple. Raises `TrimtabError` for what is none, and for two of one name."""
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
