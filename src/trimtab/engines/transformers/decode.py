"""A batch that is decoded step by step: rows come and go between any two tokens, each with its own steering.

A step gives each row one token, greedy or sampled. Rows that are new are read together in one pass of their own (rows
of the same prompt and edits once), give their first token, and take their place in the batch; a row that is done has
left it before the step is over. What a row gets is what it gets alone: its pads are masked, its positions are its own,
its random numbers are, and its steering is its row of the banks.

All that a step decides is decided on the device, and told to the host at once: it waits once a step, for however many
rows. Additions, projections, gates and the like run here, and edits of attention scores too. Rejection doesn't: its
rungs need a loop of their own (see `rejecting`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.meanings import follower
from trimtab.engines.resolve import check_prompt, resolve
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import positions_of
from trimtab.engines.transformers.attention import head_count, steered_scores
from trimtab.engines.transformers.batch_session import BatchSession
from trimtab.engines.transformers.chunked_prefill import CHUNK, ChunkedPrefill
from trimtab.engines.transformers.columns import Columns
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.generate import Applied, _end_ids, _pad_id, check_request
from trimtab.engines.transformers.grammar import Matcher
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.masks import PaddedMasks
from trimtab.engines.transformers.monitoring import Log, Watch, check_watched, switched_on
from trimtab.engines.transformers.prefill import Prefill, decides_at_prefill
from trimtab.engines.transformers.read import reader
from trimtab.engines.transformers.sampling import GREEDY, PLAIN, BatchSampler, RowSampler, Sampling, Settings
from trimtab.engines.transformers.scores import LayerScores, Row, compile_scores, is_score_edit
from trimtab.engines.transformers.session import Session, Tally, doses_of
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site, Steering
from trimtab.steering.monitors import FILTERED, Monitor

PREFILL = 512
"""Tokens, pads included, that one step reads of prompts at most, so that others don't wait for long; and a chunk of a
prompt that is longer than `CHUNK`."""


@dataclass(frozen=True)
class GenerationRequest:
    """What one row is to be: a rendered prompt, its steering, how its tokens are chosen, and how many at most.

    `alternatives`: how many of the likeliest tokens are told at each place; `None` tells no log-probabilities.
    `settings` are those of `sampling` and the model's own, unless they are given. `matcher` stands at the beginning of
    the grammar that the answer keeps to; the row takes a copy. `clean_cache`: what is stored of the text is what the
    unsteered model would store; only `CleanBatch` has such rows. `monitors` read the row's tokens. `scope`: for whom
    what the row has read may be kept, and from whose it may go on, where a batch keeps it.
    """

    ids: tuple[int, ...]
    steering: Steering | None = None
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    alternatives: int | None = None
    settings: Settings | None = None
    matcher: Matcher | None = None
    clean_cache: bool = False
    monitors: tuple[Monitor, ...] = ()
    scope: str | None = None

    @property
    def text(self) -> tuple[Any, ...]:
        """What has to be the same for two requests whose prompts are to be read as one."""
        return self.ids, self.steering, self.clean_cache


@dataclass(frozen=True)
class GenerationResponse:
    """One token of one row. `finish` is `"stop"` or `"length"` with its last, and `applied` then what steered it.

    `monitored` is what the row's monitors read where the token was chosen, and `fired` are those beyond their threshold
    for the first time. One of them may end the answer: `finish` is then `"content_filter"`, and there is no token.
    `cached` tokens of the prompt were taken over from another row.

    `logprob` and `likeliest` (ids and log-probabilities, best first) are under the steered model, before any
    temperature. With `error` there is no token: the row couldn't go on and has left.
    """

    key: int
    token: int = -1
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    applied: Applied | None = None
    error: Exception | None = None
    cached: int = 0
    monitored: tuple[float, ...] = ()
    fired: tuple[str, ...] = ()


def check_steps(model: Any, layout: Layout) -> None:
    """Raises `UnsupportedError` for a model whose rows can't join and leave a running batch."""
    name = type(layout.decoder).__name__
    try:
        compat.check_common_cache(layout.decoder)
        compat.whole_cache(layout.decoder.config)
    except UnsupportedError as error:
        raise UnsupportedError(f"rows of {name} can't share a batch of steps: {error}") from None
    counted = positions_of(layout)
    if counted.given and "position_ids" not in compat.parameters(model):
        raise UnsupportedError(
            f"{type(model).__name__} doesn't take its tokens' positions, so that rows can't be padded"
        )
    if not counted.ignores_pads or ("position_ids" in compat.parameters(layout.decoder) and not counted.given):
        raise UnsupportedError(
            f"{name} counts pads as positions, or from elsewhere than 0, so that its rows can't share a batch of steps"
        )


@dataclass(eq=False)
class _Row:
    key: int
    request: GenerationRequest
    edits: tuple[Edit, ...] = ()
    names: tuple[str, ...] = ()
    sampler: RowSampler | None = None
    tokens: list[int] = field(default_factory=list)
    pushed: Tally = field(default_factory=dict)
    log: Log = field(default_factory=Log)
    cached: int = 0  # tokens of its prompt that were taken over
    switched: bool = False  # whether a monitor has changed its edits, which the session hasn't been told

    @property
    def length(self) -> int:
        return len(self.request.ids) + len(self.tokens)

    @property
    def newest(self) -> int:
        """The token that the next pass reads."""
        return self.tokens[-1] if self.tokens else self.request.ids[-1]

    def add(self, more: Tally) -> None:
        for site, (total, measured, tokens) in more.items():
            before = self.pushed.get(site, (0.0, 0.0, 0))
            self.pushed[site] = (before[0] + total, before[1] + measured, before[2] + tokens)


class GenerationBatch:
    """The batch. `insert` and `remove` at any time between steps; `step` gives every row its next token.

    It isn't for several threads at once, and nothing else may steer the model during a step.

    Args:
        model: The model.
        tokenizer: Its tokenizer, for the token that pads prompts, and for what tokens mean.
        layout: Where things are in the model.
        strict: A greedy row whose logits are no numbers any more leaves with an error, as sampled ones do in any case;
            otherwise it goes on, with some token.
        ends: The tokens that end an answer; by default those of the model's generation settings.

    Raises:
        UnsupportedError: Rows of this model can't share a batch of steps.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layout: Layout, *, strict: bool = True, ends: Collection[int] | None = None
    ) -> None:
        check_steps(model, layout)
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.strict = strict
        self.ends = _end_ids(model, {}) if ends is None else frozenset(ends)
        self.pad = _pad_id(model, tokenizer)
        self.device = input_device(model)
        self._takes = compat.parameters(model)
        self._masks = PaddedMasks(layout)
        self._watch = Watch(layout)
        self._settings: dict[Sampling, Settings] = {}
        self._next = 0
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []  # in the order of the cache's
        self._long: tuple[list[_Row], ChunkedPrefill] | None = None  # rows whose one prompt is being read in chunks
        self._cache = Columns()
        self._session = BatchSession(model, layout)  # of the rows
        self._run: _Decoding | None = None
        self.on_end: Callable[[GenerationBatch, int], None] | None = None  # told of a row's place before it leaves

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting) + len(self._long[0] if self._long else ())

    @property
    def running(self) -> int:
        """How many rows are in the batch, those that wait to be read not included."""
        return len(self._rows)

    def check(self, request: GenerationRequest) -> None:
        """Raises `TrimtabError` for a row that can't run: too long, or steered where its prompt has no token."""
        check_request(self.layout, [len(request.ids)], request.max_new_tokens, {})
        check_prompt(request.steering, len(request.ids))
        check_watched(request.monitors, request.steering, self.layout)
        for one in request.monitors:
            check_prompt(one.steering, len(request.ids))

    def insert(self, request: GenerationRequest) -> int:
        """A row, for the next step; its key. `lm.check(steering)` is the caller's. Raises as `check` does."""
        self.check(request)
        self._next += 1
        self._waiting.append(_Row(self._next, request))
        return self._next

    def remove(self, key: int, *, ended: bool = False) -> Applied | None:
        """Take a row out, and say what steered it so far; `None` where there is no such row any more.

        `ended`: not given up, but at its end, as by a text that ends it.
        """
        for row in self._waiting:
            if row.key == key:
                self._waiting.remove(row)
                return Applied((), ())
        for row in self._long[0] if self._long else ():
            if row.key == key:  # the others of the same prompt go on
                self._long[0].remove(row)  # type: ignore[index]
                self._long = self._long if self._long and self._long[0] else None
                return Applied((), ())
        for place, row in enumerate(self._rows):
            if row.key == key:
                if ended and self.on_end is not None:
                    self.on_end(self, place)
                self._take_out(place)
                return _applied(row)
        return None

    def applied(self, key: int) -> Applied | None:
        """What has steered a row so far; `None` where there is no such row in the batch."""
        for place, row in enumerate(self._rows):
            if row.key == key:
                return _applied(row, self._session.tally(place))
        return None

    def clear(self) -> list[int]:
        """Everybody leaves; their keys."""
        keys = [row.key for row in (*self._rows, *(self._long[0] if self._long else ()), *self._waiting)]
        self._rows, self._waiting, self._long, self._cache, self._run = [], [], None, Columns(), None
        self._session = BatchSession(self.model, self.layout)
        return keys

    @torch.no_grad()
    def step(self) -> list[GenerationResponse]:
        """One token for each row, rows that have just joined included, once their prompts are read."""
        with reading(self.layout.decoder):
            told = self._decode() if self._rows else []
            told += self._read_in(self._admitted()) + self._read_chunk()
        return told

    # ---- rows that are in the batch ----------------------------------------------------------------------

    def _decode(self) -> list[GenerationResponse]:
        if self._run is None:
            self._run = _Decoding(self)
        run, cache = self._run, self._cache
        cache.make_room()
        width = cache.width + 1
        self._watch.of(row.request.monitors for row in self._rows)
        with run.open():
            logits = self._logits(run.ids[:, None], run.mask(width), run.positions[:, None], cache)
        self._session.check_reached(width)
        self._session.advance()
        cache.advance()
        chosen = self._choose(self._rows, logits, run.sampler)
        self._session.turn([row.newest for row in self._rows])
        run.advance(chosen.tokens)
        return self._without_the_done(self._switch_on(chosen.told))

    def _switch_on(self, told: list[GenerationResponse]) -> list[GenerationResponse]:
        """Let what monitors have switched on act from the next pass on; a row for which that can't be has an error."""
        for place, row in enumerate(self._rows):
            if not row.switched:
                continue
            row.switched, self._run = False, None
            (edits,) = _residual([row.edits])
            try:
                self._session.change(place, edits, follower(self.tokenizer, edits, row.request.ids), row.tokens)
            except TrimtabError as error:
                told = [GenerationResponse(row.key, error=error) if one.key == row.key else one for one in told]
        return told

    def _logits(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The last column's, `[rows, vocabulary]`, in float32."""
        inputs = compat.with_cache(self.model, {"input_ids": ids, "attention_mask": mask}, cache)
        if cache is self._cache and compat.is_state_alone(cache):
            del inputs["attention_mask"]  # which has a column for each token before
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        with self._watch.open(len(ids)):
            output = self.model(**inputs, use_cache=True, return_dict=True)
        return output.logits[:, -1].to(dtype=torch.float32, device=self.device)

    def _choose(
        self, rows: Sequence[_Row], logits: Tensor, sampler: BatchSampler, which: Sequence[int] | None = None
    ) -> _Chosen:
        """A token for each of these rows, and what is told of it. The host waits for the device once, here.

        `which` of the last pass's rows these are, where they aren't all of them, in order.
        """
        tokens = sampler.choose(logits)
        told = [tokens[:, None].float(), logits.amax(-1, keepdim=True)]  # of numbers and a NaN, the NaN is the largest
        asked = [row.request.alternatives for row in rows]
        most = min(max((n for n in asked if n is not None), default=0), logits.shape[-1])
        if any(n is not None for n in asked):
            logprobs = logits.log_softmax(-1)
            told.append(logprobs.gather(-1, tokens[:, None]))
            if most:
                values, ids = logprobs.topk(most)
                told += [ids.float(), values]
        watched = self._watch.values
        if watched is not None:
            values = watched if which is None else watched[list(which)]
            told.append(values.to(device=logits.device, dtype=torch.float32))
        # whole numbers below 2 ** 24, as ids are, are exact in float32
        facts = torch.cat(told, -1).tolist()
        found = [self._tell(row, fact, most) for row, fact in zip(rows, facts, strict=True)]
        return _Chosen(tokens, found)

    def _tell(self, row: _Row, fact: Sequence[float], most: int) -> GenerationResponse:
        """What came of a row: its token, the greatest logit, the token's log-probability, the likeliest and theirs."""
        assert row.sampler is not None
        if not abs(fact[1]) < float("inf") and (self.strict or row.sampler.settings.sampled):
            error = TrimtabError(
                "the model's logits are no numbers any more: it was steered too hard, lower the strength"
            )
            return GenerationResponse(row.key, error=error)
        token = int(fact[0])
        monitored, fired = self._hear(row, fact)
        names = tuple(one.name for one in fired)
        if any(one.action == "stop" for one in fired):
            return GenerationResponse(row.key, finish=FILTERED, cached=row.cached, monitored=monitored, fired=names)
        heard: dict[str, Any] = {"cached": row.cached, "monitored": monitored, "fired": names}
        row.tokens.append(token)
        finish = "stop" if token in self.ends else "length" if len(row.tokens) >= row.request.max_new_tokens else None
        if (matcher := row.sampler.matcher) is not None:
            try:
                matcher.take(token)
            except TrimtabError as error:
                return GenerationResponse(row.key, error=error)
            finish = "stop" if matcher.done else finish
        if row.request.alternatives is None:
            return GenerationResponse(row.key, token, finish=finish, **heard)
        likeliest = tuple(zip(map(int, fact[3 : 3 + most]), fact[3 + most : 3 + 2 * most], strict=True))
        return GenerationResponse(row.key, token, fact[2], likeliest[: row.request.alternatives], finish, **heard)

    def _hear(self, row: _Row, fact: Sequence[float]) -> tuple[tuple[float, ...], tuple[Monitor, ...]]:
        """What a row's monitors have read of its newest token, and which of them fire; what they switch on is noted."""
        monitors = row.request.monitors
        if not monitors:
            return (), ()
        read = fact[len(fact) - len(self._watch.conditions) :]
        values = tuple(read[i] for i in self._watch.columns(monitors))
        fired = row.log.add(monitors, values)
        for one in fired:
            if one.steering is not None:
                edits, names = switched_on(one, len(row.request.ids))
                row.edits, row.names, row.switched = (*row.edits, *edits), (*row.names, *names), True
        return values, fired

    def _without_the_done(self, told: list[GenerationResponse]) -> list[GenerationResponse]:
        done = {one.key for one in told if one.finish or one.error}
        if not done:
            return told
        left: dict[int, Applied] = {}
        failed = {one.key for one in told if one.error}
        for place, row in reversed(list(enumerate(self._rows))):
            if row.key in done:
                if self.on_end is not None and row.key not in failed:
                    self.on_end(self, place)
                self._take_out(place)
                left[row.key] = _applied(row)
        return [_with(one, left.get(one.key)) for one in told]

    def _take_out(self, place: int) -> None:
        """The cache puts its last row in the place of one that leaves; so do the session and the list."""
        self._run = None
        self._rows[place].add(self._session.remove(place))
        self._cache.remove(place)
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last

    # ---- rows that join ----------------------------------------------------------------------------------

    def _admitted(self) -> list[_Row]:
        """The first of those that wait, as many as fit into one pass."""
        taken: list[_Row] = []
        widest, texts = 0, set()
        for row in (row for row in self._waiting if len(row.request.ids) <= CHUNK):
            texts.add((row.request.ids, row.request.steering))
            widest = max(widest, len(row.request.ids))
            if taken and widest * len(texts) > PREFILL:
                break
            taken.append(row)
        self._waiting = [row for row in self._waiting if row not in taken]
        return taken

    def _read_chunk(self) -> list[GenerationResponse]:
        """Read some more of a long prompt; its rows join, and have their first tokens, when all of it is read."""
        if self._long is None:
            first = next((row.request for row in self._waiting if len(row.request.ids) > CHUNK), None)
            if first is None:
                return []
            rows = [row for row in self._waiting if row.request.text == first.text]
            self._waiting = [row for row in self._waiting if row not in rows]
            self._long = rows, self._prefill(first)
        rows, prefill = self._long
        self._watch.of(row.request.monitors for row in rows)
        try:
            if (logits := prefill.advance()) is None:
                return []
            self._long = None
            return self._seat_read(rows, prefill, logits)
        except (TrimtabError, RuntimeError) as error:
            self._long = None
            return [GenerationResponse(row.key, error=error) for row in rows]

    def _prefill(self, request: GenerationRequest) -> ChunkedPrefill:
        return ChunkedPrefill(self.model, self.layout, request.ids, request.steering, self._logits, self.device)

    def _seat_read(self, rows: list[_Row], prefill: ChunkedPrefill, logits: Tensor) -> list[GenerationResponse]:
        """Rows whose one prompt was read in chunks join the batch."""
        read = [prefill.edits], [prefill.names], [prefill.tally()], logits, prefill.cache
        return self._seat(rows, [0] * len(rows), *read)

    def _read_in(self, rows: list[_Row]) -> list[GenerationResponse]:
        """Read prompts of rows that join, and give their first tokens. One that can't be read keeps no other out."""
        if not rows:
            return []
        try:
            return self._read_together(rows)
        except (TrimtabError, RuntimeError) as error:
            if len(rows) == 1:
                return [GenerationResponse(rows[0].key, error=error)]
            for row in rows:
                row.tokens, row.pushed, row.log = [], {}, Log()
            return [told for row in rows for told in self._read_in([row])]

    def _read_together(self, rows: list[_Row]) -> list[GenerationResponse]:
        asked = [(row.request.ids, row.request.steering) for row in rows]
        texts = list(dict.fromkeys(asked))
        prompts = [list(ids) for ids, _ in texts]
        width = max(map(len, prompts))
        self._watch.of(row.request.monitors for row in rows)
        cache = compat.whole_cache(self.model.config)
        inputs = (*self._padded(prompts), cache)
        steerings, lengths = [steering for _, steering in texts], [len(prompt) for prompt in prompts]
        if decides_at_prefill(self.layout, steerings, lengths, {}):
            prefill = Prefill(self.model, self.layout, steerings, lengths)
            edits, names = prefill.edits, prefill.names  # from the pass on
            session = Session(self.model, self.layout, prefill.decide)
            session.expect(lengths, width)
            with prefill.watching(session), session.hooked(prefill.sites):
                logits = self._logits(*inputs)
            session.check_reached(width)
        else:
            resolved = resolve(steerings, lengths, reader(self.layout, prompts))
            edits, names = resolved.edits, resolved.names
            session = Session(self.model, self.layout, lambda *_: _residual(edits))
            session.expect(lengths, width)
            scored = [Row(_scores(one), n, width - n) for one, n in zip(edits, lengths, strict=True)]
            with self._steering(session, _sites(edits), self._compiled(scored, width), lambda: width):
                logits = self._logits(*inputs)
            session.check_reached(width)
        which = [texts.index(one) for one in asked]
        tallies = [session.tally(text) for text in range(len(texts))]
        return self._seat(rows, which, edits, names, tallies, logits, cache)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and positions `[prompts, columns]` of prompts that are padded on the left."""
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        rows = [[self.pad] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        seen = [[0] * pad + [1] * (width - pad) for pad in pads]
        ids, mask = torch.tensor(rows, device=self.device), torch.tensor(seen, device=self.device)
        return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)

    def _seat(
        self,
        rows: list[_Row],
        which: list[int],
        edits: Sequence[tuple[Edit, ...]] | Mapping[int, tuple[Edit, ...]],
        names: Sequence[tuple[str, ...]] | Mapping[int, tuple[str, ...]],
        tallies: Sequence[Tally] | Mapping[int, Tally],
        logits: Tensor,
        cache: DynamicCache,
    ) -> list[GenerationResponse]:
        """Rows whose prompts are read join the batch. `which` of the texts that were read is each row's."""
        for row, text in zip(rows, which, strict=True):
            row.edits, row.names = edits[text], names[text]
            row.sampler = self._row_sampler(row.request)
            row.add(tallies[text])
        told = self._choose(rows, logits[which], self._sampler(rows), which).told
        done = {one.key for one in told if one.finish or one.error}
        staying = [(row, text) for row, text in zip(rows, which, strict=True) if row.key not in done]
        if staying:
            self._run = None
            self._cache.insert(cache, [(text, len(row.request.ids)) for row, text in staying])
            for row, text in staying:
                (before,), ids = _residual([edits[text]]), row.request.ids
                self._session.insert(before, len(ids), follower(self.tokenizer, before, ids), row.tokens[-1])
                self._rows.append(row)
            told = self._without_the_done(self._switch_on(told))
        applied = {row.key: _applied(row) for row in rows if row.key in done}
        return [_with(one, applied.get(one.key, one.applied)) for one in told]

    def _row_sampler(self, request: GenerationRequest) -> RowSampler:
        sampling, settings = request.sampling, request.settings
        if settings is None:
            plain = replace(sampling, seed=None)
            settings = self._settings.get(plain)
            if settings is None:
                options = {**PLAIN, **sampling.options} if sampling.greedy else sampling.options
                settings = Settings.of(self.model, options, len(request.ids), self.device)
                if not settings.others:  # these may depend on the prompt
                    self._settings[plain] = settings
        matcher = None if request.matcher is None else request.matcher.copy()
        return RowSampler(settings, sampling.seed, request.max_new_tokens, matcher)

    def _sampler(self, rows: Sequence[_Row]) -> BatchSampler:
        samplers = [row.sampler for row in rows if row.sampler is not None]
        return BatchSampler(samplers, [row.request.ids for row in rows], [row.tokens for row in rows], self.device)

    def _compiled(self, scored: Sequence[Row], width: int) -> dict[int, LayerScores]:
        """What each layer does to the attention scores of these rows; nothing where none is edited."""
        if not any(row.edits for row in scored):
            return {}
        return compile_scores(scored, width, head_count(self.layout), torch.device("cpu"))

    @contextmanager
    def _steering(
        self,
        session: Session,
        sites: Sequence[Site],
        scores: dict[int, LayerScores],
        columns: Callable[[], int],
        padded: bool = False,
    ) -> Iterator[None]:
        """Hooks at these sites for a pass of rows; `scores` is what is done to attention scores."""
        with session.hooked(sites):
            if scores:
                with steered_scores(self.layout, scores, columns, self._masks.of(padded)):
                    yield
            else:
                with self._masks.open(padded):
                    yield


@dataclass(frozen=True)
class _Chosen:
    """A step's tokens on the device, `[rows]`, and what is told of them."""

    tokens: Tensor
    told: list[GenerationResponse]


class _Decoding:
    """What the batch's steps need for as long as its rows stay the same: it is put on the device once.

    `ids` and `positions` `[rows]` are those of the tokens that the next step reads.
    """

    def __init__(self, batch: GenerationBatch) -> None:
        rows, cache, device = batch._rows, batch._cache, batch.device
        self.batch = batch
        self.width = cache.width
        pads = [self.width - length for length in cache.lengths]
        scored = [Row(_scores(row.edits), len(row.request.ids), pad) for row, pad in zip(rows, pads, strict=True)]
        self.scores = batch._compiled(scored, self.width)
        self.sampler = batch._sampler(rows)
        self.ids = torch.tensor([row.newest for row in rows], device=device)
        self.positions = torch.tensor([row.length - 1 for row in rows], device=device)
        self._pads = torch.tensor(pads, device=device)[:, None] if any(pads) else None

    def mask(self, width: int) -> Tensor | None:
        """`[rows, width]`: 1 where a row has a token; `None` where all have."""
        if self._pads is None:
            return None
        return (torch.arange(width, device=self._pads.device)[None] >= self._pads).long()

    def advance(self, tokens: Tensor) -> None:
        """The next step reads these."""
        self.ids, self.positions = tokens, self.positions + 1

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hooks and attention for one step."""
        batch, columns = self.batch, self.batch._cache.width + 1
        padded = self._pads is not None
        with batch._steering(batch._session, batch._session.sites, self.scores, lambda: columns, padded):
            yield


def _residual(edits: Sequence[tuple[Edit, ...]]) -> list[tuple[Edit, ...]]:
    return [tuple(edit for edit in one if not is_score_edit(edit)) for one in edits]


def _scores(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    return tuple(edit for edit in edits if is_score_edit(edit))


def _sites(edits: Sequence[tuple[Edit, ...]]) -> list[Site]:
    return sorted({edit.site for one in edits for edit in one if not is_score_edit(edit)})


def _applied(row: _Row, more: Tally | None = None) -> Applied:
    both = _Row(row.key, row.request, pushed=dict(row.pushed))
    both.add(more or {})
    return Applied(row.names, doses_of(both.pushed))


def _with(told: GenerationResponse, applied: Applied | None) -> GenerationResponse:
    return replace(told, applied=applied)
