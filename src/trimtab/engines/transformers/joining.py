"""Prefill of the prompts that join a batch: together in one left-padded pass, each under its own steering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.images import PromptImages
from trimtab.engines.resolve import ReadActivations, resolve
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import head_count, steered_scores
from trimtab.engines.transformers.columns import RowCopier
from trimtab.engines.transformers.images import (
    PositionShift,
    check_decodes_from_cache,
    images_reader,
    recording_positions,
)
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.masks import PaddedMasks
from trimtab.engines.transformers.monitoring import MonitorReader
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.prefill import Prefill, decides_at_prefill
from trimtab.engines.transformers.read import padded, reader
from trimtab.engines.transformers.rows import NewestTokens
from trimtab.engines.transformers.scores import (
    LayerScores,
    ScoredRow,
    activation_edits,
    compile_scores,
    edited_sites,
    score_edits,
)
from trimtab.engines.transformers.session import Session, Tally
from trimtab.engines.transformers.verify import Past
from trimtab.steering import Edit, Site, Steering


@dataclass(frozen=True)
class PrefillResult:
    """The result of a prefill: each prompt's edits and measured doses, the next token's logits, and the cache.

    `past` is the state that the rows of the last prompt token continue from, if next tokens will be verified. `shift`
    is the next token's position id minus the number of tokens (see `PositionShift`).
    """

    edits: Sequence[tuple[Edit, ...]]
    names: Sequence[tuple[str, ...]]
    tallies: Sequence[Tally]
    logits: Tensor  # [prompts, vocabulary]
    cache: Any
    lengths: Sequence[int]
    past: Past | None = None
    shift: int = 0


@dataclass(frozen=True)
class PromptReader:
    """Prefills prompts for one batch.

    Args:
        model: The whole model.
        layout: Its layout.
        masks: Masks of padded batches.
        pad: The padding token.
        device: The input device.
        new_cache: Creates an empty cache.
        model_computes_positions: Whether the model computes its position ids itself.
        watch: Reads the last tokens for monitors.
    """

    model: Any
    layout: Layout
    masks: PaddedMasks
    pad: int
    device: torch.device
    new_cache: Callable[[], Any]
    model_computes_positions: bool = False
    watch: MonitorReader | None = None

    def padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and position ids `[prompts, columns]` of left-padded prompts."""
        ids, mask = padded(prompts, left=True, device=self.device, pad=self.pad)
        return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)

    def read(
        self,
        texts: Sequence[tuple[Sequence[int], Steering | None]],
        *,
        verified: bool = False,
        copied: bool = False,
        images: PromptImages | None = None,
    ) -> PrefillResult:
        """Prefill these prompts, each under its own steering.

        Args:
            texts: Token ids and steering of each prompt.
            verified: Whether the next tokens will be verified.
            copied: Whether verification uses copies of the cache; the last token is then computed in a separate pass.
            images: The images of the prompt, which is then the only one.
        """
        prompts = [list(ids) for ids, _ in texts]
        width = max(map(len, prompts))
        ids, mask, positions = self.padded(prompts)
        position_ids = None if self.model_computes_positions else positions
        cache = self.new_cache()
        before: list[RowCopier] = []
        counted = PositionShift()

        def run() -> Tensor:
            nonlocal counted
            start = width - 1 if copied else 0
            if images is not None:  # the model computes the position ids of images itself
                with recording_positions(self.layout, start or width) as counted:
                    how = (cache, None if copied else self.watch, images.until(start or width))
                    logits = last_logits(self.model, ids[:, : start or None], mask[:, : start or None], None, *how)
                if not copied:
                    return logits
            elif start:
                part = slice(0, start)
                last_logits(
                    self.model,
                    ids[:, part],
                    mask[:, part],
                    position_ids[:, part] if position_ids is not None else None,
                    cache,
                )
            if copied:
                aside = compat.snapshot_cache(cache)
                before.append(lambda picked: compat.fork(aside, picked))
            newest = position_ids[:, start:] + counted.shift if position_ids is not None else None
            return last_logits(self.model, ids[:, start:], mask, newest, cache, self.watch)

        steerings, lengths = [steering for _, steering in texts], [len(prompt) for prompt in prompts]
        if images is not None:
            check_decodes_from_cache(self.model, self.layout, prompts[0], images)
        if images is None and decides_at_prefill(self.layout, steerings, lengths, {}):
            prefill = Prefill(self.model, self.layout, steerings, lengths)
            edits, names = prefill.edits, prefill.names  # filled during the pass
            session = Session(self.model, self.layout, prefill.decide)
            session.expect(lengths, width)
            with prefill.hooked(session), session.hooked(prefill.sites):
                logits = run()
        else:
            resolved = resolve(steerings, lengths, self.reads(prompts, images))
            edits, names = resolved.edits, resolved.names
            session = Session(self.model, self.layout, lambda *_: [activation_edits(row_edits) for row_edits in edits])
            session.expect(lengths, width)
            scored = [
                ScoredRow(score_edits(row_edits), n, width - n) for row_edits, n in zip(edits, lengths, strict=True)
            ]
            scores = compile_row_scores(self.layout, scored, width)
            sites = edited_sites([edit for row_edits in edits for edit in row_edits])
            with steered_pass_hooks(self.layout, self.masks, session, sites, scores, lambda: width):
                logits = run()
        session.check_reached(width)
        past = None
        if verified:
            last = None if position_ids is None else position_ids[:, -1:] + counted.shift
            token = NewestTokens(ids[:, -1:], last, mask if copied or min(lengths) < width else None)
            past = Past(token, before[0] if copied else cache, width)
        tallies = [session.tally(i) for i in range(len(texts))]
        return PrefillResult(edits, names, tallies, logits, cache, lengths, past, counted.shift)

    def reads(self, prompts: Sequence[Sequence[int]], images: PromptImages | None) -> ReadActivations:
        """A function that reads the activations of these prompts, or of the one with images, in separate passes."""
        if images is None:
            return reader(self.layout, prompts)
        (ids,) = prompts
        return images_reader(self.model, self.layout, ids, images)


def compile_row_scores(layout: Layout, scored: Sequence[ScoredRow], width: int) -> dict[int, LayerScores]:
    """The edits of these rows' attention scores by layer; empty if there are none."""
    if not any(row.edits for row in scored):
        return {}
    return compile_scores(scored, width, head_count(layout), torch.device("cpu"))


@contextmanager
def steered_pass_hooks(
    layout: Layout,
    masks: PaddedMasks,
    session: Session,
    sites: Sequence[Site],
    scores: dict[int, LayerScores],
    columns: Callable[[], int],
    padded: bool = False,
) -> Iterator[None]:
    """Attach the hooks for a pass: the session's at `sites`, and those that apply `scores` to attention scores."""
    with session.hooked(sites):
        if scores:
            with steered_scores(layout, scores, columns, masks.function_for(padded)):
                yield
        else:
            with masks.open(padded):
                yield
