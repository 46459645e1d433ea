"""Rows over copies of the cache: several versions of the token that is being decoded, each a batch entry of its own.

What `rows` does without a copy needs attention in every layer, over keys and values just as the cache holds them. Other
models keep a recurrent state (Mamba, Gated DeltaNet), or cache what is only expanded to keys later (latent attention),
or aren't told their tokens' positions. Here nothing of that matters: before a token is read, the cache is put aside;
rows of it are copied, and each row reads the token anew under its own steering. It costs memory for as many caches as
there are rows, and the copying.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.meanings import Holding
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import steered_scores
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.rows import Versions, bound, edited, states_at
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Site

TOGETHER = 8
"""Rows of one pass at most where layers are ranked, each of which has a cache of its own."""


@dataclass(frozen=True)
class Fork:
    """The newest token of each request of a batch: the inputs of its pass, and the cache as it was before."""

    ids: Tensor  # [requests, 1]
    inputs: dict[str, Any]
    cache: Any

    def rows(self, picked: Tensor) -> dict[str, Any]:
        """The inputs of a pass with one row for each of these requests, `[rows]`."""
        count = len(self.ids)
        inputs: dict[str, Any] = {}
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[-2] == count:
                value = value.index_select(-2, picked.to(value.device))
            inputs[name] = value
        return inputs


class Forks:
    """Passes of rows through a model, while `open`. The model is as it was outside of the passes."""

    together = TOGETHER

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model: Any = model
        self.layout = layout
        self._owner: int | None = None
        self._versions: Versions | None = None
        self._states: tuple[int, ...] | None = None
        self._edited: set[Site] = set()
        self._tensors: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    @contextmanager
    def open(self, sites: Sequence[Site]) -> Iterator[None]:
        """Hooks at the sites that some version edits."""
        handles: list[Any] = []
        self._owner = get_ident()
        try:
            for site in sites:
                handles.append(attach(place(self.layout, site), partial(self._edit, site)))
            yield
        finally:
            self._versions = None
            for handle in handles:
                handle.remove()

    def start(self, model: Any, model_kwargs: dict[str, Any]) -> Any:
        """The cache of the unsteered stream: the one that `generate` has made for this model.

        Raises:
            UnsupportedError: The model takes no cache, or one of its own kind.
        """
        compat.check_common_cache(self.layout.decoder)
        cache = compat.cache_of(model_kwargs, type(model).__name__)
        return compat.new_cache(model.config) if cache is None else cache

    def read(self, inputs: dict[str, Any]) -> tuple[Any, Fork]:
        """The unsteered pass over these inputs: what it puts out, and its last token, to be read again by rows.

        A prompt is read in two passes, so that the cache can be put aside before its last token.
        """
        ids = inputs["input_ids"]
        cache = compat.cache_of(inputs, type(self.model).__name__)
        if cache is None:
            raise UnsupportedError(f"{type(self.model).__name__} decodes without a cache, which rejection needs")
        length = ids.shape[1]
        if length > 1:
            self.model(**_columns(inputs, length, slice(None, -1)), return_dict=True)
            masks = {} if compat.is_state_alone(cache) else _masks(inputs)
            inputs = {**_columns(inputs, length, slice(-1, None)), **masks}
        before = compat.put_aside(cache)
        output = self.model(**inputs, return_dict=True)
        return output, Fork(inputs["input_ids"], compat.without_cache(inputs), before)

    def check_cached(self, cache: Any, columns: int) -> None:
        """Raises `TrimtabError` unless the cache holds so many columns; one of a state alone can't say how many."""
        held = compat.past_length(cache)
        if held is not None and held != columns:
            raise TrimtabError(f"the cache of the unsteered stream holds {held} tokens where {columns} have been read")

    def run(
        self,
        token: Fork,
        cache: Any,
        columns: int,
        versions: Versions,
        chosen: Sequence[int | None],
        requests: Sequence[int],
        *,
        holding: Sequence[Holding] = (),
        **_: Any,
    ) -> Tensor:
        """The logits `[rows, vocabulary]` of the newest token under these versions (`None`: unsteered).

        `requests[i]` is the request of row i. `columns` counts the columns so far with this token. `cache`, the
        unsteered stream's, isn't looked at: rows go on from the one before this token. `holding` is as
        `Rows.run` has it.
        """
        rows = tuple(chosen)
        picked = self.tensor(tuple(requests), token.ids.device)
        scores = versions.select(rows)
        self._versions, self._edited = versions, set()
        self._states = states_at(versions, rows, columns, holding)
        inputs = compat.with_cache(self.model, token.rows(picked), compat.fork(token.cache, picked))
        scored = steered_scores(self.layout, scores, lambda: columns, own=1) if scores else nullcontext()
        try:
            with scored:
                output = self.model(**{**inputs, "use_cache": True, "return_dict": True})
            wanted = set() if self._states is None else set(versions.plan.stages)
            if unedited := sorted(wanted - self._edited):
                raise TrimtabError(f"the part of the model at {unedited[0]} didn't run in a pass that steers there")
        finally:
            self._versions = None
        return output.logits[:, -1]

    def tensor(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """These numbers on a device, where they are kept."""
        if (numbers, device) not in self._tensors:
            bound(self._tensors)
            self._tensors[numbers, device] = torch.tensor(numbers, device=device)
        return self._tensors[numbers, device]

    def _edit(self, site: Site, given: Tensor) -> Tensor | None:
        if self._versions is None or self._states is None or get_ident() != self._owner:
            return None
        if site not in self._versions.plan.stages:
            return None
        self._edited.add(site)
        return edited(self._versions, site, self._states, given)


def _columns(inputs: dict[str, Any], length: int, which: slice) -> dict[str, Any]:
    """These columns of the inputs that have one a token."""
    return {
        name: value[..., which] if isinstance(value, Tensor) and value.shape[-1:] == (length,) else value
        for name, value in inputs.items()
    }


def _masks(inputs: dict[str, Any]) -> dict[str, Any]:
    """The masks, which have the columns of what was read before as well."""
    return {name: value for name, value in inputs.items() if name.endswith("attention_mask")}
