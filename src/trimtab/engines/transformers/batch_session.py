"""A session whose rows come and go, each between any two passes of one token a row; the others go on as they were.

What is done to a row is its slot of a `Bank`. It is written when the row joins and where its positions' rules change;
between such passes a step reads what lies there, as a `Session` in steady decoding does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.folding import Prepared, States, sweep
from trimtab.engines.meanings import NOTHING, Followed, Follower, Holding
from trimtab.engines.transformers.bank import Bank, compile_edits
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.plan import Plan
from trimtab.engines.transformers.positions import Pass
from trimtab.engines.transformers.session import STRIDE, Session, Tally
from trimtab.engines.transformers.steered_pass import SteeredPass
from trimtab.engines.transformers.weights import device_of
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Site

Segment = tuple[int, int | None, tuple[Edit, ...], frozenset[Site]]
"""From which position to which (`None`: to the end) which edits act, and where."""
STEERED = 1
"""The one state that a row is in to which anything is done, as `Session` counts them."""

ASIDE = 256
"""So many sums of what was measured are put aside before the host waits for them."""


@dataclass
class _SteeredRow:
    """A row's edits by position, the position of the token that it reads next, and what was measured of it so far."""

    segments: list[Segment]
    prompt_length: int
    first: int
    position: int
    sites: frozenset[Site]  # where it is edited, sooner or later
    edits: tuple[Edit, ...] = ()
    text: Follower | None = None  # where its edits ask what is generated
    at: Followed | None = None  # where that is, with the token that it reads next
    unmeasured: int = 0  # passes since it was measured
    measured: dict[Site, tuple[float, float]] = field(default_factory=dict)
    written: tuple[Edit, ...] = ()  # what its slot of the bank holds

    @property
    def acting(self) -> tuple[Edit, ...]:
        """The edits that act on the next token."""
        for start, stop, edits, _ in self.segments:
            if start <= self.position and (stop is None or self.position < stop):
                return edits
        return ()

    @property
    def left(self) -> float:
        """In how many passes other edits act, if ever."""
        marks = [m for segment in self.segments for m in segment[:2] if m is not None and m > self.position]
        return min(marks, default=inf) - self.position

    def turn(self, token: int) -> bool:
        """It reads this token next. Whether that changes which edits act, for what the token means."""
        if self.text is None:
            return False
        before = self.at
        self.at = self.text.after(self.text.start if before is None else before, token)
        if before is not None and before.holding is self.at.holding:
            return False
        self.act(_segments(self.edits, self.prompt_length, self.at.holding))
        return True

    def act(self, segments: list[Segment]) -> None:
        """From the token that it reads next on, these act."""
        here = self.position
        past = [(a, here if b is None else min(b, here), *more) for a, b, *more in self.segments if a < here]
        to_come = [(max(a, here), b, *more) for a, b, *more in segments if b is None or b > here]
        self.segments = [*past, *to_come]  # type: ignore[list-item]

    @property
    def steered(self) -> dict[Site, int]:
        """At how many tokens it was edited so far, by site."""
        counts: dict[Site, int] = {}
        for start, stop, _, sites in self.segments:
            count = min(self.position, self.position if stop is None else stop) - max(start, self.first)
            for site in sites if count > 0 else ():
                counts[site] = counts.get(site, 0) + count
        return counts


def _segments(edits: tuple[Edit, ...], prompt_length: int, holding: Holding) -> list[Segment]:
    """Where which edits act, if these meanings hold of the generated token at hand."""
    spans = sweep(edits, prompt_length, holding)
    acting = [(a, b, tuple(edit for edit in edits if edit.positions in rules)) for a, b, rules in spans]
    return [(a, b, here, frozenset(edit.site for edit in here)) for a, b, here in acting]


class BatchSession(Session):
    """Steers passes of one token for each of its rows, which `insert` and `remove` number as a batch's cache does.

    Rows come with their prompts read: nothing here edits those. `advance` after each pass.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__(model, layout, lambda *_: [])
        self.bank: Bank = Bank(self._dtype, self._device_of)
        self.rows: list[_SteeredRow] = []
        self.sites: list[Site] = []  # where any row is edited, sooner or later
        self._steered: Counter[Site] = Counter()  # the same, with how many rows are edited there
        self._left: float = 0  # in how many passes some row's edits change
        self._weights: Tensor | None = None
        self._aside: list[tuple[list[_SteeredRow], list[Site], Tensor]] = []  # sums, of these rows at these sites

    def insert(
        self,
        edits: Sequence[Edit],
        prompt_length: int,
        text: Follower | None = None,
        token: int | None = None,
        position: int | None = None,
    ) -> None:
        """One more row, the last, whose prompt has so many tokens; it has read all of them, or those before `position`.

        Where its edits ask what is generated, `text` follows that, and `token` is the first one.

        Raises:
            TrimtabError: The edits can't act together, or not in the model's dtype; the batch is as it was.
        """
        every = tuple(edits)
        segments = _segments(every, prompt_length, NOTHING)
        first = prompt_length if position is None else position
        row = _SteeredRow(segments, prompt_length, first, first, _sites(every, segments, text), every, text)
        if token is not None:
            row.turn(token)
        row.written = row.acting
        self.bank.insert(row.written)
        self._flush()
        self.rows.append(row)
        self._steered.update(row.sites)
        self._change()

    def change(
        self, number: int, edits: Sequence[Edit], text: Follower | None = None, tokens: Sequence[int] = ()
    ) -> None:
        """From the next pass on a row is under these edits; what was done to it before stays counted.

        Where the edits ask what is generated, `text` follows that, and `tokens` is all of it, with the one read next.

        Raises:
            TrimtabError: The edits can't act together, or not in the model's dtype; the row is as it was.
        """
        row = self.rows[number]
        compile_edits(edits, self._dtype)
        self._flush()
        self._steered.subtract(row.sites)
        row.edits, row.text, row.at = tuple(edits), text, None
        if text is not None and tokens:
            row.at = text.of(tokens)[-1]
        row.act(_segments(row.edits, row.prompt_length, NOTHING if row.at is None else row.at.holding))
        row.sites |= _sites(row.edits, row.segments, text)
        self._steered.update(row.sites)
        self._change()

    def remove(self, number: int) -> Tally:
        """A row leaves, and the last one takes its number. Returns what was measured of it."""
        tally = self.tally(number)
        self.bank.remove(number)
        self._steered.subtract(self.rows[number].sites)
        self._steered += Counter()  # leave out those that no row is steered at any more
        last = self.rows.pop()
        if number < len(self.rows):
            self.rows[number] = last
        self._change()
        return tally

    def advance(self) -> None:
        """A pass is done, steered or not: each row reads its next token."""
        for row in self.rows:
            row.position += 1
        self._left -= 1
        self._reached = None

    def turn(self, tokens: Sequence[int]) -> None:
        """The next pass reads these, one a row, of which some may be edited otherwise than the last."""
        for row, token in zip(self.rows, tokens, strict=True):
            if row.turn(token):
                self._left = 0

    def tally(self, request: int, tokens: int | None = None) -> Tally:
        """What was measured of a row so far, and where it was steered."""
        self._flush()
        self._collect()
        row = self.rows[request]
        counts = row.steered
        return {site: (*measured, counts[site]) for site, measured in row.measured.items()}

    # ---- passes ------------------------------------------------------------------------------------------

    def _enter(self, forward_pass: Pass, arguments: dict[str, Any], begins: bool) -> SteeredPass:
        if forward_pass.length != 1 or forward_pass.rows != len(self.rows):
            raise TrimtabError(
                f"a pass of {forward_pass.rows} rows and {forward_pass.length} tokens, where the batch has"
                f" {len(self.rows)} rows and each reads one token"
            )
        if self._left <= 0 or self._step is None:
            self._write()
        if self._step is None:
            self._step = self._begin_step(forward_pass.device)
        return self._step

    def _write(self) -> None:
        """Write the slots of rows whose edits change here."""
        for number, row in enumerate(self.rows):
            acting = row.acting
            if acting != row.written:
                self._flush()
                self.bank.change(number, acting)
                row.written = acting
                self._step = None
        self._left = min((row.left for row in self.rows), default=inf)

    def _begin_step(self, device: torch.device) -> SteeredPass:
        """What passes do from here on, until a row's edits change or rows come and go."""
        here, count = self.bank.sites, len(self.rows)
        self.plan: Plan = Plan((), dict.fromkeys(here, ()), dict.fromkeys(here, frozenset([STEERED])))
        self._row = {site: i for i, site in enumerate(self.sites)}
        index = torch.zeros(count, 1, dtype=torch.long)
        state = STEERED if here else 0
        step = SteeredPass(((state,),) * count, 0, States(index, index), frozenset([state]))
        if here:
            touched = [self.bank.touched(site) for site in self.sites]
            weights = [row.unmeasured + 1.0 for row in self.rows]
            step.steered = torch.tensor(touched).view(len(touched), count, 1).to(device)
            self._weights = torch.tensor(weights).to(device) if max(weights) > 1 else None
            wide = torch.promote_types(self._dtype, torch.float32)
            lengths = torch.tensor([[[1.0] * count] * len(touched), [self.bank.added(site) for site in self.sites]])
            self._norms = lengths[..., None].to(device=device, dtype=wide)
            self._sums = torch.zeros(2, len(self.sites), count, device=device)
        return step

    def _prepare(self, site: Site, step: SteeredPass, x: Tensor) -> Prepared:
        return self.bank.prepared(site, x)

    def _weight(self, step: SteeredPass) -> Tensor | int:
        if step.passes > 1:
            return STRIDE
        return 1 if self._weights is None else self._weights

    # ---- rows that come and go ---------------------------------------------------------------------------

    def _change(self) -> None:
        self._step = None
        self._left = 0
        self.sites = sorted(self._steered)

    def _flush(self) -> None:
        """Put aside what was measured, before rows or their edits change. It stays on the device."""
        step = self._step
        if step is None or not step.passes or step.present == {0}:
            return
        for row in self.rows:
            row.unmeasured = (step.passes - 1) % STRIDE
        self._aside.append((list(self.rows), self.sites, self._sums))
        self._sums = torch.zeros_like(self._sums)
        if len(self._aside) >= ASIDE:
            self._collect()

    def _collect(self) -> None:
        """Add what was put aside to the rows' own, for which the host waits once."""
        if not self._aside:
            return
        numbers = iter(torch.cat([sums.flatten() for _, _, sums in self._aside]).tolist())
        for rows, sites, sums in self._aside:
            ratios, counts = ([list(islice(numbers, len(rows))) for _ in sites] for _ in range(len(sums)))
            for site, *of_site in zip(sites, ratios, counts, strict=True):
                for row, ratio, count in zip(rows, *of_site, strict=True):
                    if count:
                        before = row.measured.get(site, (0.0, 0.0))
                        row.measured[site] = (before[0] + ratio, before[1] + count)
        self._aside = []

    def _device_of(self, site: Site) -> torch.device:
        """Where a site's module computes."""
        return device_of(self._place(site).module)


def _sites(edits: Sequence[Edit], segments: Sequence[Segment], text: Follower | None) -> frozenset[Site]:
    """Where edits act, sooner or later."""
    if text is not None:
        return frozenset(edit.site for edit in edits)
    return frozenset(site for segment in segments for site in segment[3])
