"""Monitors on the rows of a batch: all rows are read together, with one matrix product per site and pass.

A monitor's hook runs after the edits of its site, so it reads the edited activation. The values stay on the device
until the step returns its chosen tokens, which synchronizes with the device anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.resolve import resolve
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import Place, place
from trimtab.engines.transformers.plan import check_edits
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Site, Steering
from trimtab.steering.gates import Threshold
from trimtab.steering.monitors import Monitor, Monitored, measure_conditions

KEPT = 64
"""The number of sets of conditions whose directions are kept on the device."""


def check_monitors_fit(monitors: Sequence[Monitor], steering: Steering | None, layout: Layout) -> None:
    """Check that monitors fit the model, and that the steerings they switch on can be combined with `steering`.

    Raises:
        TrimtabError: One of them doesn't fit.
    """
    for monitor in monitors:
        where = place(layout, monitor.site)
        if len(monitor.condition.direction) != where.size:
            raise TrimtabError(
                f"monitor {monitor.name} reads activations of width {len(monitor.condition.direction)} at"
                f" {monitor.site}, and this model's width there is {where.size}; it was learned on another model"
            )
        if monitor.steering is not None:
            check_edits(monitor.steering if steering is None else steering + monitor.steering, layout)


def monitor_edits(monitor: Monitor, prompt_length: int) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
    """The edits that a monitor switches on, as a batch runs them, and their names in the answer."""
    resolved = resolve([monitor.steering], [prompt_length], lambda *_: {})
    return resolved.edits[0], resolved.names[0]


@dataclass
class MonitorLog:
    """The readings of one row's monitors so far."""

    values: list[tuple[float, ...]] = field(default_factory=list)
    fired: dict[str, int] = field(default_factory=dict)

    def add(self, monitors: Sequence[Monitor], values: tuple[float, ...]) -> tuple[Monitor, ...]:
        """Add the readings of one token. Returns the monitors that fire for the first time."""
        new = tuple(
            monitor
            for monitor, value in zip(monitors, values, strict=True)
            if monitor.name not in self.fired and monitor.fires(value)
        )
        self.fired |= dict.fromkeys((monitor.name for monitor in new), len(self.values))
        self.values.append(values)
        return new

    def readings(self, monitors: Sequence[Monitor]) -> dict[str, Monitored]:
        """All readings, by the monitors' names."""
        columns = list(zip(*self.values, strict=True)) or [()] * len(monitors)
        return {
            monitor.name: Monitored(tuple(values), self.fired.get(monitor.name))
            for monitor, values in zip(monitors, columns, strict=True)
        }


class MonitorReader:
    """Reads the last token of each row in a pass, for the conditions of these rows' monitors."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self.conditions: tuple[Threshold, ...] = ()
        self.values: Tensor | None = None  # [rows, conditions], from the last pass

    def set_monitors(self, each: Iterable[Sequence[Monitor]]) -> None:
        """Set the monitors of each row for the following passes."""
        self.conditions = tuple(dict.fromkeys(monitor.condition for monitors in each for monitor in monitors))
        self.values = None

    def columns(self, monitors: Sequence[Monitor]) -> list[int]:
        """The columns of `values` for these monitors."""
        return [self.conditions.index(monitor.condition) for monitor in monitors]

    @contextmanager
    def open(self, rows: int) -> Iterator[None]:
        """Read one pass over this number of rows within the context."""
        if not self.conditions:
            yield
            return
        owner = get_ident()
        by_site: dict[Site, list[int]] = {}
        for i, condition in enumerate(self.conditions):
            by_site.setdefault(condition.site, []).append(i)
        by_condition: dict[int, Tensor] = {}

        def record(site: Site, where: Place, output: Any) -> None:
            if get_ident() != owner:
                return
            x = where.read(output if isinstance(output, Tensor) else output[0])
            newest = x.reshape(rows, -1, x.shape[-1])[:, -1]
            newest = newest.to(torch.promote_types(newest.dtype, torch.float32))
            here = tuple(self.conditions[i] for i in by_site[site])
            values = measure_conditions(here, newest, self._directions(here, newest))
            by_condition.update(zip(by_site[site], values.unbind(-1), strict=True))

        with ExitStack() as stack:
            for site in by_site:
                stack.callback(_attach_reader(place(self._layout, site), partial(record, site)).remove)
            yield
        for i, condition in enumerate(self.conditions):
            if i not in by_condition:
                raise TrimtabError(
                    f"the part of the model at {condition.site} didn't run in a pass that a monitor reads; something"
                    " bypasses the model's hooks (a captured graph, a replaced forward)"
                )
        self.values = torch.stack([by_condition[i].to(by_condition[0].device) for i in range(len(by_condition))], -1)

    def _directions(self, conditions: tuple[Threshold, ...], x: Tensor) -> Tensor:
        key = (conditions, x.device, x.dtype)
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = torch.stack([condition.direction for condition in conditions]).to(x)
        return self._kept[key]


def _attach_reader(where: Place, keep: Callable[[Place, Any], None]) -> Any:
    """Attach a hook that passes a place's activations to `keep` and changes nothing."""
    if where.side == "output":
        return where.module.register_forward_hook(lambda _m, _args, output: keep(where, output))
    return where.module.register_forward_pre_hook(
        lambda _m, args, kwargs: keep(where, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
