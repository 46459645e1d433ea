"""Keys and values of texts that were decoded, kept for those that go on from them: the next turn of a conversation.

What is kept of a text is known by its tokens and by what acted on each of them: which operation, where, how strong.
Another request reuses it as far as its tokens are the same and the same would act on them, and not a token further;
so what it gets is what it would get without. A turn that was steered over a clean cache, or at none of its tokens, is
worth the same to everybody. Recurrent states aren't kept: they can't be taken back to a token before their last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from trimtab.engines.folding import sweep
from trimtab.engines.meanings import NOTHING
from trimtab.engines.resolve import acting, waits_for_prompt, wanted
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.batch_row import BatchRow, GenerationRequest, GenerationResponse
from trimtab.engines.transformers.chunked_prefill import ChunkedPrefill
from trimtab.engines.transformers.clean import CleanBatch, _CleanPrefill, steers_clean
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.scores import is_score_edit
from trimtab.errors import TrimtabError
from trimtab.steering import Edit
from trimtab.steering.conditional import conditional

LEAST = 16
"""Tokens that are worth taking over: fewer are read as quickly."""

Acted = tuple[tuple[int, int | None, tuple[Any, ...]], ...]
"""From which position to which (`None`: to the end) what acts; nothing elsewhere."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text's keys and values, `[1, heads, tokens, size]` a layer (`None`: it keeps none), and what acted on them."""

    scope: str
    ids: tuple[int, ...]
    acted: Acted
    layers: tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass
class Prefixes:
    """What is kept, at most `tokens` of it; what was used least lately goes first.

    A text is kept for its own `scope`. `shared`: as far as nothing acted on it, it is everybody's.
    """

    tokens: int
    shared: bool = False
    held: int = field(default=0, init=False)
    _kept: OrderedDict[int, Prefix] = field(default_factory=OrderedDict, init=False)
    _numbers: Any = field(default_factory=count, init=False)

    def find(self, scope: str, ids: Sequence[int], acts: Acted) -> tuple[Prefix, int] | None:
        """The text with which most tokens of another can be taken over, and how many; its last one never is."""
        best: tuple[int, int] | None = None
        whole = tuple(ids)[:-1]
        for number, kept in self._kept.items():
            length = _agreeing(kept.acted, acts, _common(kept.ids, whole))
            if kept.scope != scope:
                length = _untouched(kept.acted, length) if self.shared else 0
            if length >= LEAST and (best is None or length > best[1]):
                best = number, length
        if best is None:
            return None
        self._kept.move_to_end(best[0])
        return self._kept[best[0]], best[1]

    def add(self, prefix: Prefix) -> None:
        """Keep one more; those that it goes on from, under the same, aren't needed beside it."""
        size = len(prefix.ids)
        if not LEAST <= size <= self.tokens:
            return
        for number, kept in list(self._kept.items()):
            if kept.scope != prefix.scope:
                continue
            shorter = min(len(kept.ids), size)
            if _common(kept.ids, prefix.ids) < shorter or _agreeing(kept.acted, prefix.acted, shorter) < shorter:
                continue
            if len(kept.ids) >= size:  # it is there already
                self._kept.move_to_end(number)
                return
            self._drop(number)
        while self.held + size > self.tokens:
            self._drop(next(iter(self._kept)))
        self._kept[next(self._numbers)] = prefix
        self.held += size

    def clear(self) -> None:
        self._kept.clear()
        self.held = 0

    def __len__(self) -> int:
        return len(self._kept)

    def _drop(self, number: int) -> None:
        self.held -= len(self._kept.pop(number).ids)


class PrefixBatch(CleanBatch):
    """A batch that keeps what its rows have read when they end, and lets others go on from there.

    Args:
        model: The model, `tokenizer`, `layout` and `options` as `GenerationBatch` has them.
        tokenizer: See there.
        layout: See there.
        prefixes: Where it is kept; `None` keeps nothing, and so does a model that keeps recurrent states.
        options: See there.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layout: Layout, *, prefixes: Prefixes | None = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, layout, **options)
        self.prefixes: Prefixes | None = (
            prefixes if prefixes is not None and compat.keeps_plain_cache(layout.decoder) else None
        )
        if self.prefixes is not None:
            self.on_end = self._twins.on_end = self._keep

    def clear(self) -> list[int]:
        if self.prefixes is not None:
            self.prefixes.clear()
        return super().clear()

    def _read_in(self, rows: list[BatchRow]) -> list[GenerationResponse]:
        if self.prefixes is None:
            return super()._read_in(rows)
        responses: list[GenerationResponse] = []
        others = []
        for alike in _by_text(rows):
            request = alike[0].request
            match = self._match(request)
            if match is None:
                others += alike
                continue
            self._watch.of(row.request.monitors for row in alike)
            try:
                prefill = self._going_on(request, *match)
                prefill.watch = self._watch
                logits = prefill.advance()
                assert logits is not None  # a prompt that is admitted is no longer than a chunk
                responses += self._seat_read(alike, prefill, logits)
            except (TrimtabError, RuntimeError) as error:
                responses += [GenerationResponse(row.key, error=error) for row in alike]
        return responses + super()._read_in(others)

    def _prefill(self, request: GenerationRequest) -> ChunkedPrefill:
        match = self._match(request)
        return super()._prefill(request) if match is None else self._going_on(request, *match)

    def _seat_read(self, rows: list[BatchRow], prefill: ChunkedPrefill, logits: Tensor) -> list[GenerationResponse]:
        for row in rows:
            row.cached = prefill.taken_over
        return super()._seat_read(rows, prefill, logits)

    def _match(self, request: GenerationRequest) -> tuple[Prefix, int] | None:
        """What this request can go on from. Where its whole prompt has to be read, to decide something: nothing."""
        scope, prefixes = request.scope, self.prefixes
        if prefixes is None or scope is None or request.rejection is not None or wanted(request.steering):
            return None
        if request.images is not None:  # its tokens don't say which
            return None
        edits = acting(request.steering)
        if any(waits_for_prompt(edit) or is_score_edit(edit) for edit in edits):
            return None
        length = len(request.ids)
        clean = steers_clean(request)
        return prefixes.find(scope, request.ids, () if clean else _acted(tuple(map(conditional, edits)), length))

    def _going_on(self, request: GenerationRequest, prefix: Prefix, length: int) -> ChunkedPrefill:
        prefill = _CleanPrefill(self, request) if steers_clean(request) else super()._prefill(request)
        cache = compat.whole_cache(self.model.config)
        for number, layer in enumerate(prefix.layers):
            if layer is not None:
                cache.update(layer[0][:, :, :length], layer[1][:, :, :length], number)
        prefill.take_over(cache, length)
        return prefill

    def _keep(self, batch: GenerationBatch, place: int) -> None:
        """A row has ended: keep what it has read."""
        row, cache = batch._rows[place], batch._cache
        if self.prefixes is None or row.request.scope is None or any(map(is_score_edit, row.edits)):
            return
        if row.request.images is not None:
            return
        length = cache.lengths[place]
        if not LEAST <= length <= self.prefixes.tokens:
            return
        acted: Acted = ()
        if batch is not self._twins:
            segments = batch._session.rows[place].segments
            acted = tuple((start, stop, _what(edits)) for start, stop, edits, _ in segments)
        here = slice(place, place + 1), slice(None), slice(cache.stop - length, cache.stop)
        layers = tuple(
            None if getattr(layer, "keys", None) is None else (layer.keys[here].clone(), layer.values[here].clone())
            for layer in cache._buffers
        )
        ids = (*row.request.ids, *row.tokens)[:length]
        self.prefixes.add(Prefix(row.request.scope, ids, acted, layers))


def _by_text(rows: Sequence[BatchRow]) -> list[list[BatchRow]]:
    groups: dict[Any, list[BatchRow]] = {}
    for row in rows:
        request = row.request
        groups.setdefault((request.prefill, request.images, request.clean_cache, request.scope), []).append(row)
    return list(groups.values())


def _acted(edits: tuple[Edit, ...], prompt_length: int) -> Acted:
    """What acts where in a prompt of so many tokens, of which none has a meaning."""
    spans = sweep(edits, prompt_length, NOTHING)
    return tuple((a, b, _what([edit for edit in edits if edit.positions in rules])) for a, b, rules in spans)


def _what(edits: Sequence[Edit]) -> tuple[Any, ...]:
    """What edits do to a token at which they act, in order; gates that the prompt has decided say nothing any more."""
    return tuple((edit.site, edit.operation, edit.strength) for edit in edits)


def _common(ids: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(ids), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _agreeing(acts: Acted, other: Acted, length: int) -> int:
    """Up to which of so many tokens the same acted in both."""
    marks = {0} | {mark for part in (*acts, *other) for mark in part[:2] if mark is not None and mark < length}
    return next((mark for mark in sorted(marks) if _at(acts, mark) != _at(other, mark)), length)


def _at(acted: Acted, position: int) -> tuple[Any, ...]:
    return next((w for start, stop, w in acted if start <= position and (stop is None or position < stop)), ())


def _untouched(acted: Acted, length: int) -> int:
    """Up to which of so many tokens nothing acted."""
    return _agreeing(acted, (), length)
