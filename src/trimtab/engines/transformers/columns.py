"""The cache of a batch that rows join and leave: buffers with room, in which a step writes one column.

Where a model keeps a recurrent state (Mamba, Gated DeltaNet), beside keys and values or in some of its layers, a row's
state joins and leaves with it; it has no columns.

Every row ends in the same column, the newest; it begins wherever it begins, and the columns before are its pads. So
a row that joins is written to the left of the batch's end, a row that leaves gives its place to the last one, and
neither moves the others. Windows are kept whole: the model's masks see to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.compat import DynamicCache, DynamicLayer
from trimtab.errors import TrimtabError

ROOM = 128
"""Columns that are allocated ahead, at least; beyond it, half as many as there are."""

Copies = Callable[[Tensor], Any]
"""What makes a cache of its own with these rows `[rows]` of a batch, which may come several times."""


class Columns(DynamicCache):
    """Keys and values `[rows, heads, columns, size]` of each layer, seen through a window on its buffers.

    `lengths[r]` counts row r's tokens. Pads are zeros: what a row before left in a buffer may be no number at all, and
    a weight of zero doesn't hide that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.stop: int = 0  # the column after the newest
        self._capacity = (0, 0)  # rows, columns
        self._buffers: list[Any] = []  # the same as `layers`, of which others know less

    @property
    def start(self) -> int:
        """The first column that any row has."""
        return self.stop - max(self.lengths, default=0)

    @property
    def width(self) -> int:
        """How many columns the batch has, pads included."""
        return self.stop - self.start

    def insert(self, source: DynamicCache, picks: Sequence[tuple[int, int]]) -> None:
        """Take in rows `(row, tokens)` of another cache, whose last `tokens` columns are theirs; they come last."""
        longest = max([*self.lengths, *(length for _, length in picks)])
        first = len(self.lengths)
        others: list[Any] = list(source.layers)
        if not self._buffers:
            self._buffers = [_layer_like(theirs, self) for theirs in others]
            self.layers = list(self._buffers)
        self._allocate(first + len(picks), longest, 1)
        for mine, theirs in zip(self._buffers, others, strict=True):
            if mine.state is not None:
                mine.state.adopt(theirs, [place for place, _ in picks])
            if getattr(theirs, "keys", None) is None:  # another's keys are attended to, or a state alone is kept
                continue
            if mine.keys is None:
                mine.allocate(theirs.keys, theirs.values, *self._capacity)
            for row, (place, length) in enumerate(picks, first):
                for buffer, incoming in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
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
        if not self.lengths:  # an idle batch holds no memory
            self.layers, self._buffers, self.stop, self._capacity = [], [], 0, (0, 0)

    def make_room(self, columns: int = 1) -> None:
        """See to it that the next pass finds so many columns to write to."""
        self._allocate(len(self.lengths), max(self.lengths), columns)

    @property
    def model_cache(self) -> Any:
        """What a pass of the model is given."""
        return self

    def advance(self, written: int = 1) -> None:
        """The pass is done, in which so many columns were written, and every row has one token more.

        Raises:
            TrimtabError: Some layer's keys and values didn't come.
        """
        held = {layer.written for layer in self._buffers if getattr(layer, "keys", None) is not None}
        if held - {self.stop + written}:
            raise TrimtabError(
                f"the cache of the batch holds {min(held) - self.start} tokens where {self.width + 1} have been read:"
                " the model didn't put them into the cache that it was given, or a pass was missed"
            )
        self.stop += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _allocate(self, rows: int, longest: int, ahead: int) -> None:
        """Buffers for so many rows, whose longest has so many tokens, and for `ahead` columns to come."""
        have_rows, have_columns = self._capacity
        if rows <= have_rows and longest <= self.stop and self.stop + ahead <= have_columns:
            return
        rows = have_rows if rows <= have_rows else max(rows, min(2 * have_rows, have_rows + 16))
        columns = longest + max(ROOM, longest // 2)
        count, kept = len(self.lengths), self.width
        for layer in self._buffers:
            if getattr(layer, "keys", None) is not None and layer.values is not None:
                old = (layer.keys[:count, :, self.start : self.stop], layer.values[:count, :, self.start : self.stop])
                layer.allocate(*old, rows, columns)
                layer.keys[:count, :, longest - kept : longest] = old[0]
                layer.values[:count, :, longest - kept : longest] = old[1]
        self.stop = longest
        self._capacity = (rows, columns)

    def put_aside(self) -> Copies:
        """Before a pass: what makes copies of rows as they are now, also after it, until rows come or go."""
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

    # ---- what transformers asks --------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width + query_length, 0


class _Layer(DynamicLayer):
    """One layer's buffers; where the batch stands in them is the same for all layers."""

    state: _State | None = None
    written = 0  # the column after the last that was written
    kind: Any = DynamicLayer  # what a copy is

    def __init__(self, batch: Columns) -> None:
        super().__init__()
        self.batch = batch

    def allocate(self, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        """Buffers of zeros, of the kind of these keys and values."""
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
    """The recurrent states of a layer's rows: what a layer of transformers' cache that holds such states does of them.

    `kept` is such a layer; its states have just as many rows as the batch.
    """

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def adopt(self, theirs: Any, places: Sequence[int]) -> None:
        """Take in these rows of another layer's states; they come last."""
        for name in compat.STATES:
            mine = getattr(self.kept, name)
            for number, state in getattr(theirs, name).items():
                if state is None:
                    continue
                rows = state[list(places)]
                mine[number] = rows if mine.get(number) is None else torch.cat([mine[number], rows])
        for name in compat.STATE_FLAGS:
            getattr(self.kept, name).update(getattr(theirs, name))
        self.kept.device, self.kept.dtype = theirs.device, theirs.dtype

    def drop(self, row: int) -> None:
        """A row leaves; the last one takes its place."""
        for name in compat.STATES:
            states = getattr(self.kept, name)
            for number, state in states.items():
                if state is not None:
                    state[row] = state[-1].clone()
                    states[number] = state[:-1]


def _layer_like(theirs: Any, batch: Columns) -> Any:
    """A layer of the batch that keeps what this one of another cache does."""
    if not compat.keeps_state(theirs):
        mine = _Layer(batch)
        mine.kind = type(theirs)
        return mine
    kind: Any = type("_StateLayer", (_Layer, compat.STATE_LAYER), {}) if hasattr(theirs, "keys") else compat.STATE_LAYER
    layer = kind.__new__(kind)
    compat.STATE_LAYER.__init__(layer, number_of_states=theirs.number_of_states)
    if hasattr(theirs, "keys"):
        _Layer.__init__(layer, batch)
    layer.state = _State(layer)
    return layer


def _copy_of(layer: Any, rows: Sequence[int]) -> Any:
    """A layer of its own with the recurrent states of these rows."""
    kind = compat.KEYS_AND_STATE if hasattr(layer, "keys") else compat.STATE_LAYER
    copy = kind(layer.number_of_states)
    _State(copy).adopt(layer, rows)
    return copy


def _copy(layer: Any, state: Any, picked: Tensor, columns: slice) -> Any:
    """A layer of its own with these rows and columns; `state` holds their recurrent states, if any are kept."""
    copy = layer.kind() if state is None else _copy_of(state, picked.tolist())
    if getattr(layer, "keys", None) is not None:
        rows = picked.to(layer.keys.device)
        copy.keys, copy.values = layer.keys[rows, :, columns], layer.values[rows, :, columns]
        copy.dtype, copy.device, copy.is_initialized = copy.keys.dtype, copy.keys.device, True
    return copy


class Alone:
    """The cache of a batch of one row that nothing joins: the model's own, of whatever kind."""

    def __init__(self) -> None:
        self.model_cache: Any = None
        self.lengths: list[int] = []

    @property
    def width(self) -> int:
        """How many tokens the row has."""
        return sum(self.lengths)

    def insert(self, source: Any, picks: Sequence[tuple[int, int]]) -> None:
        """Go on with this cache, which holds one row."""
        ((_, length),) = picks
        self.model_cache, self.lengths = source, [length]

    def remove(self, row: int) -> None:
        self.model_cache, self.lengths = None, []

    def make_room(self) -> None:
        """It grows by itself."""

    def advance(self) -> None:
        """The pass is done. Raises `TrimtabError` unless the cache holds what was read."""
        self.lengths = [length + 1 for length in self.lengths]
        held = compat.past_length(self.model_cache)
        if held is not None and held != self.width:
            raise TrimtabError(f"the cache of the batch holds {held} tokens where {self.width} have been read")

    def put_aside(self) -> Copies:
        """Before a pass: what makes copies of the row as it is now."""
        aside = compat.put_aside(self.model_cache)
        return lambda picked: compat.fork(aside, picked)
