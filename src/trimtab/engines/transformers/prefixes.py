"""Prefix caching across requests: keys and values of decoded texts are kept, for the next turn of a conversation.

A cached text is identified by its tokens and by the edits that acted on each of them: operation, site and strength.
Another request reuses the longest prefix with the same tokens and the same edits, so its result doesn't depend on the
cache. A turn that was steered over a clean cache, or at none of its tokens, can be reused under any steering. Recurrent
states aren't cached, as they can't be cropped to an earlier token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from trimtab.engines.folding import active_ranges
from trimtab.engines.meanings import NOTHING
from trimtab.engines.resolve import active_edits, depends_on_prompt, gate_readings
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.batch_row import BatchRow, GenerationRequest, GenerationResponse
from trimtab.engines.transformers.chunked_prefill import ChunkedPrefill
from trimtab.engines.transformers.clean import CleanBatch, _CleanPrefill, uses_clean_cache
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.scores import is_score_edit
from trimtab.errors import TrimtabError
from trimtab.steering import Edit
from trimtab.steering.conditional import with_conditional_operation

LEAST = 16
"""The minimum number of tokens to reuse: fewer are computed as quickly."""

EditSpans = tuple[tuple[int, int | None, tuple[Any, ...]], ...]
"""`(start, stop, edits)` spans of a text in which edits act; a `stop` of `None` is the end of the text."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text's keys and values, and the edits that acted on it.

    `layers` has the keys and values `[1, heads, tokens, size]` of each layer; `None` for a layer that caches none.
    """

    scope: str
    ids: tuple[int, ...]
    edit_spans: EditSpans
    layers: tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass
class RequestPrefixCache:
    """The cached texts, with at most `tokens` tokens together; the least recently used are dropped first.

    A text can be reused in its own `scope` only. With `shared`, its unsteered part can be reused in all scopes.
    """

    tokens: int
    shared: bool = False
    cached_tokens: int = field(default=0, init=False)
    _kept: OrderedDict[int, Prefix] = field(default_factory=OrderedDict, init=False)
    _numbers: Any = field(default_factory=count, init=False)

    def find(self, scope: str, ids: Sequence[int], acts: EditSpans) -> tuple[Prefix, int] | None:
        """The cached text that shares the longest reusable prefix with `ids`, and the prefix's number of tokens.

        The last token of `ids` is never reused, as its logits are needed.
        """
        best: tuple[int, int] | None = None
        whole = tuple(ids)[:-1]
        for number, kept in self._kept.items():
            length = _agreeing_length(kept.edit_spans, acts, _common_length(kept.ids, whole))
            if kept.scope != scope:
                length = _unsteered_length(kept.edit_spans, length) if self.shared else 0
            if length >= LEAST and (best is None or length > best[1]):
                best = number, length
        if best is None:
            return None
        self._kept.move_to_end(best[0])
        return self._kept[best[0]], best[1]

    def add(self, prefix: Prefix) -> None:
        """Add a text. Cached texts that are prefixes of it, under the same edits, are dropped."""
        size = len(prefix.ids)
        if not LEAST <= size <= self.tokens:
            return
        for number, kept in list(self._kept.items()):
            if kept.scope != prefix.scope:
                continue
            shorter = min(len(kept.ids), size)
            if (
                _common_length(kept.ids, prefix.ids) < shorter
                or _agreeing_length(kept.edit_spans, prefix.edit_spans, shorter) < shorter
            ):
                continue
            if len(kept.ids) >= size:  # it is cached already
                self._kept.move_to_end(number)
                return
            self._drop(number)
        while self.cached_tokens + size > self.tokens:
            self._drop(next(iter(self._kept)))
        self._kept[next(self._numbers)] = prefix
        self.cached_tokens += size

    def clear(self) -> None:
        self._kept.clear()
        self.cached_tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    def _drop(self, number: int) -> None:
        self.cached_tokens -= len(self._kept.pop(number).ids)


class PrefixBatch(CleanBatch):
    """A batch with prefix caching: it caches its rows' keys and values when they end, and reuses them for new rows.

    Args:
        model: As for `GenerationBatch`.
        tokenizer: As for `GenerationBatch`.
        layout: As for `GenerationBatch`.
        prefixes: The cache; `None` disables it. It is also disabled for models with recurrent states.
        options: As for `GenerationBatch`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layout: Layout, *, prefixes: RequestPrefixCache | None = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, layout, **options)
        self.prefixes: RequestPrefixCache | None = (
            prefixes if prefixes is not None and compat.keeps_plain_cache(layout.decoder) else None
        )
        if self.prefixes is not None:
            self.on_end = self._twins.on_end = self._cache_row

    def clear(self) -> list[int]:
        if self.prefixes is not None:
            self.prefixes.clear()
        return super().clear()

    def _prefill_rows(self, rows: list[BatchRow]) -> list[GenerationResponse]:
        if self.prefixes is None:
            return super()._prefill_rows(rows)
        responses: list[GenerationResponse] = []
        others = []
        for alike in _by_text(rows):
            request = alike[0].request
            match = self._match(request)
            if match is None:
                others += alike
                continue
            self._watch.set_monitors(row.request.monitors for row in alike)
            try:
                prefill = self._resume_prefill(request, *match)
                prefill.watch = self._watch
                logits = prefill.advance()
                assert logits is not None  # prompts that are read here fit one chunk
                responses += self._add_chunked_rows(alike, prefill, logits)
            except (TrimtabError, RuntimeError) as error:
                responses += [GenerationResponse(row.key, error=error) for row in alike]
        return responses + super()._prefill_rows(others)

    def _prefill(self, request: GenerationRequest) -> ChunkedPrefill:
        match = self._match(request)
        return super()._prefill(request) if match is None else self._resume_prefill(request, *match)

    def _add_chunked_rows(
        self, rows: list[BatchRow], prefill: ChunkedPrefill, logits: Tensor
    ) -> list[GenerationResponse]:
        for row in rows:
            row.cached = prefill.reused_tokens
        return super()._add_chunked_rows(rows, prefill, logits)

    def _match(self, request: GenerationRequest) -> tuple[Prefix, int] | None:
        """The cached text that this request can reuse, and how many tokens of it; `None` if there is none.

        Requests whose gates or operations depend on the prompt need activations of the whole prompt, and reuse nothing.
        """
        scope, prefixes = request.scope, self.prefixes
        if prefixes is None or scope is None or request.rejection is not None or gate_readings(request.steering):
            return None
        if request.images is not None:  # the token ids don't identify the images
            return None
        edits = active_edits(request.steering)
        if any(depends_on_prompt(edit) or is_score_edit(edit) for edit in edits):
            return None
        length = len(request.ids)
        clean = uses_clean_cache(request)
        return prefixes.find(
            scope, request.ids, () if clean else _edit_spans(tuple(map(with_conditional_operation, edits)), length)
        )

    def _resume_prefill(self, request: GenerationRequest, prefix: Prefix, length: int) -> ChunkedPrefill:
        prefill = _CleanPrefill(self, request) if uses_clean_cache(request) else super()._prefill(request)
        cache = compat.whole_cache(self.model.config)
        for number, layer in enumerate(prefix.layers):
            if layer is not None:
                cache.update(layer[0][:, :, :length], layer[1][:, :, :length], number)
        prefill.reuse_cache(cache, length)
        return prefill

    def _cache_row(self, batch: GenerationBatch, place: int) -> None:
        """Cache the keys and values of a row that has ended."""
        row, cache = batch._rows[place], batch._cache
        if self.prefixes is None or row.request.scope is None or any(map(is_score_edit, row.edits)):
            return
        if row.request.images is not None:
            return
        length = cache.lengths[place]
        if not LEAST <= length <= self.prefixes.tokens:
            return
        acted: EditSpans = ()
        if batch is not self._twins:
            segments = batch._session.rows[place].segments
            acted = tuple((start, stop, _effect_key(edits)) for start, stop, edits, _ in segments)
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


def _edit_spans(edits: tuple[Edit, ...], prompt_length: int) -> EditSpans:
    """The edits by span in a prompt of this length, without positions by meaning."""
    spans = active_ranges(edits, prompt_length, NOTHING)
    return tuple((a, b, _effect_key([edit for edit in edits if edit.positions in rules])) for a, b, rules in spans)


def _effect_key(edits: Sequence[Edit]) -> tuple[Any, ...]:
    """What identifies the effect of these edits on a token, in order. Gates are left out, as they are decided."""
    return tuple((edit.site, edit.operation, edit.strength) for edit in edits)


def _common_length(ids: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The length of the common prefix."""
    low, high = 0, min(len(ids), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _agreeing_length(acts: EditSpans, other: EditSpans, length: int) -> int:
    """The length of the prefix, at most `length`, on which the same edits act in both."""
    marks = {0} | {mark for part in (*acts, *other) for mark in part[:2] if mark is not None and mark < length}
    return next((mark for mark in sorted(marks) if _at(acts, mark) != _at(other, mark)), length)


def _at(acted: EditSpans, position: int) -> tuple[Any, ...]:
    return next((w for start, stop, w in acted if start <= position and (stop is None or position < stop)), ())


def _unsteered_length(acted: EditSpans, length: int) -> int:
    """The length of the unsteered prefix, at most `length`."""
    return _agreeing_length(acted, (), length)
