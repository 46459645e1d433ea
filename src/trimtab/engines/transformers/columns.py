"""The KV cache for continuous batching: preallocated buffers, in which a decode step writes one column.

In models with a recurrent state (Mamba, Gated DeltaNet), in addition to keys and values or in some of the layers, a
row's state joins and leaves with it. A state has no columns.

All rows end in the same column, the newest, and are padded on the left. A row that joins is written so that it ends in
that column; when a row leaves, the last one moves to its place; the other rows don't move. Layers with a sliding window
keep all columns, since the model's masks apply the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.compat import DynamicCache, DynamicLayer
from trimtab.errors import TrimtabError

MIN_SPARE_COLUMNS = 128
"""The minimum number of columns that are allocated ahead; longer rows get half their length."""

RowCopier = Callable[[Tensor], Any]
"""Makes an independent cache of the given rows `[rows]` of a batch; rows may be repeated."""


class BatchCache(DynamicCache):
    """The keys and values `[rows, heads, columns, size]` of each layer, as views of larger buffers.

    `lengths[r]` is the number of tokens in row r. Pads are set to zero: a buffer may hold a NaN from an earlier row,
    and an attention weight of zero wouldn't hide that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.stop: int = 0  # the column after the newest
        self._capacity = (0, 0)  # rows, columns
        self._buffers: list[Any] = []  # the same as `layers`, with a looser type

    @property
    def start(self) -> int:
        """The first column of the longest row."""
        return self.stop - max(self.lengths, default=0)

    @property
    def width(self) -> int:
        """The number of columns in the batch, including pads."""
        return self.stop - self.start

    def insert(self, source: DynamicCache, picks: Sequence[tuple[int, int]]) -> None:
        """Append rows of another cache, given as `(row, tokens)`; each row's tokens are its last `tokens` columns."""
        longest = max([*self.lengths, *(length for _, length in picks)])
        first = len(self.lengths)
        others: list[Any] = list(source.layers)
        if not self._buffers:
            self._buffers = [_layer_like(source_layer, self) for source_layer in others]
            self.layers = list(self._buffers)
        self._allocate(first + len(picks), longest, 1)
        for own_layer, theirs in zip(self._buffers, others, strict=True):
            if own_layer.state is not None:
                own_layer.state.append_rows(theirs, [place for place, _ in picks])
            if getattr(theirs, "keys", None) is None:  # the layer uses another layer's keys, or has only a state
                continue
            if own_layer.keys is None:
                own_layer.allocate(theirs.keys, theirs.values, *self._capacity)
            for row, (place, length) in enumerate(picks, first):
                for buffer, incoming in ((own_layer.keys, theirs.keys), (own_layer.values, theirs.values)):
                    assert buffer is not None
                    buffer[row, :, : self.stop - length] = 0
                    buffer[row, :, self.stop - length : self.stop] = incoming[place, :, incoming.shape[2] - length :]
        self.lengths += [length for _, length in picks]

    def remove(self, row: int) -> None:
        last = len(self.lengths) - 1
        for layer in self._buffers:
            if layer.state is not None:
                layer.state.drop(row)
        if row != last:
            for layer in self._buffers:
                for buffer in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                    if buffer is not None:
                        buffer[row, :, : self.stop] = buffer[last, :, : self.stop]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:  # an empty batch frees its memory
            self.layers, self._buffers, self.stop, self._capacity = [], [], 0, (0, 0)

    def reserve(self, columns: int = 1) -> None:
        """Make room for the columns that the next pass writes."""
        self._allocate(len(self.lengths), max(self.lengths), columns)

    @property
    def model_cache(self) -> Any:
        """The cache that is passed to the model."""
        return self

    def advance(self, written: int = 1) -> None:
        """Add one token to every row, after a pass that wrote `written` columns.

        Raises:
            TrimtabError: Some layer didn't receive its keys and values.
        """
        written_columns = {layer.written for layer in self._buffers if getattr(layer, "keys", None) is not None}
        if written_columns - {self.stop + written}:
            raise TrimtabError(
                f"the cache of the batch holds {min(written_columns) - self.start} tokens, but {self.width + 1} have"
                " been read: the model didn't update the cache it was given, or a forward pass was skipped"
            )
        self.stop += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _allocate(self, rows: int, longest: int, ahead: int) -> None:
        """Make sure that the buffers fit `rows` rows of up to `longest` tokens, and `ahead` further columns."""
        have_rows, have_columns = self._capacity
        if rows <= have_rows and longest <= self.stop and self.stop + ahead <= have_columns:
            return
        rows = have_rows if rows <= have_rows else max(rows, min(2 * have_rows, have_rows + 16))
        columns = longest + max(MIN_SPARE_COLUMNS, longest // 2)
        count, kept = len(self.lengths), self.width
        for layer in self._buffers:
            if getattr(layer, "keys", None) is not None and layer.values is not None:
                old = (layer.keys[:count, :, self.start : self.stop], layer.values[:count, :, self.start : self.stop])
                layer.allocate(*old, rows, columns)
                layer.keys[:count, :, longest - kept : longest] = old[0]
                layer.values[:count, :, longest - kept : longest] = old[1]
        self.stop = longest
        self._capacity = (rows, columns)

    def row_copier(self) -> RowCopier:
        """Called before a pass. Returns a function that copies rows as they are now.

        It stays valid after the pass, until rows join or leave.
        """
        start, stop, mine = self.start, self.stop, list(self._buffers)
        rows = range(len(self.lengths))
        states = [None if layer.state is None else _copy_of(layer, rows) for layer in mine]

        def copies(picked: Tensor) -> DynamicCache:
            cache = DynamicCache()
            cache.layers = [
                _copy(layer, state, picked, slice(start, stop)) for layer, state in zip(mine, states, strict=True)
            ]
            return cache

        return copies

    # ---- transformers' cache interface -------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width + query_length, 0


class _Layer(DynamicLayer):
    """One layer's buffers. The batch occupies the same rows and columns in all layers."""

    state: _State | None = None
    written = 0  # the column after the last one written
    kind: Any = DynamicLayer  # the class of copies

    def __init__(self, batch: BatchCache) -> None:
        super().__init__()
        self.batch = batch

    def allocate(self, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        """Allocate buffers of zeros with the heads, sizes, dtype and device of these keys and values."""
        self.keys = keys.new_zeros(rows, keys.shape[1], columns, keys.shape[3])
        self.values = values.new_zeros(rows, values.shape[1], columns, values.shape[3])
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        rows, start, stop = len(self.batch.lengths), self.batch.start, self.batch.stop
        after = stop + key_states.shape[2]
        self.keys[:rows, :, stop:after] = key_states
        self.values[:rows, :, stop:after] = value_states
        self.written = after
        return self.keys[:rows, :, start:after], self.values[:rows, :, start:after]

    def window(self) -> tuple[Tensor | None, Tensor | None]:
        """The keys and values of the batch's rows, as attention sees them."""
        if self.keys is None or self.values is None:
            return None, None
        rows, columns = len(self.batch.lengths), slice(self.batch.start, self.batch.stop)
        return self.keys[:rows, :, columns], self.values[:rows, :, columns]

    def get_seq_length(self) -> int:
        return self.batch.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.batch.width + query_length, 0


class _State:
    """The recurrent states of a layer's rows, held in `kept`, a state layer of transformers' cache.

    The states have exactly as many rows as the batch.
    """

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def append_rows(self, source_layer: Any, places: Sequence[int]) -> None:
        """Append rows of another layer's states."""
        for name in compat.STATES:
            mine = getattr(self.kept, name)
            for number, state in getattr(source_layer, name).items():
                if state is None:
                    continue
                rows = state[list(places)]
                mine[number] = rows if mine.get(number) is None else torch.cat([mine[number], rows])
        for name in compat.STATE_FLAGS:
            getattr(self.kept, name).update(getattr(source_layer, name))
        self.kept.device, self.kept.dtype = source_layer.device, source_layer.dtype

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        for name in compat.STATES:
            states = getattr(self.kept, name)
            for number, state in states.items():
                if state is not None:
                    state[row] = state[-1].clone()
                    states[number] = state[:-1]


def _layer_like(source_layer: Any, batch: BatchCache) -> Any:
    """A layer for the batch that holds the same things as a layer of another cache."""
    if not compat.keeps_state(source_layer):
        mine = _Layer(batch)
        mine.kind = type(source_layer)
        return mine
    kind: Any = (
        type("_StateLayer", (_Layer, compat.STATE_LAYER), {}) if hasattr(source_layer, "keys") else compat.STATE_LAYER
    )
    layer = kind.__new__(kind)
    compat.STATE_LAYER.__init__(layer, number_of_states=source_layer.number_of_states)
    if hasattr(source_layer, "keys"):
        _Layer.__init__(layer, batch)
    layer.state = _State(layer)
    return layer


def _copy_of(layer: Any, rows: Sequence[int]) -> Any:
    """An independent layer with the recurrent states of these rows."""
    kind = compat.KEYS_AND_STATE if hasattr(layer, "keys") else compat.STATE_LAYER
    copy = kind(layer.number_of_states)
    _State(copy).append_rows(layer, rows)
    return copy


def _copy(layer: Any, state: Any, picked: Tensor, columns: slice) -> Any:
    """An independent layer with these rows and columns; `state` holds the batch's recurrent states, if any."""
    copy = layer.kind() if state is None else _copy_of(state, picked.tolist())
    if getattr(layer, "keys", None) is not None:
        rows = picked.to(layer.keys.device)
        copy.keys, copy.values = layer.keys[rows, :, columns], layer.values[rows, :, columns]
        copy.dtype, copy.device, copy.is_initialized = copy.keys.dtype, copy.keys.device, True
    return copy


class SingleRowCache:
    """The cache of a batch that is limited to one row: the model's own cache, of any type."""

    def __init__(self) -> None:
        self.model_cache: Any = None
        self.lengths: list[int] = []

    @property
    def width(self) -> int:
        """The number of tokens in the row."""
        return sum(self.lengths)

    def insert(self, source: Any, picks: Sequence[tuple[int, int]]) -> None:
        """Use this cache, which holds one row."""
        ((_, length),) = picks
        self.model_cache, self.lengths = source, [length]

    def remove(self, row: int) -> None:
        self.model_cache, self.lengths = None, []

    def reserve(self) -> None:
        """Does nothing: the cache grows by itself."""

    def advance(self) -> None:
        """Add one token, after a pass. Raises `TrimtabError` if the cache doesn't hold as many tokens as were read."""
        self.lengths = [length + 1 for length in self.lengths]
        cached_tokens = compat.past_length(self.model_cache)
        if cached_tokens is not None and cached_tokens != self.width:
            raise TrimtabError(f"the cache of the batch holds {cached_tokens} tokens, but {self.width} have been read")

    def row_copier(self) -> RowCopier:
        """Called before a pass. Returns a function that copies the row as it is now."""
        aside = compat.snapshot_cache(self.model_cache)
        return lambda picked: compat.fork(aside, picked)
