"""Monitors in the API: those that a request names, those that read every answer, and their readings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field

from trimtab.errors import TrimtabError
from trimtab.files.pick import Pick, parse_pick
from trimtab.serve.fields import NAME, Finite, RequestModel
from trimtab.serve.refusals import Refusal
from trimtab.serve.tasks import Done, GeneratedToken
from trimtab.steering.monitors import Monitor

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.serve.policy import Key
    from trimtab.serve.service import Service

Action = Literal["log", "stop", "steer"]


class Switched(RequestModel):
    """The steering that a monitor switches on."""

    name: str = Field(max_length=64)
    strength: Finite = Field(1.0, ge=-100, le=100)


class MonitorChoice(RequestModel):
    """A monitor of the server, with another threshold than its own, or an action beyond it."""

    name: str = Field(max_length=64, examples=["harm"])
    threshold: Finite | None = Field(None, description="Default: the one in the file.")
    action: Action = Field(
        "log", description="What to do beyond the threshold: log it, stop the answer, or switch on a steering."
    )
    steering: Switched | None = Field(None, description="The steering for the action `steer`.")


class MonitorReport(BaseModel):
    """What a monitor read of one answer: a value per token, and at which token it fired, if it did."""

    name: str
    action: Action
    threshold: float | None
    fired: int | None = Field(
        description="The first token, counted from 0, that was sampled when the value was beyond the threshold."
    )
    values: list[float | None] = Field(description="One value per token; `null` if it isn't a finite number.")


class MonitorInfo(BaseModel):
    """One of the server's monitors."""

    name: str
    site: str
    measure: str
    threshold: float | None
    action: Action = Field(description="Its action in every answer; `log` if requests choose.")
    always: bool = Field(description="Whether it reads every answer.")


class MonitorList(BaseModel):
    """All monitors."""

    object: Literal["list"] = "list"
    data: list[MonitorInfo]


Choices = Annotated[list[Annotated[str, Field(max_length=64)] | MonitorChoice], Field(fail_fast=True)]


def picks_of(texts: Sequence[str]) -> dict[str, Pick]:
    """The files of `--monitor NAME=FILE[@LAYER]`, by name. Raises `TrimtabError` for a file that doesn't exist."""
    import re

    picks: dict[str, Pick] = {}
    for text in texts:
        name, equals, where = text.partition("=")
        if not equals or not re.fullmatch(NAME, name):
            raise TrimtabError(f"--monitor {text!r}: write NAME=FILE or NAME=FILE@LAYER, such as harm=harm.safetensors")
        if name in picks:
            raise TrimtabError(f"--monitor {name} is given twice; names must differ")
        picks[name] = parse_pick(where, "--monitor")
    return picks


def read_monitors(lm: LM, texts: Sequence[str]) -> dict[str, Monitor]:
    """The monitors of `--monitor NAME=FILE[@LAYER]`. Raises `TrimtabError` if one can't be read or doesn't fit."""
    from trimtab.engines.transformers.monitoring import check_monitors_fit

    monitors: dict[str, Monitor] = {}
    for name, pick in picks_of(texts).items():
        steering = pick.load()
        lm.check(steering)
        monitors[name] = Monitor.of(name, steering)
        check_monitors_fit([monitors[name]], None, lm.layout)
    return monitors


def policy_monitors(service: Service) -> tuple[Monitor, ...]:
    """The monitors that the policy puts on every answer. Raises `TrimtabError` for one that doesn't exist."""
    monitors = []
    for watching in service.policy.monitors:
        base = service.monitors.get(watching.name)
        if base is None:
            known = ", ".join(sorted(service.monitors)) or "none"
            raise TrimtabError(
                f"the policy names the monitor {watching.name!r}, but the monitors are {known}; add it with --monitor"
            )
        steering = None
        if watching.steering is not None:
            loaded = service.library.get(watching.steering)
            if loaded is None:
                raise TrimtabError(
                    f"the policy's monitor {watching.name!r} switches on {watching.steering!r}, which doesn't exist"
                )
            steering = watching.strength * loaded.steering
        line = base.threshold if watching.threshold is None else watching.threshold
        monitors.append(replace(base, threshold=line, action=watching.action, steering=steering))
    return tuple(monitors)


def monitors_for(service: Service, key: Key, request: Any) -> tuple[Monitor, ...]:
    """The monitors for a request. Raises `Refusal` for one that doesn't exist, isn't allowed or can't be used."""
    always = {monitor.name: monitor for monitor in service.always_on_monitors}
    monitors = list(always.values())
    choices = [
        MonitorChoice.model_validate({"name": item}) if isinstance(item, str) else item for item in request.monitors
    ]
    extra = [item.steering for item in choices if item.steering is not None]
    if extra:  # what a monitor may switch on counts as if it were on
        from trimtab.serve.schema import SteeringChoice

        more = [SteeringChoice.model_validate(item.model_dump()) for item in extra]
        service.select(key, request.model_copy(update={"steering": [*request.steering, *more]}))
    for i, choice in enumerate(choices):
        where = f"monitors.{i}"
        if choice.name in always:
            if choice.model_dump(exclude_defaults=True) != {"name": choice.name}:
                raise Refusal(403, f"the monitor {choice.name!r} is always on; a request can't change it", param=where)
            continue
        base = service.monitors.get(choice.name)
        if base is None:
            known = ", ".join(sorted(service.monitors)) or "none (start the server with --monitor)"
            raise Refusal(404, f"there is no monitor {choice.name!r}; monitors: {known}", param=where)
        steering = None
        if choice.steering is not None:
            loaded = service.library.get(choice.steering.name, service.owner(key.name))
            assert loaded is not None  # `chosen` has checked that
            steering = choice.steering.strength * service.without_protected(loaded, where)
        try:
            line = base.threshold if choice.threshold is None else choice.threshold
            monitors.append(replace(base, threshold=line, action=choice.action, steering=steering))
        except TrimtabError as error:
            raise Refusal(400, str(error), param=where) from None
    if len({monitor.name for monitor in monitors}) < len(monitors):
        raise Refusal(400, "a monitor is named twice; once is enough", param="monitors")
    return tuple(monitors)


def monitor_list(service: Service) -> MonitorList:
    """The server's monitors, by name."""
    always = {monitor.name: monitor for monitor in service.always_on_monitors}
    listed = []
    for name in sorted(service.monitors):
        shown = always.get(name, service.monitors[name])
        listed.append(
            MonitorInfo(
                name=name,
                site=str(shown.site),
                measure=shown.condition.measure,
                threshold=shown.threshold,
                action=shown.action,  # type: ignore[arg-type]
                always=name in always,
            )
        )
    return MonitorList(data=listed)


def readings_of(monitors: Sequence[Monitor], done: Done) -> list[MonitorReport]:
    """What the monitors read of an answer."""
    readings = done.monitors or {}
    return [
        MonitorReport(
            name=monitor.name,
            action=monitor.action,  # type: ignore[arg-type]
            threshold=monitor.threshold,
            fired=readings[monitor.name].fired,
            values=[_number(value) for value in readings[monitor.name].values],
        )
        for monitor in monitors
        if monitor.name in readings
    ]


def in_chunk(monitors: Sequence[Monitor], tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
    """The readings for the tokens in a chunk of a stream: `{"trimtab": {"monitors": {name: values}}}`, or nothing."""
    if not monitors:
        return {}
    values = {monitor.name: [_number(token.monitored[i]) for token in tokens] for i, monitor in enumerate(monitors)}
    return {"trimtab": {"monitors": values}}


def fired_in(last: Any) -> Mapping[str, int]:
    """The tokens at which an answer's monitors fired, by name, for the audit log."""
    readings = getattr(last, "monitors", None) or {}
    return {name: reading.fired for name, reading in readings.items() if reading.fired is not None}


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
