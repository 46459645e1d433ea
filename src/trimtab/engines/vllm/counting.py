"""Whether a pass steered what it was to steer: what was counted behind each block, against the plan.

Where Python runs in every pass, the operator's calls are counted. Where a captured graph is replayed, the graph counts
by itself: behind each block it adds to a number on the device. The numbers come to the host along with the sampled
tokens, and compared before these leave the worker: a token that should have been steered and wasn't is never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

RECEIPT = "_trimtab_receipt"
"""The attribute of a worker's output in which its receipt travels to the scheduler."""

MARK = "trimtab: "
"""How the reason begins for which a request is failed."""

CALL = 1 << 32  # in a number of a graph's: calls above, tokens below


class Seen(NamedTuple):
    """How often the operator ran behind a block in one pass, and on how many tokens."""

    calls: int = 0
    tokens: int = 0

    def again(self, tokens: int) -> Seen:
        return Seen(self.calls + 1, self.tokens + tokens)


def fault(layer: int, seen: Seen, tokens: int) -> str | None:
    """What is wrong where the operator was to run once behind a block, on at least `tokens` tokens; `None`: nothing."""
    if seen.calls == 1 and seen.tokens >= tokens:
        return None
    found = "wasn't run" if not seen.calls else f"ran {seen.calls} times, on {seen.tokens} tokens"
    return f"{MARK}behind block {layer} the steering was to run once, on {tokens} tokens, and {found}"


@dataclass
class Receipt:
    """What a worker says of a pass: how many requests with a steering it held, and why some of them weren't steered.

    `late` finds further faults, once the pass has ended on the device; it is asked once.
    """

    requests: int
    faults: dict[str, str] = field(default_factory=dict)
    late: Callable[[], Mapping[str, str]] | None = None
    ready: Callable[[], bool] = lambda: True  # whether `late` has nothing to wait for

    def settle(self) -> dict[str, str]:
        """All faults, by request."""
        if self.late is not None:
            late, self.late = self.late, None
            self.faults.update(late())
        return self.faults

    def plain(self) -> tuple[int, dict[str, str]]:
        """What the scheduler is told."""
        return self.requests, self.settle()


class GraphCounts:
    """Numbers on the device, one a block, to which a graph adds at each replay: a call, and its tokens."""

    def __init__(self, layers: Sequence[int], device: torch.device) -> None:
        self.layers = tuple(layers)
        self._all = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self._one = dict(zip(layers, self._all.unbind(), strict=True))  # views, which stay where they are

    def count(self, layer: int, tokens: int) -> None:
        """Part of the graph: one number is added to, in place."""
        self._one[layer].add_(CALL + tokens)

    def clear(self) -> None:
        """Before a pass."""
        self._all.zero_()

    def copy(self) -> tuple[Callable[[], dict[int, Seen]], Callable[[], bool]]:
        """What is counted by now, on its way to the host: how to read it, and whether it has arrived. Nothing waits."""
        on_gpu = self._all.is_cuda
        host = torch.empty(len(self.layers), dtype=torch.int64, pin_memory=on_gpu)
        host.copy_(self._all, non_blocking=on_gpu)
        event: Any = None
        if on_gpu:
            event = torch.cuda.Event()
            event.record()

        def read() -> dict[int, Seen]:
            if event is not None:
                event.synchronize()  # the sampled tokens are here, so it has arrived
            return {layer: Seen(*divmod(value, CALL)) for layer, value in zip(self.layers, host.tolist(), strict=True)}

        return read, lambda: event is None or event.query()
