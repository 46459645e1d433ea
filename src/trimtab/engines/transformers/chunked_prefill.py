"""Chunked prefill: a long prompt is read in chunks, so that other rows can decode, and limits can apply, in between.

The result equals that of one pass over the whole prompt: each chunk attends to the cache of the previous ones, and the
hooks know the absolute positions of each chunk. Gates, and operations that depend on the prompt, need the activations
of the unsteered prompt, so the prompt is first read unsteered, also in chunks. The steered reading then starts at the
first token at which an edit acts; the cache before it is reused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.resolve import (
    PositionsByRequest,
    active_edits,
    depends_on_prompt,
    gate_readings,
    positions_read,
    resolve,
)
from trimtab.engines.transformers.attention import head_count, steered_scores
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.monitoring import MonitorReader
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.scores import (
    ScoredRow,
    activation_edits,
    compile_scores,
    edited_sites,
    is_score_edit,
    score_edits,
)
from trimtab.engines.transformers.session import Session, Tally
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Site, Steering

CHUNK = 256
"""Tokens per chunk: a few seconds for a small model on one CPU core, negligible on a GPU."""


class ChunkedPrefill:
    """The prefill of one prompt. `edits`, `names`, `cache` and `tally()` are final once `advance` returns logits.

    Args:
        model: The whole model.
        layout: Its layout.
        ids: The prompt, at least one token.
        steering: The prompt's steering.
        device: The device of the inputs.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        ids: Sequence[int],
        steering: Steering | None,
        device: torch.device,
    ) -> None:
        self.model = model
        self.layout = layout
        self.ids: list[int] = list(ids)
        self.steering = steering
        self.cache: DynamicCache = DynamicCache()
        self.watch: MonitorReader | None = None  # reads the last token for monitors
        self.edits: tuple[Edit, ...] = ()
        self.names: tuple[str, ...] = ()
        self._device = device
        self._done = 0
        self.reused_tokens = 0  # leading tokens that come from a cache
        self._kept: dict[Site, list[Tensor]] = {}
        self._session = Session(model, layout, lambda *_: [activation_edits(self.edits)])
        self._wanted = sorted(gate_readings(steering), key=str)
        self._open = {edit.site for edit in active_edits(steering) if depends_on_prompt(edit)}
        self._reading_unsteered = bool(self._wanted or self._open)
        if not self._reading_unsteered:
            self._decide({})
            self._session.expect([len(self.ids)])

    def advance(self, chunk: int | None = None) -> Tensor | None:
        """Read up to `chunk` more tokens (default: `CHUNK`).

        Returns the logits of the last token `[1, vocabulary]` once the whole prompt is read, otherwise `None`.
        """
        start, stop = self._done, min(self._done + (chunk or CHUNK), len(self.ids))
        ids = torch.tensor([self.ids[start:stop]], device=self._device)
        mask = torch.ones(1, stop, dtype=torch.long, device=self._device)
        positions = torch.arange(start, stop, device=self._device)[None]
        with self._recording_from(start) if self._reading_unsteered else self._steering(stop):
            logits = last_logits(self.model, ids, mask, positions, self.cache, self.watch)
        self._done = stop
        if stop < len(self.ids):
            return None
        if not self._reading_unsteered:
            self._session.check_reached(stop)
            return logits
        self._reading_unsteered = False
        self._decide({site: torch.cat(parts) for site, parts in self._kept.items()})
        self._kept = {}
        first = self._first_edited()
        if first >= stop:
            return logits
        self._go_back(first)
        return None

    def reuse_cache(self, cache: DynamicCache, tokens: int) -> None:
        """Continue from a cache of the first `tokens` tokens, computed under the same edits as would act on them here.

        Only before the first `advance`, and if the steering doesn't depend on the prompt's activations.
        """
        assert not self._done
        assert not self._reading_unsteered
        assert tokens < len(self.ids)
        self.cache, self._done, self.reused_tokens = cache, tokens, tokens
        self._session.expect([len(self.ids)], resumed=True)

    def tally(self) -> Tally:
        """The measurements for the prompt's doses."""
        return self._session.tally(0)

    # ---- the unsteered reading ---------------------------------------------------------------------------

    @property
    def _places(self) -> dict[Site, list[int]]:
        """The positions whose activations are kept, in order, by site."""
        length = len(self.ids)
        by_gates = positions_read(self._wanted, length)
        return {reading.site: by_gates for reading in self._wanted} | {site: list(range(length)) for site in self._open}

    @contextmanager
    def _recording_from(self, start: int) -> Iterator[None]:
        owner = get_ident()

        def keep(site: Site, where: Sequence[int]) -> Callable[[Tensor], None]:
            def hook(x: Tensor) -> None:
                if get_ident() == owner:
                    x = x.reshape(-1, x.shape[-1])
                    here = [p - start for p in where if start <= p < start + len(x)]
                    self._kept.setdefault(site, []).append(x[torch.tensor(here, dtype=torch.long, device=x.device)])

            return hook

        before = {site: len(self._kept.get(site, ())) for site in self._places}
        with ExitStack() as stack:
            for site, where in self._places.items():
                stack.callback(attach(place(self.layout, site), keep(site, where)).remove)
            yield
        for site, count in before.items():
            if len(self._kept.get(site, ())) != count + 1:
                raise TrimtabError(f"{site} didn't run exactly once in a pass over the prompt, so no gate was decided")

    def _decide(self, activations: dict[Site, Tensor]) -> None:
        rows = {site: {p: at for at, p in enumerate(where)} for site, where in self._places.items()}

        def read(where: PositionsByRequest, sites: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
            return {0: {site: activations[site][[rows[site][p] for p in where[0]]] for site in sites}}

        resolved = resolve([self.steering], [len(self.ids)], read)
        (self.edits,), (self.names,) = resolved.edits, resolved.names

    def _first_edited(self) -> int:
        """The first position of the prompt at which an edit acts; 0 with edits of attention scores."""
        if any(is_score_edit(edit) for edit in self.edits):
            return 0
        length = len(self.ids)
        return min((start for edit in self.edits for start, _ in edit.positions.reach(length)), default=length)

    def _go_back(self, first: int) -> None:
        """Crop the cache to the tokens before `first`; the next pass is steered and starts there."""
        if first:
            layers: list[Any] = list(self.cache.layers)
            for layer in layers:
                if layer.keys is not None and layer.values is not None:
                    layer.keys, layer.values = layer.keys[..., :first, :], layer.values[..., :first, :]
        else:
            self.cache = DynamicCache()
        self._done = first
        self._session.expect([len(self.ids)], resumed=first > 0)

    # ---- the steered reading -----------------------------------------------------------------------------

    @contextmanager
    def _steering(self, columns: int) -> Iterator[None]:
        scored = ScoredRow(score_edits(self.edits), len(self.ids), 0)
        sites = edited_sites(self.edits)
        with ExitStack() as stack:
            stack.enter_context(self._session.hooked(sites))
            if scored.edits:
                layers = compile_scores([scored], len(self.ids), head_count(self.layout), torch.device("cpu"))
                stack.enter_context(steered_scores(self.layout, layers, lambda: columns))
            yield
