"""A session for continuous batching: rows join and leave between any two decode steps, without affecting the others.

A row's edits are stored in its slot of a `Bank`. The slot is written when the row joins and when the set of acting
edits changes; otherwise a step only reads the bank, like a `Session` in steady decoding.
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

from trimtab.engines.folding import Prepared, States, active_ranges
from trimtab.engines.meanings import NOTHING, ActiveMeanings, Follower, FollowerState
from trimtab.engines.transformers.bank import Bank, compile_edits
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.plan import Plan
from trimtab.engines.transformers.positions import ForwardPass
from trimtab.engines.transformers.session import STRIDE, Session, Tally
from trimtab.engines.transformers.steered_pass import SteeredPass
from trimtab.engines.transformers.weights import device_of
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Site

Segment = tuple[int, int | None, tuple[Edit, ...], frozenset[Site]]
"""The first position, the position after the last (`None`: no end), the edits that act there, and their sites."""
STEERED = 1
"""The state, in the numbering of `Session`, of every row in a step that edits any row; unsteered, it is 0."""

MAX_PENDING_SUMS = 256
"""The number of pending measurement sums on the device after which they are copied to the host."""


@dataclass
class _SteeredRow:
    """A row's edits by position, the position of its next input token, and its measurements so far."""

    segments: list[Segment]
    prompt_length: int
    first: int
    position: int
    sites: frozenset[Site]  # where it is edited at any time
    edits: tuple[Edit, ...] = ()
    follower: Follower | None = None  # tracks the generated text, if its edits have positions by meaning
    follower_state: FollowerState | None = None  # the state of `text`, including the next input token
    unmeasured: int = 0  # passes since the last measurement
    measured: dict[Site, tuple[float, float]] = field(default_factory=dict)
    written: tuple[Edit, ...] = ()  # the edits in its slot of the bank

    @property
    def acting(self) -> tuple[Edit, ...]:
        """The edits that act on the next token."""
        for start, stop, edits, _ in self.segments:
            if start <= self.position and (stop is None or self.position < stop):
                return edits
        return ()

    @property
    def passes_left(self) -> float:
        """The number of passes until the acting edits change; `inf` if they never do."""
        marks = [m for segment in self.segments for m in segment[:2] if m is not None and m > self.position]
        return min(marks, default=inf) - self.position

    def set_input_token(self, token: int) -> bool:
        """Set the next input token. Returns whether its meaning changes which edits act."""
        if self.follower is None:
            return False
        before = self.follower_state
        self.follower_state = self.follower.after(self.follower.start if before is None else before, token)
        if before is not None and before.holding is self.follower_state.holding:
            return False
        self.replace_segments(_segments(self.edits, self.prompt_length, self.follower_state.holding))
        return True

    def replace_segments(self, segments: list[Segment]) -> None:
        """Replace the segments from the next input token on."""
        here = self.position
        past = [(a, here if b is None else min(b, here), *more) for a, b, *more in self.segments if a < here]
        to_come = [(max(a, here), b, *more) for a, b, *more in segments if b is None or b > here]
        self.segments = [*past, *to_come]  # type: ignore[list-item]

    @property
    def steered(self) -> dict[Site, int]:
        """The number of tokens edited so far, by site."""
        counts: dict[Site, int] = {}
        for start, stop, _, sites in self.segments:
            count = min(self.position, self.position if stop is None else stop) - max(start, self.first)
            for site in sites if count > 0 else ():
                counts[site] = counts.get(site, 0) + count
        return counts


def _segments(edits: tuple[Edit, ...], prompt_length: int, holding: ActiveMeanings) -> list[Segment]:
    """The segments of a row whose current generated token has these meanings."""
    spans = active_ranges(edits, prompt_length, holding)
    acting = [(a, b, tuple(edit for edit in edits if edit.positions in rules)) for a, b, rules in spans]
    return [(a, b, here, frozenset(edit.site for edit in here)) for a, b, here in acting]


class BatchSession(Session):
    """Steers decode steps of one token per row. `insert` and `remove` number the rows as the batch's cache does.

    Rows join after prefill, so prompts aren't edited here. Call `advance` after each pass.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__(model, layout, lambda *_: [])
        self.bank: Bank = Bank(self._dtype, self._device_of)
        self.rows: list[_SteeredRow] = []
        self.sites: list[Site] = []  # where any row is edited at any time
        self._steered: Counter[Site] = Counter()  # the number of rows edited at each of them
        self._passes_left: float = 0  # the number of passes until some row's edits change
        self._weights: Tensor | None = None
        self._pending_sums: list[
            tuple[list[_SteeredRow], list[Site], Tensor]
        ] = []  # pending sums of these rows and sites

    def insert(
        self,
        edits: Sequence[Edit],
        prompt_length: int,
        text: Follower | None = None,
        token: int | None = None,
        position: int | None = None,
    ) -> None:
        """Append a row.

        Args:
            edits: Its edits.
            prompt_length: In tokens.
            text: Tracks the generated text, if the edits have positions by meaning.
            token: The next input token, for `text`.
            position: The position of the next input token; default: the one after the prompt.

        Raises:
            TrimtabError: The edits can't act together, or not in the model's dtype; the batch is unchanged.
        """
        every = tuple(edits)
        segments = _segments(every, prompt_length, NOTHING)
        first = prompt_length if position is None else position
        row = _SteeredRow(segments, prompt_length, first, first, _sites(every, segments, text), every, text)
        if token is not None:
            row.set_input_token(token)
        row.written = row.acting
        self.bank.insert(row.written)
        self._flush()
        self.rows.append(row)
        self._steered.update(row.sites)
        self._invalidate_step()

    def change(
        self, number: int, edits: Sequence[Edit], text: Follower | None = None, tokens: Sequence[int] = ()
    ) -> None:
        """Replace a row's edits from the next pass on. Measurements and counts so far are kept.

        If the edits have positions by meaning, `text` tracks the generated text, and `tokens` are all generated tokens
        including the next input token.

        Raises:
            TrimtabError: The edits can't act together, or not in the model's dtype; the row is unchanged.
        """
        row = self.rows[number]
        compile_edits(edits, self._dtype)
        self._flush()
        self._steered.subtract(row.sites)
        row.edits, row.follower, row.follower_state = tuple(edits), text, None
        if text is not None and tokens:
            row.follower_state = text.states_after(tokens)[-1]
        row.replace_segments(
            _segments(
                row.edits, row.prompt_length, NOTHING if row.follower_state is None else row.follower_state.holding
            )
        )
        row.sites |= _sites(row.edits, row.segments, text)
        self._steered.update(row.sites)
        self._invalidate_step()

    def remove(self, number: int) -> Tally:
        """Remove a row; the last one takes its number. Returns the row's measurements."""
        tally = self.tally(number)
        self.bank.remove(number)
        self._steered.subtract(self.rows[number].sites)
        self._steered += Counter()  # drops sites at which no row is steered any more
        last = self.rows.pop()
        if number < len(self.rows):
            self.rows[number] = last
        self._invalidate_step()
        return tally

    def advance(self) -> None:
        """Move each row to its next token, after a pass, whether steered or not."""
        for row in self.rows:
            row.position += 1
        self._passes_left -= 1
        self._computed_columns = None

    def set_input_tokens(self, tokens: Sequence[int]) -> None:
        """Set the input tokens of the next pass, one per row; their meanings may change which edits act."""
        for row, token in zip(self.rows, tokens, strict=True):
            if row.set_input_token(token):
                self._passes_left = 0

    def tally(self, request: int, tokens: int | None = None) -> Tally:
        """A row's measurements so far, and the number of its steered tokens, by site."""
        self._flush()
        self._collect()
        row = self.rows[request]
        counts = row.steered
        return {site: (*measured, counts[site]) for site, measured in row.measured.items()}

    # ---- passes ------------------------------------------------------------------------------------------

    def _enter(self, forward_pass: ForwardPass, arguments: dict[str, Any], begins: bool) -> SteeredPass:
        if forward_pass.length != 1 or forward_pass.rows != len(self.rows):
            raise TrimtabError(
                f"a pass of {forward_pass.rows} rows and {forward_pass.length} tokens, but the batch has"
                f" {len(self.rows)} rows and each reads one token"
            )
        if self._passes_left <= 0 or self._step is None:
            self._write()
        if self._step is None:
            self._step = self._begin_step(forward_pass.device)
        return self._step

    def _write(self) -> None:
        """Write the slots of rows whose acting edits have changed."""
        for number, row in enumerate(self.rows):
            acting = row.acting
            if acting != row.written:
                self._flush()
                self.bank.change(number, acting)
                row.written = acting
                self._step = None
        self._passes_left = min((row.passes_left for row in self.rows), default=inf)

    def _begin_step(self, device: torch.device) -> SteeredPass:
        """The step that is repeated until a row's edits change or rows join or leave."""
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

    # ---- rows that join and leave ------------------------------------------------------------------------

    def _invalidate_step(self) -> None:
        self._step = None
        self._passes_left = 0
        self.sites = sorted(self._steered)

    def _flush(self) -> None:
        """Set the measurements aside, on the device, before rows or their edits change."""
        step = self._step
        if step is None or not step.passes or step.present == {0}:
            return
        for row in self.rows:
            row.unmeasured = (step.passes - 1) % STRIDE
        self._pending_sums.append((list(self.rows), self.sites, self._sums))
        self._sums = torch.zeros_like(self._sums)
        if len(self._pending_sums) >= MAX_PENDING_SUMS:
            self._collect()

    def _collect(self) -> None:
        """Add the pending measurements to their rows, with one device-to-host copy."""
        if not self._pending_sums:
            return
        numbers = iter(torch.cat([sums.flatten() for _, _, sums in self._pending_sums]).tolist())
        for rows, sites, sums in self._pending_sums:
            ratios, counts = ([list(islice(numbers, len(rows))) for _ in sites] for _ in range(len(sums)))
            for site, *of_site in zip(sites, ratios, counts, strict=True):
                for row, ratio, count in zip(rows, *of_site, strict=True):
                    if count:
                        before = row.measured.get(site, (0.0, 0.0))
                        row.measured[site] = (before[0] + ratio, before[1] + count)
        self._pending_sums = []

    def _device_of(self, site: Site) -> torch.device:
        """The device of a site's module."""
        return device_of(self._place(site).module)


def _sites(edits: Sequence[Edit], segments: Sequence[Segment], text: Follower | None) -> frozenset[Site]:
    """The sites at which edits act at any time."""
    if text is not None:
        return frozenset(edit.site for edit in edits)
    return frozenset(site for segment in segments for site in segment[3])
