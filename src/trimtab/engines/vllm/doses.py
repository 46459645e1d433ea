"""Measure the doses of requests that have a cap, in each pass, before its tokens are sent.

A dose is ‖x' - x‖ / ‖x‖ at a site, averaged over the tokens that were steered there; the doses of all sites are added
up. Scaled keys direct attention and push nothing, so they have no dose. If Python runs in a pass, the activation is
measured before and after its edit. With captured graphs, the activations that they keep are measured after the pass,
and the additions are subtracted again; so only additions can be measured there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab.engines.vllm.bank import Bank, to_device
from trimtab.engines.vllm.counting import DOSE, Measured
from trimtab.engines.vllm.program import Segment, State, state_runs
from trimtab.steering import Edit, Site


@dataclass(frozen=True, eq=False)
class SteeredRows:
    """The rows of a pass (`rows` of them, at the indices `indices`) that belong to a request and are steered at one
    site.
    """

    request: str
    rows: int
    indices: Tensor


@dataclass
class Doses:
    """The doses of requests that have a cap.

    Args:
        reported: Whether the scheduler receives this worker's results; otherwise another worker measures the same.
        caps: By request, the maximum for the sum of its doses.
        steered_rows: The rows of these requests that the current pass steers.
    """

    reported: bool = True
    caps: dict[str, float] = field(default_factory=dict)
    steered_rows: Mapping[Site, Sequence[SteeredRows]] = field(default_factory=dict)
    _sums: dict[str, dict[Site, tuple[Tensor, int]]] = field(default_factory=dict)  # sums of ratios, and token counts

    def start(self, request: str, cap: float | None) -> None:
        if cap is not None and self.reported:
            self.caps[request] = cap
            self._sums[request] = {}

    def finish(self, request: str) -> None:
        self.caps.pop(request, None)
        self._sums.pop(request, None)

    def plan(
        self,
        chunks: tuple[Sequence[str], Sequence[int], Sequence[int]],
        segments: Callable[[str], Sequence[Segment]],
        device: torch.device,
    ) -> None:
        """Find the rows that a pass steers.

        `chunks` are the pass's requests, the first position of each, and the number of tokens.
        """
        self.steered_rows = {}
        if not self.caps:
            return
        by_site: dict[Site, list[SteeredRows]] = {}
        offset = 0
        for request, first, count in zip(*chunks, strict=True):
            if request in self.caps:
                rows: dict[Site, list[int]] = {}
                at = offset
                for length, state in state_runs(segments(request), first, count):
                    for site in state.pushed if state is not None else ():
                        rows.setdefault(site, []).extend(range(at, at + length))
                    at += length
                for site, these in rows.items():
                    steered = SteeredRows(request, len(these), to_device(torch.tensor(these), device))
                    by_site.setdefault(site, []).append(steered)
            offset += count
        self.steered_rows = by_site

    def activations_before(self, site: Site, hidden: Tensor, residual: Tensor | None) -> list[Tensor]:
        """The activations at a site before they are edited."""
        return [_stream(hidden, residual, steered.indices) for steered in self.steered_rows.get(site, ())]

    def add_doses(self, site: Site, hidden: Tensor, residual: Tensor | None, old: Sequence[Tensor]) -> None:
        """Add the doses, from the activations at a site after they are edited."""
        for steered, x in zip(self.steered_rows.get(site, ()), old, strict=True):
            self._add(site, steered, _stream(hidden, residual, steered.indices) - x, x)

    def add_replayed_doses(self, kept: Mapping[Site, Tensor], bank: Bank) -> None:
        """Add the doses of a replayed pass, from the edited activations that the captured graphs have kept."""
        for site, several in self.steered_rows.items():
            if site not in kept or site not in bank.rows:
                continue
            for steered in several:
                pushed = bank.rows[site].index_select(0, bank.index.index_select(0, steered.indices)).float()
                self._add(site, steered, pushed, kept[site].index_select(0, steered.indices).float() - pushed)

    def _add(self, site: Site, steered: SteeredRows, pushed: Tensor, x: Tensor) -> None:
        ratios = torch.linalg.vector_norm(pushed, dim=-1) / torch.linalg.vector_norm(x, dim=-1)
        total, count = self._sums[steered.request].get(site, (torch.zeros((), device=ratios.device), 0))
        self._sums[steered.request][site] = (total + ratios.sum(), count + steered.rows)

    def deferred_doses(self) -> Callable[[], tuple[dict[str, Measured], dict[str, str]]]:
        """Returns a function for the doses of this pass's requests so far, and why requests exceed their caps.

        Calling the function waits for the device once.
        """
        present = {steered.request for several in self.steered_rows.values() for steered in several}
        sums = {r: sorted(self._sums[r].items()) for r in present if self._sums.get(r)}
        caps = {request: self.caps[request] for request in sums}
        every = [total / count for each in sums.values() for _, (total, count) in each]
        on_device = torch.stack(every) if every else None

        def late() -> tuple[dict[str, Measured], dict[str, str]]:
            ratios = iter(on_device.tolist() if on_device is not None else ())
            doses = {
                request: [(site.layer, site.kind, next(ratios), count) for site, (_, count) in each]
                for request, each in sums.items()
            }
            above = {}
            for request, each in doses.items():
                dose = math.fsum(ratio for _, _, ratio, _ in each)
                if not dose <= caps[request]:
                    above[request] = (
                        f"{DOSE}of all sites add up to {dose:.2g}, above the limit of {caps[request]:g}; lower the"
                        " strengths, or steer at fewer layers"
                    )
            return doses, above

        return late


def adds_only(edit: Edit) -> bool:
    """Whether an edit only adds to the residual stream, regardless of the token."""
    return not State("", (edit,)).mapped


def _stream(hidden: Tensor, residual: Tensor | None, at: Tensor) -> Tensor:
    x = hidden.index_select(0, at).float()
    return x if residual is None else x + residual.index_select(0, at).float()
