"""Continuous batching: rows join and leave between any two decode steps, each with its own steering.

A step gives each row one token: greedy, sampled, or verified if its steering may be rejected (see `verify`). New rows
are read together in a separate prefill pass (rows with the same prompt and edits once), get their first token, and join
the batch; a finished row leaves before the step returns. A row's result doesn't depend on the other rows: its pads are
masked, its positions and random numbers are its own, and its steering is its row of the banks.

All decisions of a step are made on the device and copied to the host together. So the host waits once per step, for any
number of rows, and once more for candidates that have a pass of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.trace import Step
from trimtab.engines.answer import Applied
from trimtab.engines.meanings import follower
from trimtab.engines.resolve import check_prompt, resolve
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import position_handling
from trimtab.engines.transformers.batch_row import BatchRow, GenerationRequest, GenerationResponse
from trimtab.engines.transformers.batch_session import BatchSession
from trimtab.engines.transformers.chunked_prefill import CHUNK, ChunkedPrefill
from trimtab.engines.transformers.columns import BatchCache, SingleRowCache
from trimtab.engines.transformers.composition import Composition, DraftResults, sampler_of, takes_drafts, verifier_of
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.forks import Forks
from trimtab.engines.transformers.generate import _end_ids, _pad_id, check_request
from trimtab.engines.transformers.joining import PrefillResult, PromptReader
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.masks import PaddedMasks
from trimtab.engines.transformers.monitoring import MonitorReader, check_monitors_fit
from trimtab.engines.transformers.passes import last_logits
from trimtab.engines.transformers.rows import NewestTokens
from trimtab.engines.transformers.sampling import PLAIN, BatchSampler, RowSampler, Sampling, Settings
from trimtab.engines.transformers.scores import activation_edits
from trimtab.engines.transformers.sharing import rows_for
from trimtab.engines.transformers.step_results import LineLayout, ResponseBuilder
from trimtab.engines.transformers.verify import Ladder, Past, Verifier, check_rejection, make_ladder
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit

PREFILL = 512
"""The maximum number of prompt tokens, including pads, that one step reads, so that other rows don't wait for long.
In addition it reads a chunk of a prompt that is longer than `CHUNK`."""


def check_continuous_batching(model: Any, layout: Layout) -> None:
    """Raises `UnsupportedError` for a model that doesn't support continuous batching."""
    name = type(layout.decoder).__name__
    try:
        compat.check_common_cache(layout.decoder)
        compat.whole_cache(layout.decoder.config)
    except UnsupportedError as error:
        raise UnsupportedError(f"{name} doesn't support continuous batching: {error}") from None
    counted = position_handling(layout)
    if counted.takes_positions and "position_ids" not in compat.parameters(model):
        raise UnsupportedError(f"{type(model).__name__} doesn't take position_ids, so its rows can't be padded")
    if not counted.ignores_pads or (
        "position_ids" in compat.parameters(layout.decoder) and not counted.takes_positions
    ):
        raise UnsupportedError(
            f"{name} doesn't support continuous batching: its positions count padding tokens, or don't start at 0"
        )


class GenerationBatch:
    """A batch for continuous batching. `insert` and `remove` rows between steps; `step` gives every row its next token.

    It isn't thread-safe, and nothing else may steer the model during a step.

    Args:
        model: The model.
        tokenizer: Its tokenizer, for the padding token and for positions by meaning.
        layout: The model's layout.
        strict: Whether a greedy row with non-finite logits leaves with an error, as sampled rows always do; otherwise
            it continues, with an arbitrary token.
        ends: The tokens that end an answer; default: those of the model's generation settings.
        single_row: Run one row at a time, over the model's own cache and without padding, which also works for models
            that don't support continuous batching.

    Raises:
        UnsupportedError: The model doesn't support continuous batching; with `single_row`, it takes no transformers
            cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout,
        *,
        strict: bool = True,
        ends: Collection[int] | None = None,
        single_row: bool = False,
    ) -> None:
        if single_row:
            compat.check_common_cache(layout.decoder)
        else:
            check_continuous_batching(model, layout)
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.strict = strict
        self.single_row = single_row
        self.ends: set[int] | frozenset[int] = _end_ids(model, {}) if ends is None else frozenset(ends)
        self.device: torch.device = input_device(model)
        masks = PaddedMasks(layout)
        new_cache = compat.new_cache if single_row else compat.whole_cache
        pad = _pad_id(model, tokenizer)
        self._masks = masks
        self._watch = MonitorReader(layout)
        self._model_computes_positions = single_row and not position_handling(layout).takes_positions
        self._reader = PromptReader(
            model,
            layout,
            masks,
            pad,
            self.device,
            lambda: new_cache(model.config),
            self._model_computes_positions,
            self._watch,
        )
        self._settings: dict[Sampling, Settings] = {}
        self._next = 0
        self._pending: list[BatchRow] = []
        self._rows: list[BatchRow] = []  # in the order of the cache
        self._long: tuple[list[BatchRow], ChunkedPrefill] | None = None  # rows whose prompt is being read in chunks
        self._passes: Any = None  # runs candidates, once any row has had rejection
        self.on_end: Callable[[GenerationBatch, int], None] | None = None  # called with a row's index before it leaves
        self._reset()

    def _reset(self) -> None:
        self._cache: Any = SingleRowCache() if self.single_row else BatchCache()
        self._session = BatchSession(self.model, self.layout)  # steers the rows
        self._composition: Composition | None = None
        self._drafted: DraftResults | None = None

    def __len__(self) -> int:
        return len(self._rows) + len(self._pending) + len(self._long[0] if self._long else ())

    @property
    def running(self) -> int:
        """The number of rows in the batch, without those whose prompts haven't been read."""
        return len(self._rows)

    def check(self, request: GenerationRequest) -> None:
        """Raises `TrimtabError` for a row that can't run: too long, or steered at a position that its prompt lacks."""
        check_request(self.layout, [len(request.ids)], request.max_new_tokens, {})
        check_prompt(request.steering, len(request.ids))
        if request.rejection is not None and request.steering is not None:
            check_rejection(request.steering.edits, len(request.ids))
            if request.monitors:
                raise UnsupportedError("monitors can't be combined with rejection; leave one of them out")
        check_monitors_fit(request.monitors, request.steering, self.layout)
        for monitor in request.monitors:
            check_prompt(monitor.steering, len(request.ids))

    def insert(self, request: GenerationRequest) -> int:
        """Add a row for the next step. Returns its key.

        The caller must have called `lm.check(steering)`. Raises as `check` does.
        """
        self.check(request)
        self._next += 1
        self._pending.append(BatchRow(self._next, request, time.perf_counter()))
        return self._next

    def remove(self, key: int, *, ended: bool = False) -> Applied | None:
        """Remove a row, and return what steered it so far; `None` if the row isn't there any more.

        `ended` says that the row has finished, such as at a stop string, and isn't being canceled.
        """
        for row in self._pending:
            if row.key == key:
                self._pending.remove(row)
                return Applied((), ())
        for row in self._long[0] if self._long else ():
            if row.key == key:  # the prefill goes on for other rows with the same prompt
                self._long[0].remove(row)  # type: ignore[index]
                self._long = self._long if self._long and self._long[0] else None
                return Applied((), ())
        for place, row in enumerate(self._rows):
            if row.key == key:
                if ended and self.on_end is not None:
                    self.on_end(self, place)
                self._remove_row(place)
                return row.applied()
        return None

    def applied(self, key: int) -> Applied | None:
        """What has steered a row so far; `None` if it isn't in the batch."""
        for place, row in enumerate(self._rows):
            if row.key == key:
                return row.applied(self._session.tally(place))
        return None

    def trace(self, key: int) -> Any:
        """The trace of rejection in a row so far; `None` without rejection, or if the row isn't in the batch."""
        return next((row.trace for row in self._rows if row.key == key), None)

    def clear(self) -> list[int]:
        """Remove all rows. Returns their keys."""
        keys = [row.key for row in (*self._rows, *(self._long[0] if self._long else ()), *self._pending)]
        self._rows, self._pending, self._long = [], [], None
        self._reset()
        return keys

    @torch.no_grad()
    def step(self) -> list[GenerationResponse]:
        """Generate one token for each row, including new rows whose prompts have been read."""
        with reading(self.layout.decoder):
            responses = self._decode() if self._rows else []
            responses += self._prefill_rows(self._admit_rows()) + self._read_chunk()
        return responses

    # ---- rows that are in the batch ----------------------------------------------------------------------

    def _decode(self) -> list[GenerationResponse]:
        if self._composition is None:
            self._composition = Composition(
                self.layout,
                self._masks,
                self._session,
                self._rows,
                self._cache,
                self._passes,
                self.single_row,
                self.device,
            )
        run, cache = self._composition, self._cache
        cache.reserve()
        width = cache.width + 1
        self._watch.set_monitors(row.request.monitors for row in self._rows)
        copies = cache.row_copier() if run.verifier and not self._passes.shares else None
        token = NewestTokens(
            run.ids[:, None], None if self._model_computes_positions else run.positions[:, None], run.mask(width)
        )
        past = Past(token, copies or cache.model_cache, width, [row.holding for row in self._rows])
        drafted, fused = self._accepted_draft_logits(), None
        with self._passes.open(run.verifier.sites) if run.verifier else nullcontext():
            if drafted is not None:
                logits = drafted
            elif run.verifier and run.fuses:
                logits, fused = run.verifier.run_fused(past)
                self._count_pass(self._rows)
            else:
                with run.open():
                    logits = last_logits(
                        self.model, token.ids, token.mask, token.positions, cache.model_cache, self._watch
                    )
                self._session.check_reached(width)
                self._count_pass(self._rows)
            self._session.advance()
            cache.advance()
            chosen, tokens = self._choose(self._rows, logits, run.sampler, run.verifier, past, run.drafts, fused)
        self._session.set_input_tokens([row.newest for row in self._rows])
        run.advance(tokens)
        return self._remove_finished(self._switch_on(chosen))

    def _switch_on(self, responses: list[GenerationResponse]) -> list[GenerationResponse]:
        """Activate what monitors have switched on, from the next pass on; a row for which this fails gets an error."""
        for place, row in enumerate(self._rows):
            if not row.edits_changed:
                continue
            row.edits_changed, self._composition = False, None
            edits = activation_edits(row.edits)
            try:
                self._session.change(place, edits, follower(self.tokenizer, edits, row.request.ids), row.tokens)
            except TrimtabError as error:
                failed = GenerationResponse(row.key, error=error)
                responses = [failed if response.key == row.key else response for response in responses]
        return responses

    def _accepted_draft_logits(self) -> Tensor | None:
        """The logits `[rows, vocabulary]` of this step if a draft of every row was accepted, else `None`.

        The keys and values of the accepted drafts enter the cache.
        """
        drafted, self._drafted = self._drafted, None
        if drafted is None:
            return None
        if (rows := drafted.accepted_indices(self._rows)) is None:
            return None
        drafted.drafts.enter(self._cache.model_cache, rows)
        return drafted.logits[self._passes.tensor(tuple(rows), self.device)]

    def _count_pass(self, rows: Sequence[BatchRow]) -> None:
        for row in rows:
            row.passes += 1

    def _choose(
        self,
        rows: Sequence[BatchRow],
        logits: Tensor,
        sampler: BatchSampler,
        verifier: Verifier | None,
        past: Past | None,
        drafts: bool,
        fused: Tensor | None = None,
        pass_indices: Sequence[int] | None = None,
    ) -> tuple[list[GenerationResponse], Tensor]:
        """Choose each row's next token. Returns the responses and the tokens. The host waits for the device here.

        `pass_indices` are the indices of these rows in the last pass; default: all of its rows, in order.
        """
        watched = self._watch.values
        if watched is not None and pass_indices is not None:
            watched = watched[list(pass_indices)]
        facts = LineLayout.of(rows, logits.shape[-1], watched)
        steps: dict[int, Step] = {}
        if verifier is None or past is None:
            tokens = sampler.select_tokens(sampler.processed(logits))
            lines = facts.lines(tokens, logits).tolist()
        else:
            drafting = [len(row.tokens) + 1 < row.request.max_new_tokens for row in rows] if drafts else []
            verified = verifier.verify(
                sampler, logits, facts.lines, past, drafting=drafting, ends=frozenset(self.ends), fused=fused
            )
            tokens, lines, steps = verified.tokens, verified.facts, verified.steps
            if verified.ran:
                self._count_pass(rows)
            if verified.drafts is not None:
                self._drafted = DraftResults.of(rows, *verified.drafts)
        sampler.advance(tokens)
        response_builder = ResponseBuilder(facts, self._watch, self.ends, self.strict)
        paired = enumerate(zip(rows, lines, strict=True))
        return [response_builder.build(row, line, steps.get(i)) for i, (row, line) in paired], tokens

    def _remove_finished(self, responses: list[GenerationResponse]) -> list[GenerationResponse]:
        done = {response.key for response in responses if response.finish or response.error}
        if not done:
            return responses
        removed_rows: dict[int, BatchRow] = {}
        failed = {response.key for response in responses if response.error}
        for place, row in reversed(list(enumerate(self._rows))):
            if row.key in done:
                if self.on_end is not None and row.key not in failed:
                    self.on_end(self, place)
                self._remove_row(place)
                removed_rows[row.key] = row
        return [_ended(response, removed_rows.get(response.key)) for response in responses]

    def _remove_row(self, place: int) -> None:
        """Remove a row. The last row moves to its place in the cache, the session and the list."""
        self._composition = None
        self._rows[place].add(self._session.remove(place))
        self._cache.remove(place)
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last

    # ---- rows that join ----------------------------------------------------------------------------------

    def _admit_rows(self) -> list[BatchRow]:
        """Take the first waiting rows, as many as fit into one pass."""
        if self.single_row:
            taken = [] if self._rows else self._pending[:1]
            self._pending = self._pending[len(taken) :]
            return taken
        taken = []
        widest, texts = 0, set()
        for row in (row for row in self._pending if not _in_chunks(row)):
            texts.add((row.request.prefill, row.request.images))
            widest = max(widest, len(row.request.ids))
            if taken and widest * len(texts) > PREFILL:
                break
            taken.append(row)
        self._pending = [row for row in self._pending if row not in taken]
        return taken

    def _read_chunk(self) -> list[GenerationResponse]:
        """Read the next chunk of a long prompt. Once it is complete, its rows join and get their first tokens."""
        if self.single_row:
            return []
        if self._long is None:
            first = next((row.request for row in self._pending if _in_chunks(row)), None)
            if first is None:
                return []
            same = first.prefill, first.clean_cache, first.scope
            rows = [
                row
                for row in self._pending
                if _in_chunks(row) and (row.request.prefill, row.request.clean_cache, row.request.scope) == same
            ]
            self._pending = [row for row in self._pending if row not in rows]
            self._long = rows, self._prefill(first)
        rows, prefill = self._long
        prefill.watch = self._watch
        self._watch.set_monitors(row.request.monitors for row in rows)
        try:
            if (logits := prefill.advance()) is None:
                return []
            self._long = None
            return self._add_chunked_rows(rows, prefill, logits)
        except (TrimtabError, RuntimeError) as error:
            self._long = None
            return [GenerationResponse(row.key, error=error) for row in rows]

    def _prefill(self, request: GenerationRequest) -> ChunkedPrefill:
        return ChunkedPrefill(self.model, self.layout, *request.prefill, self.device)

    def _add_chunked_rows(
        self, rows: list[BatchRow], prefill: ChunkedPrefill, logits: Tensor
    ) -> list[GenerationResponse]:
        """Add rows whose common prompt was read in chunks to the batch."""
        length = len(prefill.ids)
        read = PrefillResult([prefill.edits], [prefill.names], [prefill.tally()], logits, prefill.cache, [length])
        return self._add_rows(rows, [0] * len(rows), read)

    def _prefill_rows(self, rows: list[BatchRow]) -> list[GenerationResponse]:
        """Prefill new rows and give their first tokens. If a pass fails, the rows are read one by one."""
        if not rows:
            return []
        images = list(dict.fromkeys(row.request.images for row in rows))
        if len(images) > 1:  # each prompt with images has a pass of its own
            return [
                response
                for each in images
                for response in self._prefill_rows([r for r in rows if r.request.images is each])
            ]
        try:
            rejecting = [row for row in rows if row.request.rejection is not None]
            if rejecting and self._passes is None:
                own = Forks if self.single_row else rows_for
                self._passes = own(self.model, self.layout)
            if rejecting and len(rejecting) < len(rows) and not self._passes.shares:  # they are read in two passes
                return self._prefill_rows(rejecting) + self._prefill_rows([row for row in rows if row not in rejecting])
            texts = list(dict.fromkeys(row.request.prefill for row in rows))
            if images[0] is not None and len(texts) > 1:  # under several steerings
                each = [[row for row in rows if row.request.prefill == text] for text in texts]
                return [response for alike in each for response in self._prefill_rows(alike)]
            copied = bool(rejecting) and not self._passes.shares
            self._watch.set_monitors(row.request.monitors for row in rows)
            read = self._reader.read(texts, verified=bool(rejecting), copied=copied, images=images[0])
            return self._add_rows(rows, [texts.index(row.request.prefill) for row in rows], read)
        except (TrimtabError, RuntimeError) as error:
            if len(rows) == 1:
                return [GenerationResponse(rows[0].key, error=error)]
            for row in rows:
                row.reset()
            return [response for row in rows for response in self._prefill_rows([row])]

    def _add_rows(self, rows: list[BatchRow], text_indices: list[int], read: PrefillResult) -> list[GenerationResponse]:
        """Add rows whose prompts have been read to the batch. `text_indices` is the index of each row's text in
        `read`.
        """
        self._find_ladders(rows, text_indices, read)
        for row, text in zip(rows, text_indices, strict=True):
            if row.ladder is None:
                row.edits, row.names = read.edits[text], read.names[text]
                row.add(read.tallies[text])
            row.sampler, row.shift = self._row_sampler(row.request), read.shift
        pads = [read.past.columns - length for length in read.lengths] if read.past else []
        verifier = verifier_of(rows, self.layout, self._passes, text_indices, read.lengths, pads, self.device)
        drafts = not self._rows and not self._pending and verifier is not None and takes_drafts(rows, verifier)
        sampler = sampler_of(rows, self.device)
        with self._passes.open(verifier.sites) if verifier else nullcontext():
            chosen, _ = self._choose(
                rows, read.logits[text_indices], sampler, verifier, read.past, drafts, pass_indices=text_indices
            )
        done = {response.key for response in chosen if response.finish or response.error}
        staying = [(row, text) for row, text in zip(rows, text_indices, strict=True) if row.key not in done]
        if staying:
            self._composition = None
            self._add_to_session([(row, read.edits[text] if row.edits_changed else row.edits) for row, text in staying])
            self._cache.insert(read.cache, [(text, len(row.request.ids)) for row, text in staying])
            self._rows += [row for row, _ in staying]
            chosen = self._remove_finished(self._switch_on(chosen))
        ended = {row.key: row for row in rows if row.key in done}
        return [_ended(response, ended.get(response.key)) for response in chosen]

    def _add_to_session(self, rows: Iterable[tuple[BatchRow, tuple[Edit, ...]]]) -> None:
        """Add these rows to the session, all or none. Raises `TrimtabError` for edits that can't act together."""
        before = len(self._session.rows)
        try:
            for row, before_monitors in rows:
                edits, ids = activation_edits(before_monitors), row.request.ids
                self._session.insert(edits, len(ids), follower(self.tokenizer, edits, ids), row.newest)
        except TrimtabError:
            while len(self._session.rows) > before:
                self._session.remove(before)
            raise

    def _find_ladders(self, rows: Sequence[BatchRow], text_indices: Sequence[int], read: PrefillResult) -> None:
        """For rows with rejection: evaluate the gates, rank the layers, and build the ladders of candidates."""
        made: dict[Any, tuple[Ladder, tuple[str, ...]]] = {}
        for row, text in zip(rows, text_indices, strict=True):
            rejection, ids = row.request.rejection, row.request.ids
            if rejection is None or read.past is None:
                continue
            key = text, row.request.steering, rejection
            if key not in made:
                resolved = resolve(
                    [row.request.steering], [len(ids)], self._reader.reads([list(ids)], row.request.images)
                )
                made[key] = (
                    make_ladder(self._passes, self.layout, rejection, resolved.edits[0], read.past, text, read.lengths),
                    resolved.names[0],
                )
            row.ladder, row.names = made[key]
            row.follower = follower(self.tokenizer, row.ladder.edits, ids)

    def _row_sampler(self, request: GenerationRequest) -> RowSampler:
        sampling, settings = request.sampling, request.settings
        if settings is None:
            plain = replace(sampling, seed=None)
            settings = self._settings.get(plain)
            if settings is None:
                options = {**PLAIN, **sampling.options} if sampling.greedy else sampling.options
                settings = Settings.of(self.model, options, len(request.ids), self.device)
                if not settings.fallback_processors:  # unknown processors may depend on the prompt
                    self._settings[plain] = settings
        matcher = None if request.matcher is None else request.matcher.copy()
        return RowSampler(settings, sampling.seed, request.max_new_tokens, matcher)


def _in_chunks(row: BatchRow) -> bool:
    """Whether a row's prompt is read in chunks: if it is long, and has neither rejection nor images."""
    request = row.request
    return len(request.ids) > CHUNK and request.rejection is None and request.images is None


def _ended(response: GenerationResponse, row: BatchRow | None) -> GenerationResponse:
    """The response, with what steered a row that has left."""
    return response if row is None else replace(response, applied=row.applied(), trace=row.trace)
