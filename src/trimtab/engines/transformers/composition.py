"""The state shared by decode steps while the rows of a batch stay the same; it is copied to the device once."""

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
from trimtab.engines.transformers.joining import compile_row_scores, steered_pass_hooks
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.masks import PaddedMasks
from trimtab.engines.transformers.sampling import BatchSampler
from trimtab.engines.transformers.scores import ScoredRow, score_edits
from trimtab.engines.transformers.verify import Verifier


class Composition:
    """The rows of a batch. `ids` and `positions` `[rows]` are the input tokens of the next step and their positions.

    Args:
        layout: The model's layout.
        masks: The masks of padded batches.
        session: Steers the rows.
        rows: The rows, in the order of the cache.
        cache: Their cache.
        passes: Runs the candidates of rows with rejection; `None` if there have been no such rows.
        masked: Whether the model gets an attention mask even if there are no pads.
        device: The device of the inputs.
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
        self._scores = compile_row_scores(layout, scored, cache.width)
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
        """The attention mask `[rows, width]`, 0 at pads; `None` if there are no pads and no mask is needed."""
        if self._pads is None:
            return None
        return (torch.arange(width, device=self._pads.device)[None] >= self._pads).long()

    def advance(self, tokens: Tensor) -> None:
        """Set the input tokens of the next step."""
        self.ids, self.positions = tokens, self.positions + 1

    @contextmanager
    def open(self) -> Iterator[None]:
        """Install the hooks and the steered attention for one step."""
        session, columns, padded = self._session, self._cache.width + 1, self._pads is not None
        with steered_pass_hooks(
            self._layout, self._masks, session, session.sites, self._scores, lambda: columns, padded
        ):
            yield


@dataclass(frozen=True)
class DraftResults:
    """Draft tokens that were computed in a pass, their logits, and their indices by row key and token id."""

    drafts: Drafts
    logits: Tensor
    places: Mapping[tuple[int, int], int]

    @classmethod
    def of(cls, rows: Sequence[BatchRow], drafts: Drafts, logits: Tensor) -> DraftResults:
        """The draft tokens of these rows of the batch."""
        pairs = zip(drafts.rows, drafts.ids, strict=True)
        return cls(drafts, logits, {(rows[row].key, token): i for i, (row, token) in enumerate(pairs)})

    def accepted_indices(self, rows: Sequence[BatchRow]) -> list[int] | None:
        """The index of each row's accepted draft, the one equal to its newest token; `None` if any row has none."""
        places = [self.places.get((row.key, row.newest)) for row in rows]
        known = [place for place in places if place is not None]
        return known if len(known) == len(places) else None


def sampler_of(rows: Sequence[BatchRow], device: torch.device) -> BatchSampler:
    """The sampler of these rows."""
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
    """The verifier of these rows; `None` if no row has candidates. For the arguments see `Verifier`."""
    ladders = [row.ladder for row in rows]
    if not any(ladder is not None and ladder.candidates for ladder in ladders):
        return None
    return Verifier(passes, layout, ladders, requests, lengths, pads, device)


def takes_drafts(rows: Sequence[BatchRow], verifier: Verifier) -> bool:
    """Whether passes over candidates include draft tokens.

    Only if no row is steered or monitored at every token, since drafts are computed unsteered and unmonitored.
    """
    plain = not any(row.edits or row.request.monitors for row in rows)
    return verifier.passes.shares and not verifier.fused and plain
