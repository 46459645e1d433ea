"""Evaluate gates during the prefill that generation runs anyway, instead of in a separate pass over the prompts.

If all edits of a batch are at deeper layers than its gates read, the gates are evaluated during the pass: it runs
unsteered up to the deepest layer that they read, and steered from there on.

Otherwise it works if no edit acts before the last prompt token, as the prompt is unsteered up to that token anyway. The
pass runs unsteered and is recorded; then the gates are evaluated. Requests whose gates stay shut, or whose edits only
act on generated tokens, keep its result bit for bit. For the others the last token is computed again, steered, and
replaces the unsteered one: one additional column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.contract import TOKENS_PER_BATCH
from trimtab.engines.resolve import (
    TOKENS_TO_DECIDE,
    PositionsByRequest,
    active_edits,
    depends_on_prompt,
    gate_readings,
    positions_read,
    resolve,
)
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.read import can_share, check_read, recording
from trimtab.engines.transformers.scores import is_score_edit
from trimtab.engines.transformers.session import Session
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site, Steering

TOKEN_INPUTS = ("input_ids", "position_ids", "cache_position", "token_type_ids")
"""The inputs of a pass with one column per token, of which the last column is computed again."""
UNSUPPORTED_OPTIONS = (
    "cache_implementation",
    "cache_config",
    *compat.CACHE_NAMES,
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
)
"""Options of `generate` under which the first pass isn't over the whole prompt, or its cache can't be cropped."""


def decides_at_prefill(
    layout: Layout, steerings: Sequence[Steering | None], lengths: Sequence[int], options: Mapping[str, Any]
) -> bool:
    """Whether this batch has gates or prompt-dependent operations, and its prefill can decide them.

    `options` are the effective options of `generate`, including those of the model's generation configuration (see
    `UNSUPPORTED_OPTIONS`).
    """
    edits = [active_edits(steering) for steering in steerings]
    deciding = [
        bool(gate_readings(steering)) or any(map(depends_on_prompt, own))
        for steering, own in zip(steerings, edits, strict=True)
    ]
    if (
        not any(deciding)
        or options.get("use_cache") is False
        or any(options.get(name) is not None for name in UNSUPPORTED_OPTIONS)
    ):
        return False
    if any(is_score_edit(edit) for own in edits for edit in own) or not can_share(layout):
        return False
    if sum(n for steering, n in zip(steerings, lengths, strict=True) if gate_readings(steering)) > TOKENS_PER_BATCH:
        return False
    if _deepest_gate_layer(steerings) is not None:
        return True
    starts = [
        (start, length)
        for own, length in zip(edits, lengths, strict=True)
        for edit in own
        for start, _ in edit.positions.reach(length)
    ]
    waiting = sum(n for own, n in zip(edits, lengths, strict=True) if any(map(depends_on_prompt, own)))
    return _cache_can_be_cropped(layout) and all(start >= n - 1 for start, n in starts) and waiting <= TOKENS_TO_DECIDE


class Prefill:
    """A batch whose edits are decided during its prefill; `edits` and `names` are filled then.

    `names` is modified in place, so callers can hold a reference to it before the pass.
    """

    def __init__(
        self, model: Any, layout: Layout, steerings: Sequence[Steering | None], lengths: Sequence[int]
    ) -> None:
        self.model = model
        self.layout = layout
        self.steerings: list[Steering | None] = list(steerings)
        self.lengths: list[int] = list(lengths)
        self.edits: list[tuple[Edit, ...]] = [() for _ in lengths]
        self.names: list[tuple[str, ...]] = [() for _ in lengths]
        possible = [edit for steering in steerings for edit in active_edits(steering)]
        self.sites: list[Site] = sorted({edit.site for edit in possible})
        self._readings = [sorted(gate_readings(steering), key=str) for steering in steerings]
        self._depends_on_prompt = [any(map(depends_on_prompt, active_edits(steering))) for steering in steerings]
        gates = {reading.site for readings in self._readings for reading in readings}
        self._read: list[Site] = sorted(gates | {edit.site for edit in possible if depends_on_prompt(edit)})
        self._where = [self._tokens(i) for i in range(len(self.lengths))]
        self._deepest = _deepest_gate_layer(steerings)
        self._activations: Mapping[Site, Tensor] | None = None
        self._decided = False

    def decide(self, _requests: int, _first: Any) -> Sequence[tuple[Edit, ...]]:
        """The decided edits, as the session's `decide` function."""
        return self.edits

    @contextmanager
    def hooked(self, session: Session) -> Iterator[None]:
        """Within the context, the first pass of the whole model decides the edits; the session continues from it."""
        decoder = self.layout.decoder
        owner = get_ident()

        def before(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if self._activations is not None or get_ident() != owner:
                return
            places = self._token_selector(kwargs["input_ids"])
            self._activations = first.enter_context(recording(self.layout, self._read, places, to_the_end=True))
            session.pause(True)
            first.callback(session.pause, False)
            if self._deepest is not None:
                first.callback(decoder.register_forward_pre_hook(note, with_kwargs=True).remove)
                # after the recorder's own hook on this block
                first.callback(self.layout.blocks[self._deepest].register_forward_hook(decide_midway).remove)

        def note(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            call[:] = args, compat.without_cache(kwargs)  # the cache is empty now, but no longer in `on_the_way`

        def decide_midway(*_: Any) -> None:
            self._decide()
            session.pause(False)
            session.decoder_pre_hook(decoder, *call)

        def after(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._decided or get_ident() != owner:
                first.close()
                return
            first.close()
            if self._deepest is not None:
                raise TrimtabError(f"block {self._deepest} didn't run in prefill, so no gate was decided")
            self._decide()
            session.resume()
            repeat = kwargs["input_ids"].shape[0] // len(self.lengths)
            begun = [
                i * repeat + n for i in range(len(self.lengths)) if self._acts_on_last_token(i) for n in range(repeat)
            ]
            if begun:
                self._recompute_last_column(kwargs, output, begun)

        call: list[Any] = []
        with ExitStack() as stack, ExitStack() as first:
            stack.callback(self.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _tokens(self, request: int) -> list[int]:
        """The positions of the prompt whose activations are read, in order."""
        length = self.lengths[request]
        return (
            list(range(length)) if self._depends_on_prompt[request] else positions_read(self._readings[request], length)
        )

    def _token_selector(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that picks the read tokens from activations `[rows, columns, width]`.

        It returns `[tokens, width]`, ordered by request.
        """
        count, width = ids.shape
        repeat = count // len(self.lengths)
        rows = [i * repeat for i, tokens in enumerate(self._where) for _ in tokens]
        columns = [width - self.lengths[i] + p for i, tokens in enumerate(self._where) for p in tokens]
        at = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
        return lambda x: x[at[0].to(x.device), at[1].to(x.device)]

    def _decide(self) -> None:
        assert self._activations is not None
        check_read(self._read, self._activations)
        sizes = [len(tokens) for tokens in self._where]
        activations = {site: x.split(sizes) for site, x in self._activations.items()}

        def read(where: PositionsByRequest, sites: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
            row = {i: {p: at for at, p in enumerate(self._where[i])} for i in where}
            rows = {i: [row[i][p] for p in positions] for i, positions in where.items()}
            return {i: {site: activations[site][i][at] for site in sites} for i, at in rows.items()}

        resolved = resolve(self.steerings, self.lengths, read)
        self.names[:], self.edits[:] = resolved.names, resolved.edits
        self._activations, self._decided = {}, True

    def _acts_on_last_token(self, request: int) -> bool:
        """Whether an edit acts at the last prompt token. Edits of later tokens don't change the prefill."""
        last = self.lengths[request] - 1
        spans = [span for edit in self.edits[request] for span in edit.positions.resolve(last + 1, ())]
        return any(start <= last and (stop is None or last < stop) for start, stop in spans)

    def _recompute_last_column(self, kwargs: dict[str, Any], output: Any, rows: list[int]) -> None:
        """Compute the last column again, steered, and replace the cache entries and logits of these rows."""
        cache = compat.cache_of(kwargs, type(self.model).__name__)
        if not compat.grows_plainly(cache):
            raise UnsupportedError(f"a gate can't be decided with a {type(cache).__name__}; use the default cache")
        ends = [(layer.keys[..., -1:, :], layer.values[..., -1:, :]) for layer in cache.layers if layer.is_initialized]
        layers = [layer for layer in cache.layers if layer.is_initialized]
        for layer in layers:
            layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
        cut = {
            name: value[..., -1:]
            for name, value in kwargs.items()
            if name in TOKEN_INPUTS and isinstance(value, Tensor)
        }
        steered = self.model(**{**kwargs, **cut})
        again = torch.zeros(len(output.logits), dtype=torch.bool)
        again[rows] = True
        for layer, (keys, values) in zip(layers, ends, strict=True):
            kept = ~again.to(keys.device)
            layer.keys[kept, :, -1:] = keys[kept]
            layer.values[kept, :, -1:] = values[kept]
        at = again.to(output.logits.device)
        output.logits[at, -1] = steered.logits[at, -1]


def _deepest_gate_layer(steerings: Sequence[Steering | None]) -> int | None:
    """The deepest layer that gates read, if all edits are at deeper layers and none waits for the prompt."""
    edits = [edit for steering in steerings for edit in active_edits(steering)]
    read = max((reading.site.layer for steering in steerings for reading in gate_readings(steering)), default=None)
    if read is None or any(map(depends_on_prompt, edits)) or min(edit.site.layer for edit in edits) <= read:
        return None
    return read


def _cache_can_be_cropped(layout: Layout) -> bool:
    """Whether the cache has plain keys and values without windows, so that its last column can be cropped."""
    return compat.grows_plainly(DynamicCache(config=layout.decoder.config))  # type: ignore[arg-type]
