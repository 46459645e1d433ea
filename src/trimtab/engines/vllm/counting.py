"""Whether a pass steered what it was to steer: what was counted at each site, against the plan.

Where Python runs in every pass, the operator's calls are counted. Where a captured graph is replayed, the graph counts
by itself: at each site it adds to a number on the device. The numbers come to the host along with the sampled
tokens, and compared before these leave the worker: a token that should have been steered and wasn't is never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.steering import Site

RECEIPT = "_trimtab_receipt"
"""The attribute of a worker's output in which its receipt travels to the scheduler."""

MARK = "trimtab: "
"""How the reason begins for which a request is failed."""

DOSE = f"{MARK}the doses "
"""And where that is since it was pushed harder than it may be."""

DOSES = "trimtab_doses"
"""Under which name the doses of a capped request travel with vLLM's outputs."""

Measured = list[tuple[int, str, float, int]]
"""A request's doses as plain data: layer and kind of each site, the mean dose there, of so many tokens."""

CALL = 1 << 32
"""What a call of the operator adds to a site's count, besides its tokens: calls stand above this, tokens below."""


def fault(site: Site, count: int, tokens: int) -> str | None:
    """What is wrong where the operator was to run once at a site, on at least `tokens` tokens; `None`: nothing."""
    if CALL + tokens <= count < 2 * CALL:
        return None
    calls, seen = divmod(count, CALL)
    happened = "wasn't run" if not calls else f"ran {calls} times, on {seen} tokens"
    where = f"behind block {site.layer}" if site.kind == "residual" else f"at {site}"
    return f"{MARK}{where} the steering was to run once, on {tokens} tokens, and {happened}"


@dataclass
class Receipt:
    """What a worker says of a pass: how many requests with a steering it held, and why some of them weren't steered.

    And the `doses` so far of those that have a cap. `late` finds further faults, once the pass has ended on the device;
    it is called once, and so is `weighed`, which says the doses.
    """

    requests: int
    faults: dict[str, str] = field(default_factory=dict)
    doses: dict[str, Measured] = field(default_factory=dict)
    weighed: Callable[[], tuple[Mapping[str, Measured], Mapping[str, str]]] | None = None
    late: Callable[[], Mapping[str, str]] | None = None
    ready: Callable[[], bool] = lambda: True  # whether `late` has nothing to wait for

    def settle(self) -> dict[str, str]:
        """All faults, by request."""
        if self.weighed is not None:
            weighed, self.weighed = self.weighed, None
            doses, above = weighed()
            self.doses.update(doses)
            self.faults.update(above)
        if self.late is not None:
            late, self.late = self.late, None
            self.faults.update(late())
        return self.faults

    def plain(self) -> tuple[int, dict[str, str], dict[str, Measured]]:
        """What the scheduler gets."""
        faults = self.settle()
        return self.requests, faults, self.doses


class GraphCounts:
    """Numbers on the device, one a site, to which a graph adds at each replay: a call, and its tokens."""

    def __init__(self, sites: Collection[Site], device: torch.device) -> None:
        self.sites: tuple[Site, ...] = tuple(sites)
        self._all = torch.zeros(len(sites), dtype=torch.int64, device=device)
        self._numbers = dict(zip(sites, self._all.unbind(), strict=True))  # views, which stay where they are

    def count(self, site: Site, tokens: int) -> None:
        """Part of the graph: one number is added to, in place."""
        self._numbers[site].add_(CALL + tokens)

    def number_at(self, site: Site) -> Tensor:
        """A site's number, `[]`."""
        return self._numbers[site]

    def clear(self) -> None:
        """Before a pass."""
        self._all.zero_()

    def copy(self) -> tuple[Callable[[], dict[Site, int]], Callable[[], bool]]:
        """What is counted by now, on its way to the host: how to read it, and whether it has arrived. Nothing waits."""
        on_gpu = self._all.is_cuda
        host = torch.empty(len(self.sites), dtype=torch.int64, pin_memory=on_gpu)
        host.copy_(self._all, non_blocking=on_gpu)
        event: Any = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()

        def read() -> dict[Site, int]:
            if event is not None:
                event.synchronize()  # the sampled tokens are here, so it has arrived
            return dict(zip(self.sites, host.tolist(), strict=True))

        return read, lambda: event is None or event.query()
