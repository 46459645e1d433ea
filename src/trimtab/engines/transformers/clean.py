"""Steering over a clean cache: the KV cache holds the keys and values of the unsteered model.

A row with a clean cache computes each token twice in one forward pass: unsteered, and steered as its "twin". The
unsteered keys and values stay in the cache. The twin attends to the unsteered tokens before it and to itself, and
predicts the next token; its own keys and values are overwritten by the next pass. So a steered turn of a conversation
doesn't affect later turns, and the cache can be reused like one that was never steered.

The prompt is read once, unsteered. Its last token is then read again with a twin, like every later token, and gives the
first generated token. Gates are evaluated during prefill. If a gate stays shut, the row is decoded like an unsteered
one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.answer import Applied
from trimtab.engines.meanings import follower
from trimtab.engines.resolve import PositionsByRequest, active_edits, depends_on_prompt, gate_readings, resolve
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import position_handling
from trimtab.engines.transformers.attention import (
    SUPPORTED_IMPLEMENTATIONS,
    attention_modules,
    check_attention,
    configurations,
    registered_attention,
)
from trimtab.engines.transformers.batch_row import BatchRow, GenerationRequest, GenerationResponse
from trimtab.engines.transformers.batch_session import BatchSession
from trimtab.engines.transformers.chunked_prefill import ChunkedPrefill
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.composition import Composition
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.images import PositionShift, check_decodes_from_cache, recording_positions
from trimtab.engines.transformers.joining import PrefillResult
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.positions import ForwardPass
from trimtab.engines.transformers.read import recording
from trimtab.engines.transformers.scores import is_score_edit
from trimtab.engines.transformers.session import STRIDE
from trimtab.engines.transformers.steered_pass import SteeredPass
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site, Steering


def check_clean(layout: Layout) -> None:
    """Raises `UnsupportedError` for a model that can't read a token twice in one pass over one cache."""
    decoder: Any = layout.decoder
    name = type(decoder).__name__
    if not compat.keeps_plain_cache(decoder):
        raise UnsupportedError(
            f"{name} can't steer over a clean cache: it keeps more than keys and values (such as a recurrent state),"
            " which the steered reading of a token would change; leave clean_cache out"
        )
    if not position_handling(layout).takes_positions:
        raise UnsupportedError(
            f"{name} can't steer over a clean cache: it doesn't take position_ids, so the two readings of a token would"
            " get different positions; leave clean_cache out"
        )
    usual = compat.attention_name(decoder.config)
    if usual not in SUPPORTED_IMPLEMENTATIONS:
        raise UnsupportedError(
            f"a clean cache isn't supported with {usual} attention; load the model with sdpa or eager attention"
        )
    check_attention(layout)
    if sum(module is not None for module in attention_modules(layout)) < layout.layers:
        raise UnsupportedError(f"{name} has blocks without attention, which can't tell a token's two readings apart")


def check_clean_edits(edits: Sequence[Edit], prompt_length: int) -> None:
    """Raises `UnsupportedError` for edits that can't act over a clean cache.

    Args:
        edits: The edits of a steering; its gates needn't have been evaluated.
        prompt_length: In tokens.
    """
    for edit in edits:
        if is_score_edit(edit):
            raise UnsupportedError(
                f"{edit} steers attention scores, which a clean cache doesn't have; rejection does, and keeps the cache"
                " clean as well: ask for that instead (beta 0 rejects nothing)"
            )
        spans = edit.positions.reach(prompt_length)
        if not any(stop is None or stop >= prompt_length for _, stop in spans):
            raise UnsupportedError(
                f"over a clean cache steering acts from the last prompt token on, and {edit} acts only before it;"
                " choose other positions, or leave clean_cache out"
            )


class CleanBatch(GenerationBatch):
    """A batch whose rows may have a clean cache. Each step, those rows are decoded in a separate pass.

    So a step takes one pass, or two if there are rows with and without a clean cache. The pass of rows with a clean
    cache has two tokens per row.
    """

    def __init__(self, model: Any, tokenizer: Any, layout: Layout, **options: Any) -> None:
        super().__init__(model, tokenizer, layout, **options)
        self._twins = _Twins(model, tokenizer, layout, **options)

    def __len__(self) -> int:
        return super().__len__() + len(self._twins)

    @property
    def running(self) -> int:
        return super().running + self._twins.running

    def check(self, request: GenerationRequest) -> None:
        super().check(request)
        if uses_clean_cache(request):
            check_clean(self.layout)
            if self.single_row:
                raise UnsupportedError(
                    "a clean cache needs continuous batching, and this batch runs one row at a time; leave clean_cache"
                    " out"
                )
            if request.rejection is not None:
                raise UnsupportedError("with rejection the cache is clean in any case; leave clean_cache out")
            check_clean_edits(active_edits(request.steering), len(request.ids))
            for monitor in request.monitors:
                check_clean_edits(active_edits(monitor.steering), len(request.ids))

    def remove(self, key: int, *, ended: bool = False) -> Applied | None:
        applied = super().remove(key, ended=ended)
        return self._twins.remove(key, ended=ended) if applied is None else applied

    def applied(self, key: int) -> Applied | None:
        applied = super().applied(key)
        return self._twins.applied(key) if applied is None else applied

    def clear(self) -> list[int]:
        return [*super().clear(), *self._twins.clear()]

    def step(self) -> list[GenerationResponse]:
        responses = super().step()
        return responses + (self._twins.step() if len(self._twins) else [])

    def _prefill_rows(self, rows: list[BatchRow]) -> list[GenerationResponse]:
        clean = [row for row in rows if uses_clean_cache(row.request)]
        others = [row for row in rows if not uses_clean_cache(row.request)]
        responses = super()._prefill_rows(others)
        images = list(dict.fromkeys(row.request.images for row in clean))
        if len(images) > 1:  # each prompt with images has a pass of its own
            each = [[row for row in clean if row.request.images is prompt_images] for prompt_images in images]
            return responses + [response for alike in each for response in self._prefill_rows(alike)]
        try:
            return responses + (self._read_clean(clean) if clean else [])
        except (TrimtabError, RuntimeError) as error:
            if len(clean) == 1:
                return [*responses, GenerationResponse(clean[0].key, error=error)]
            for row in clean:
                row.reset()
            return responses + [response for row in clean for response in self._prefill_rows([row])]

    def _read_clean(self, rows: list[BatchRow]) -> list[GenerationResponse]:
        """Prefill the prompts unsteered, each distinct one once, and evaluate the gates."""
        prompts = list(dict.fromkeys(row.request.ids for row in rows))
        steerings = [row.request.steering for row in rows]
        lengths = [len(row.request.ids) for row in rows]
        prompt_indices = [prompts.index(row.request.ids) for row in rows]
        sites = sorted({site for steering in steerings for site in _sites_to_decide(steering)})
        cache = compat.whole_cache(self.model.config)
        ids, mask, positions = self._reader.padded(prompts)
        images, counted = rows[0].request.images, PositionShift()
        self._watch.set_monitors(row.request.monitors for row in rows)
        activations: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            if images is not None:
                check_decodes_from_cache(self.model, self.layout, prompts[0], images)
                counted = stack.enter_context(recording_positions(self.layout, len(prompts[0])))
            if sites:
                activations = stack.enter_context(recording(self.layout, sites, lambda x: x, to_the_end=True))
            position_ids = positions if images is None else None  # with images the model computes positions itself
            more = None if images is None else images.inputs
            logits = last_logits(self.model, ids, mask, position_ids, cache, self._watch, more)
        for row in rows:
            row.shift = counted.shift

        def read(where: PositionsByRequest, wanted: Sequence[Site], _tokens: int) -> dict[int, dict[Site, Tensor]]:
            width = ids.shape[1]
            columns = {i: [width - lengths[i] + p for p in positions] for i, positions in where.items()}
            return {i: {site: activations[site][prompt_indices[i], at] for site in wanted} for i, at in columns.items()}

        resolved = resolve(steerings, lengths, read)
        return self._add_clean_rows(rows, prompt_indices, resolved.edits, resolved.names, logits, cache)

    def _add_clean_rows(
        self,
        rows: list[BatchRow],
        text_indices: Sequence[int],
        edits: Sequence[tuple[Edit, ...]],
        names: Sequence[tuple[str, ...]],
        logits: Tensor,
        cache: DynamicCache,
    ) -> list[GenerationResponse]:
        """Add rows after their unsteered prefill: to the twins if they may be steered, else to the other rows."""
        responses: list[GenerationResponse] = []
        for row, text, row_edits, called in zip(rows, text_indices, edits, names, strict=True):
            if not row_edits and not _may_be_steered(row.request):
                count = len(logits)
                same = [called] * count
                read = PrefillResult([()] * count, same, [{}] * count, logits, cache, [0] * count, shift=row.shift)
                responses += self._add_rows([row], [text], read)
                continue
            row.edits, row.names, row.sampler = row_edits, called, self._row_sampler(row.request)
            try:
                self._twins.add_row(row, cache, text)
            except TrimtabError as error:  # only now is it known which edits act together
                responses.append(GenerationResponse(row.key, error=error))
        return responses

    def _prefill(self, request: GenerationRequest) -> ChunkedPrefill:
        return _CleanPrefill(self, request) if uses_clean_cache(request) else super()._prefill(request)

    def _add_chunked_rows(
        self, rows: list[BatchRow], prefill: ChunkedPrefill, logits: Tensor
    ) -> list[GenerationResponse]:
        if not isinstance(prefill, _CleanPrefill):
            return super()._add_chunked_rows(rows, prefill, logits)
        count = len(rows)
        return self._add_clean_rows(
            rows, [0] * count, [prefill.edits] * count, [prefill.names] * count, logits, prefill.cache
        )


class _CleanPrefill(ChunkedPrefill):
    """The prefill of a long prompt for a clean cache: once, unsteered."""

    def __init__(self, batch: GenerationBatch, request: GenerationRequest) -> None:
        super().__init__(batch.model, batch.layout, request.ids, request.steering, batch.device)

    def _first_edited(self) -> int:
        return len(self.ids)

    @contextmanager
    def _steering(self, columns: int) -> Iterator[None]:
        yield


class _Twins(GenerationBatch):
    """The rows with a clean cache. A step reads each row's newest token twice, unsteered and steered."""

    def __init__(self, model: Any, tokenizer: Any, layout: Layout, **options: Any) -> None:
        super().__init__(model, tokenizer, layout, **options)
        self._usual = compat.attention_name(layout.decoder.config)

    def _reset(self) -> None:
        super()._reset()
        self._session: BatchSession = _TwinSession(self.model, self.layout)

    def add_row(self, row: BatchRow, cache: DynamicCache, cache_row: int) -> None:
        """Add a row whose prompt is in row `cache_row` of a cache. The prompt's last token is read again, with a
        twin.
        """
        kept = len(row.request.ids) - 1
        ids = row.request.ids
        self._session.insert(row.edits, len(ids), follower(self.tokenizer, row.edits, ids), position=kept)
        self._cache.insert(_without_last(cache), [(cache_row, kept)])
        self._rows.append(row)
        self._composition = None

    def _decode(self) -> list[GenerationResponse]:
        if self._composition is None:
            self._composition = Composition(
                self.layout, self._masks, self._session, self._rows, self._cache, None, False, self.device
            )
        run, cache = self._composition, self._cache
        cache.reserve(2)
        width = cache.width + 1
        self._watch.set_monitors(row.request.monitors for row in self._rows)
        with run.open(), self._twin_masks():
            ids, positions = run.ids[:, None].expand(-1, 2), run.positions[:, None].expand(-1, 2)
            logits = last_logits(self.model, ids, run.mask(width + 1), positions, cache, self._watch)
        self._session.check_reached(width)
        self._session.advance()
        cache.advance(2)
        chosen, tokens = self._choose(self._rows, logits, run.sampler, None, None, drafts=False)
        self._session.set_input_tokens([row.newest for row in self._rows])
        run.advance(tokens)
        return self._remove_finished(self._switch_on(chosen))

    @contextmanager
    def _twin_masks(self) -> Iterator[None]:
        """While open, both readings of a token attend to the token's past, and each to itself but not to the other."""
        owner = get_ident()
        usual = compat.mask_function(self._usual)
        called: set[nn.Module] = set()

        def mask(*args: Any, **kwargs: Any) -> Tensor | None:
            if get_ident() != owner:
                return usual(*args, **kwargs)
            columns = kwargs["kv_length"] - 1  # counting the token once
            padding = kwargs.get("attention_mask")
            alone = {
                **kwargs,
                "q_length": 1,
                "kv_length": columns,
                "attention_mask": None if padding is None else padding[:, :columns],
                "allow_is_causal_skip": False,
                "allow_is_bidirectional_skip": False,
            }
            seen = usual(*args, **alone)
            if seen is None or seen.dim() != 4:
                raise UnsupportedError("trimtab can't build this model's attention masks for two readings of a token")
            hidden = False if seen.dtype == torch.bool else torch.finfo(seen.dtype).min
            own, other = seen[..., -1:], torch.full_like(seen[..., -1:], hidden)
            before = seen[..., :-1]
            return torch.cat([torch.cat([before, own, other], -1), torch.cat([before, other, own], -1)], -2)

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            if get_ident() == owner:
                if not isinstance(mask, Tensor) or tuple(mask.shape[-2:]) != (query.shape[2], key.shape[2]):
                    raise UnsupportedError(
                        f"{type(module).__name__} uses an attention mask of its own, so the two readings of a token"
                        " would see each other; leave clean_cache out"
                    )
                called.add(module)
            if kwargs.get("softcap") is None and self._usual == "sdpa":
                kwargs.pop("softcap", None)
            return compat.attention_function(self._usual, module)(module, query, key, value, mask, **kwargs)

        with (
            registered_attention(attend, mask) as name,
            compat.with_attention_implementation(configurations(self.layout), name),
        ):
            yield
        modules = [module for module in attention_modules(self.layout) if module is not None]
        if any(module not in called for module in modules):
            raise TrimtabError(
                "a layer didn't use the attention function that the model's configuration names, so the two readings of"
                " a token weren't kept apart"
            )


class _TwinSession(BatchSession):
    """Steers the second of the two readings of each row's token, not the first."""

    def decoder_pre_hook(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().decoder_pre_hook(decoder, args, kwargs)
        if not self._in_other_thread() and self._step is not None:
            self._measures = (self._step.passes - 1) % STRIDE == 0

    def _enter(self, forward_pass: ForwardPass, arguments: dict[str, Any], begins: bool) -> SteeredPass:
        if forward_pass.length != 2:
            raise TrimtabError(f"a pass of {forward_pass.length} tokens per row, but each row's token is read twice")
        return super()._enter(replace(forward_pass, length=1), arguments, begins)

    def edit(self, site: Site, activations: Tensor) -> Tensor | None:
        whole = activations if activations.dim() == 3 else activations.view(len(self.rows), -1, activations.shape[-1])
        if whole.shape[1] == 1:  # a last layer that computes only the last token
            return super().edit(site, activations)
        if whole.shape[:2] != (len(self.rows), 2):
            raise TrimtabError(
                f"at {site} the model computes {tuple(activations.shape[:-1])} activations in a pass of"
                f" {len(self.rows)} rows and 2 tokens; which belongs to which can't be determined"
            )
        new = super().edit(site, whole[:, 1:])
        return None if new is None else torch.cat([whole[:, :1], new], 1).view(activations.shape)


def uses_clean_cache(request: GenerationRequest) -> bool:
    """Whether a request asks for a clean cache and is, or may be, steered."""
    return request.clean_cache and (bool(active_edits(request.steering)) or _may_be_steered(request))


def _may_be_steered(request: GenerationRequest) -> bool:
    """Whether a monitor can switch on a steering."""
    return any(monitor.steering is not None for monitor in request.monitors)


def _sites_to_decide(steering: Steering | None) -> set[Site]:
    """The sites whose activations at the prompt are needed for gates and for operations that depend on the prompt."""
    return {reading.site for reading in gate_readings(steering)} | {
        edit.site for edit in active_edits(steering) if depends_on_prompt(edit)
    }


def _without_last(cache: DynamicCache) -> DynamicCache:
    """The keys and values without those of the last column."""
    aside = compat.snapshot_cache(cache)
    for layer in aside.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    return aside
