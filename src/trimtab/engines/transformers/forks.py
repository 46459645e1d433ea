"""Candidates over copies of the cache: several steered versions of the token being decoded, each as a batch entry.

`rows` does this without copies, but needs attention in every layer, over keys and values as they are cached. Other
models keep a recurrent state (Mamba, Gated DeltaNet), cache a latent that is expanded to keys later (latent attention),
or don't take position ids. This module works for all of them: before a token is read, the cache is set aside; its rows
are copied, and each copy reads the token again under its own steering. This costs the memory of one cache per row, and
the copying.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from trimtab.engines.meanings import ActiveMeanings
from trimtab.engines.transformers.attention import steered_scores
from trimtab.engines.transformers.columns import RowCopier
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.rows import NewestTokens, TensorCache, Versions, apply_edits, states_at
from trimtab.errors import TrimtabError
from trimtab.steering import Site

TOGETHER = 8
"""The maximum number of rows per pass when layers are ranked, since each row has its own cache."""


class Forks:
    """Runs passes of candidate rows through a model, while `open`. Other passes aren't affected."""

    together = TOGETHER
    shares = False

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model: Any = model
        self.layout = layout
        self._owner: int | None = None
        self._versions: Versions | None = None
        self._states: tuple[int, ...] | None = None
        self._edited: set[Site] = set()
        self.tensor = TensorCache()

    @contextmanager
    def open(self, sites: Sequence[Site]) -> Iterator[None]:
        """Install hooks at `sites`, those that any version edits, while the context is open."""
        self._owner = get_ident()
        with ExitStack() as hooks:
            hooks.callback(setattr, self, "_versions", None)
            for site in sites:
                hooks.callback(attach(place(self.layout, site), partial(self._edit, site)).remove)
            yield

    def run(
        self,
        token: NewestTokens,
        cache: RowCopier,
        columns: int,
        versions: Versions,
        chosen: Sequence[int | None],
        requests: Sequence[int],
        *,
        holding: Sequence[ActiveMeanings] = (),
        **_: Any,
    ) -> Tensor:
        """The logits `[rows, vocabulary]` of the newest token under these versions (`None`: unsteered).

        `requests[i]` is the request of row i. `columns` is the number of columns including this token. `cache` makes
        copies of the unsteered cache as it was before this token. For `holding` see `Rows.run`.
        """
        rows = tuple(chosen)
        picked = self.tensor(tuple(requests), token.ids.device)
        scores = versions.select(rows)
        self._versions, self._edited = versions, set()
        self._states = states_at(versions, rows, columns, holding)
        mask = None if token.mask is None else token.mask[picked]
        positions = None if token.positions is None else token.positions[picked]
        scored = steered_scores(self.layout, scores, lambda: columns, excluded_columns=1) if scores else nullcontext()
        try:
            with scored:
                logits = last_logits(self.model, token.ids[picked], mask, positions, cache(picked))
            wanted = set() if self._states is None else set(versions.plan.stages)
            if unedited := sorted(wanted - self._edited):
                raise TrimtabError(f"the part of the model at {unedited[0]} didn't run in a pass that steers there")
        finally:
            self._versions = None
        return logits

    def _edit(self, site: Site, activations: Tensor) -> Tensor | None:
        if self._versions is None or self._states is None or get_ident() != self._owner:
            return None
        if site not in self._versions.plan.stages:
            return None
        self._edited.add(site)
        return apply_edits(self._versions, site, self._states, activations)
