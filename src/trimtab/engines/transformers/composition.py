"""What the steps of a batch need for as long as its rows stay the same: it is put on the device once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers.batch_row import BatchRow
from trimtab.engines.transformers.batch_session import BatchSession
from trimtab.engines.transformers.drafts import Drafts
from trimtab.engines.transformers.joining import compiled, steering
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.masks import PaddedMasks
from trimtab.engines.transformers.sampling import BatchSampler
from trimtab.engines.transformers.scores import ScoredRow, score_edits
from trimtab.engines.transformers.verify import Verifier


class Composition:
    """`ids` and `positions` `[rows]` are those of the tokens that the next step reads.

    Args:
        layout: The model's.
        masks: Of padded batches.
        session: Steers the rows.
        rows: In the order of the cache's.
        cache: Theirs.
        passes: Runs rows of those that are verified, if any are.
        masked: Whether the model is told a mask where there are no pads, too.
        device: Where inputs go.
    """

    def __init__(
        self,
        layout: Layout,
        masks: PaddedMasks,
        session: BatchSession,
        rows: Sequence[BatchRow],
        cache: Any,
        passes: Any,
        masked: bool,
        device: torch.device,
    ) -> None:
        self._layout, self._masks, self._session, self._cache = layout, masks, session, cache
        pads = [cache.width - length for length in cache.lengths]
        scored = [
            ScoredRow(score_edits(row.edits), len(row.request.ids), pad) for row, pad in zip(rows, pads, strict=True)
        ]
        self._scores = compiled(layout, scored, cache.width)
        self.sampler: BatchSampler = sampler_of(rows, device)
        self.ids = torch.tensor([row.newest for row in rows], device=device)
        self.positions = torch.tensor([row.length - 1 + row.shift for row in rows], device=device)
        self._pads = torch.tensor(pads, device=device)[:, None] if any(pads) or masked else None
        lengths = [len(row.request.ids) for row in rows]
        self.verifier: Verifier | None = verifier_of(rows, layout, passes, range(len(rows)), lengths, pads, device)
        self.drafts: bool = self.verifier is not None and takes_drafts(rows, self.verifier)
        plain = not any(row.edits or row.request.monitors for row in rows)
        self.fuses = self.verifier is not None and self.verifier.fused and plain

    def mask(self, width: int) -> Tensor | None:
        """`[rows, width]`: 1 where a row has a token; `None` where all have."""
        if self._pads is None:
            return None
        return (torch.arange(width, device=self._pads.device)[None] >= self._pads).long()

    def advance(self, tokens: Tensor) -> None:
        """The next step reads these."""
        self.ids, self.positions = tokens, self.positions + 1

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hooks and attention for one step."""
        session, columns, padded = self._session, self._cache.width + 1, self._pads is not None
        with steering(self._layout, self._masks, session, session.sites, self._scores, lambda: columns, padded):
            yield


@dataclass(frozen=True)
class Drafted:
    """Draft tokens that a pass took along, their logits, and where each is, by its row's key and its id."""

    drafts: Drafts
    logits: Tensor
    places: Mapping[tuple[int, int], int]

    @classmethod
    def of(cls, rows: Sequence[BatchRow], drafts: Drafts, logits: Tensor) -> Drafted:
        """For these rows of the batch."""
        pairs = zip(drafts.rows, drafts.ids, strict=True)
        return cls(drafts, logits, {(rows[row].key, token): i for i, (row, token) in enumerate(pairs)})

    def true(self, rows: Sequence[BatchRow]) -> list[int] | None:
        """For each of these rows its draft that has come true; `None` where one has none."""
        places = [self.places.get((row.key, row.newest)) for row in rows]
        known = [place for place in places if place is not None]
        return known if len(known) == len(places) else None


def sampler_of(rows: Sequence[BatchRow], device: torch.device) -> BatchSampler:
    """How these rows choose their tokens."""
    samplers = [row.sampler for row in rows if row.sampler is not None]
    return BatchSampler(samplers, [row.request.ids for row in rows], [row.tokens for row in rows], device)


def verifier_of(
    rows: Sequence[BatchRow],
    layout: Layout,
    passes: Any,
    requests: Sequence[int],
    lengths: Sequence[int],
    pads: Sequence[int],
    device: torch.device,
) -> Verifier | None:
    """What verifies the tokens of these rows, as `Verifier` has it; `None` where no row has a rung."""
    ladders = [row.ladder for row in rows]
    if not any(ladder is not None and ladder.rungs for ladder in ladders):
        return None
    return Verifier(passes, layout, ladders, requests, lengths, pads, device)


def takes_drafts(rows: Sequence[BatchRow], verifier: Verifier) -> bool:
    """Whether passes of rungs take drafts along: no row is steered or monitored at every token, so that these may be
    its next."""
    plain = not any(row.edits or row.request.monitors for row in rows)
    return verifier.passes.shares and not verifier.fused and plain
