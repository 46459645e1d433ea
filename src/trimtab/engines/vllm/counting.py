"""Verify that a pass steered what it should: the counts at each site are compared with the plan.

If Python runs in every pass, the operator's calls are counted. In a captured graph, the graph itself counts: at each
site it adds to a number on the device. The numbers are copied to the host along with the sampled tokens and compared
before these leave the worker, so a token that should have been steered and wasn't is never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.steering import Site

RECEIPT = "_trimtab_receipt"
"""The attribute of a worker's output that carries its receipt to the scheduler."""

FAILURE_PREFIX = "trimtab: "
"""The prefix of the reasons with which trimtab fails requests."""

DOSE = f"{FAILURE_PREFIX}the doses "
"""The prefix of the reason if a request's dose exceeded its cap."""

DOSES = "trimtab_doses"
"""The key under which the doses of a capped request are sent with vLLM's outputs."""

Measured = list[tuple[int, str, float, int]]
"""A request's doses as plain data: layer and kind of each site, the mean dose there, and the number of tokens."""

CALL = 1 << 32
"""What a call of the operator adds to a site's count, besides its tokens: high bits count calls, low bits tokens."""


def count_fault(site: Site, count: int, tokens: int) -> str | None:
    """What went wrong at a site where the operator should have run once, on at least `tokens` tokens, or `None`."""
    if CALL + tokens <= count < 2 * CALL:
        return None
    calls, seen = divmod(count, CALL)
    happened = "didn't run" if not calls else f"ran {calls} times, on {seen} tokens"
    where = f"behind block {site.layer}" if site.kind == "residual" else f"at {site}"
    return f"{FAILURE_PREFIX}{where} the steering should have run once, on {tokens} tokens, but {happened}"


@dataclass
class Receipt:
    """A worker's report on a pass: how many steered requests it had, and why some of them weren't steered.

    It also has the `doses` so far of requests with a cap. `deferred_faults` finds further faults after the pass has
    ended on the device; it is called once, as is `deferred_doses`, which returns the doses.
    """

    requests: int
    faults: dict[str, str] = field(default_factory=dict)
    doses: dict[str, Measured] = field(default_factory=dict)
    deferred_doses: Callable[[], tuple[Mapping[str, Measured], Mapping[str, str]]] | None = None
    deferred_faults: Callable[[], Mapping[str, str]] | None = None
    ready: Callable[[], bool] = lambda: True  # whether `late` returns without waiting

    def resolve_faults(self) -> dict[str, str]:
        """All faults, by request."""
        if self.deferred_doses is not None:
            compute_doses, self.deferred_doses = self.deferred_doses, None
            doses, above = compute_doses()
            self.doses.update(doses)
            self.faults.update(above)
        if self.deferred_faults is not None:
            compute_faults, self.deferred_faults = self.deferred_faults, None
            self.faults.update(compute_faults())
        return self.faults

    def plain(self) -> tuple[int, dict[str, str], dict[str, Measured]]:
        """The receipt as plain data for the scheduler."""
        faults = self.resolve_faults()
        return self.requests, faults, self.doses


class GraphCounts:
    """One number per site, on the device. At each replay the graph adds a call and its tokens to it."""

    def __init__(self, sites: Collection[Site], device: torch.device) -> None:
        self.sites: tuple[Site, ...] = tuple(sites)
        self._all = torch.zeros(len(sites), dtype=torch.int64, device=device)
        self._numbers = dict(zip(sites, self._all.unbind(), strict=True))  # views with fixed addresses

    def count(self, site: Site, tokens: int) -> None:
        """Add to a site's number in place, as part of the graph."""
        self._numbers[site].add_(CALL + tokens)

    def number_at(self, site: Site) -> Tensor:
        """A site's number, `[]`."""
        return self._numbers[site]

    def clear(self) -> None:
        """Reset all numbers before a pass."""
        self._all.zero_()

    def copy(self) -> tuple[Callable[[], dict[Site, int]], Callable[[], bool]]:
        """Start copying the counts to the host, without waiting.

        Returns how to read them, and whether they have arrived.
        """
        on_gpu = self._all.is_cuda
        host = torch.empty(len(self.sites), dtype=torch.int64, pin_memory=on_gpu)
        host.copy_(self._all, non_blocking=on_gpu)
        event: Any = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()

        def read() -> dict[Site, int]:
            if event is not None:
                event.synchronize()  # the sampled tokens are here, so the counts are too
            return dict(zip(self.sites, host.tolist(), strict=True))

        return read, lambda: event is None or event.query()
