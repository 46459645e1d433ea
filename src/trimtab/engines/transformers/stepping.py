"""A batch that is decoded step by step: rows join and leave between any two tokens, each with its own steering.

A step gives each row one token. Rows that join are read together in one pass of their own (rows of the same prompt
and edits once), give their first token, and take their place in the batch; a row that is done has left it before the
step is over. What a row gets is what `lm.generate` gives it alone: its pads are masked, its positions are its own,
and its steering is its row of the banks.

Additions, projections, gates and the like run here, and edits of attention scores too. Rejection doesn't: its rungs
need a loop of their own (see `rejecting`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import positions_of
from trimtab.engines.transformers.attention import head_count, steered_scores
from trimtab.engines.transformers.columns import Columns
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.deciding import check_prompt, conditionals, decided, read_gates, wanted
from trimtab.engines.transformers.exclusive import reading
from trimtab.engines.transformers.generate import Applied, _end_ids, _pad_id, check_request
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.prefill import Prefill, decides_at_prefill
from trimtab.engines.transformers.sampling import GREEDY, Chooser, Sampling
from trimtab.engines.transformers.scores import Row, compile_scores, is_score_edit
from trimtab.engines.transformers.session import Session, Tally, doses_of
from trimtab.engines.transformers.settle import read_prompts, settle
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site, Steering

PREFILL = 2048
"""Tokens, pads included, that one step reads of prompts at most (or one prompt), so that others don't wait for long."""


def check_steps(layout: Layout) -> None:
    """Raises `UnsupportedError` for a model whose rows can't join and leave a running batch."""
    name = type(layout.decoder).__name__
    try:
        compat.check_common_cache(layout.decoder)
        compat.whole_cache(layout.decoder.config)
    except UnsupportedError as error:
        raise UnsupportedError(f"rows of {name} can't share a batch of steps: {error}") from None
    counted = positions_of(layout)
    if not counted.ignores_pads or ("position_ids" in compat.parameters(layout.decoder) and not counted.given):
        raise UnsupportedError(
            f"{name} counts pads as positions, or from elsewhere than 0, so that its rows can't share a batch of steps"
        )


@dataclass(frozen=True)
class Asked:
    """What one row is to be: a rendered prompt, its steering, how its tokens are chosen, and how many at most.

    `alternatives`: how many of the likeliest tokens are told at each place; `None` tells no log-probabilities.
    """

    ids: tuple[int, ...]
    steering: Steering | None = None
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    alternatives: int | None = None


@dataclass(frozen=True)
class Told:
    """One token of one row. `finish` is `"stop"` or `"length"` with its last, and `applied` then what steered it.

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


@dataclass
class _Row:
    key: int
    asked: Asked
    edits: tuple[Edit, ...] = ()
    names: tuple[str, ...] = ()
    chooser: Chooser | None = None
    tokens: list[int] = field(default_factory=list)
    pushed: Tally = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.asked.ids) + len(self.tokens)

    def add(self, more: Tally) -> None:
        for site, (total, measured, tokens) in more.items():
            before = self.pushed.get(site, (0.0, 0.0, 0))
            self.pushed[site] = (before[0] + total, before[1] + measured, before[2] + tokens)


class Stepper:
    """The batch. `join` and `leave` at any time between steps; `step` gives every row its next token.

    It isn't for several threads at once, and nothing else may steer the model during a step. `strict`: a row whose
    logits are no numbers any more leaves with an error; otherwise it goes on as in `lm.generate`, with some token.
    """

    def __init__(self, model: Any, tokenizer: Any, layout: Layout, *, strict: bool = True) -> None:
        check_steps(layout)
        self.model = model
        self.layout = layout
        self.strict = strict
        self.ends = _end_ids(model, {})
        self.pad = _pad_id(model, tokenizer)
        self.device = model.get_input_embeddings().weight.device
        self._takes = compat.parameters(model)
        self._next = 0
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []  # in the order of the cache's
        self._cache = Columns()
        self._run: _Decoding | None = None

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting)

    @property
    def running(self) -> int:
        """How many rows are in the batch, those that wait to be read not included."""
        return len(self._rows)

    def check(self, asked: Asked) -> None:
        """Raises `TrimtabError` for a row that can't run: too long, or steered where its prompt has no token."""
        check_request(self.layout, [len(asked.ids)], asked.max_new_tokens, {})
        for edit in asked.steering.edits if asked.steering else ():
            edit.positions.resolve(len(asked.ids))
        check_prompt(asked.steering, len(asked.ids))

    def join(self, asked: Asked) -> int:
        """A row, for the next step; its key. `lm.check(steering)` is the caller's. Raises as `check` does."""
        self.check(asked)
        self._next += 1
        self._waiting.append(_Row(self._next, asked))
        return self._next

    def leave(self, key: int) -> Applied | None:
        """Take a row out, and say what steered it so far; `None` where there is no such row any more."""
        for row in self._waiting:
            if row.key == key:
                self._waiting.remove(row)
                return Applied((), ())
        for place, row in enumerate(self._rows):
            if row.key == key:
                self._settle_doses()
                self._remove(place)
                return _applied(row)
        return None

    def applied(self, key: int) -> Applied | None:
        """What has steered a row so far; `None` where there is no such row in the batch."""
        for place, row in enumerate(self._rows):
            if row.key == key:
                return _applied(row, {} if self._run is None else self._run.session.tally(place))
        return None

    def clear(self) -> list[int]:
        """Everybody leaves; their keys."""
        keys = [row.key for row in (*self._rows, *self._waiting)]
        self._rows, self._waiting, self._cache, self._run = [], [], Columns(), None
        return keys

    @torch.no_grad()
    def step(self) -> list[Told]:
        """One token for each row, rows that have just joined included."""
        with reading(self.layout.decoder):
            told = self._decode() if self._rows else []
            if self._waiting:
                told += self._read_in(self._admitted())
        return told

    # ---- rows that are in the batch ----------------------------------------------------------------------

    def _decode(self) -> list[Told]:
        cache = self._cache
        if self._run is None:
            self._run = _Decoding(self)
        cache.open_column()
        columns = cache.width + 1
        ids = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self.device)
        mask = cache.mask(self.device, 1)
        positions = torch.tensor([[row.length - 1] for row in self._rows], device=self.device)
        with self._run.open():
            logits = self._logits(ids, mask, positions, cache)
        self._run.session.check_reached(columns)
        cache.close_column()
        return self._choose(self._rows, logits)

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """The last column's, `[rows, vocabulary]`, in float32."""
        inputs = compat.with_cache(self.model, {"input_ids": ids, "attention_mask": mask}, cache)
        if cache is self._cache and compat.is_state_alone(cache):
            del inputs["attention_mask"]  # which has a column for each token before
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        output = self.model(**inputs, use_cache=True, return_dict=True)
        return output.logits[:, -1].to(dtype=torch.float32, device=self.device)

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[Told]:
        """A token for each of these rows; those that are done, or can't go on, have left when it returns."""
        best, greedy = (x.tolist() for x in logits.max(-1))  # a NaN is the largest of all
        told = []
        for place, row in enumerate(rows):
            if self.strict and not abs(best[place]) < float("inf"):
                error = TrimtabError(
                    "the model's logits are no numbers any more: it was steered too hard, lower the strength"
                )
                told.append(Told(row.key, error=error))
                continue
            assert row.chooser is not None
            if row.chooser.plain:
                token = greedy[place]
            else:
                ids = torch.tensor([[*row.asked.ids, *row.tokens]], device=self.device)
                token = row.chooser.choose(ids, logits[place : place + 1])
            row.tokens.append(token)
            finish = "stop" if token in self.ends else "length" if len(row.tokens) >= row.asked.max_new_tokens else None
            told.append(Told(row.key, token, *_logprobs(logits[place], token, row.asked.alternatives), finish))
        return told if rows is not self._rows else self._without_the_done(told)

    def _without_the_done(self, told: list[Told]) -> list[Told]:
        done = {one.key for one in told if one.finish or one.error}
        if not done:
            return told
        self._settle_doses()
        left = {row.key: _applied(row) for row in self._rows if row.key in done}
        for place in reversed(range(len(self._rows))):
            if self._rows[place].key in done:
                self._remove(place)
        return [_with(one, left.get(one.key)) for one in told]

    def _remove(self, place: int) -> None:
        """The cache puts its last row in the place of one that leaves, and so does the list."""
        self._cache.drop(place)
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last

    def _settle_doses(self) -> None:
        """The batch is about to change: keep what was measured."""
        if self._run is not None:
            for place, row in enumerate(self._rows):
                row.add(self._run.session.tally(place))
            self._run = None

    # ---- rows that join ----------------------------------------------------------------------------------

    def _admitted(self) -> list[_Row]:
        """The first of those that wait, as many as fit into one pass."""
        taken: list[_Row] = []
        widest, texts = 0, set()
        for row in self._waiting:
            texts.add((row.asked.ids, row.asked.steering))
            widest = max(widest, len(row.asked.ids))
            if taken and widest * len(texts) > PREFILL:
                break
            taken.append(row)
        self._waiting = self._waiting[len(taken) :]
        return taken

    def _read_in(self, rows: list[_Row]) -> list[Told]:
        """Read prompts of rows that join, and give their first tokens. One that can't be read keeps no other out."""
        try:
            return self._read_together(rows)
        except (TrimtabError, RuntimeError) as error:
            if len(rows) == 1:
                return [Told(rows[0].key, error=error)]
            for row in rows:
                row.tokens, row.pushed = [], {}
            return [told for row in rows for told in self._read_in([row])]

    def _read_together(self, rows: list[_Row]) -> list[Told]:
        asked = [(row.asked.ids, row.asked.steering) for row in rows]
        texts = list(dict.fromkeys(asked))
        prompts = [list(ids) for ids, _ in texts]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        cache = compat.whole_cache(self.model.config)
        inputs = ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache
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
            readings = read_gates(self.layout, prompts, [wanted(steering) for steering in steerings])
            acting = [decided(steering, found) for steering, found in zip(steerings, readings, strict=True)]
            names = [tuple(str(edit) for edit in one) for one in acting]
            edits = conditionals(settle(acting, read_prompts(self.layout, prompts)))
            session = Session(self.model, self.layout, lambda *_: _residual(edits))
            session.expect(lengths, width)
            scored = [Row(_scores(one), n, width - n) for one, n in zip(edits, lengths, strict=True)]
            with self._steering(session, edits, scored, width, lambda: width):
                logits = self._logits(*inputs)
            session.check_reached(width)
        which = [texts.index(one) for one in asked]
        for row, text in zip(rows, which, strict=True):
            row.edits, row.names = edits[text], names[text]
            row.chooser = Chooser(self.model, row.asked.sampling, len(row.asked.ids), self.device)
            row.add(session.tally(text))
        told = self._choose(rows, logits[which])
        done = {one.key for one in told if one.finish or one.error}
        staying = [(row, text) for row, text in zip(rows, which, strict=True) if row.key not in done]
        if staying:
            self._settle_doses()
            self._cache.adopt(cache, [(text, len(row.asked.ids)) for row, text in staying])
            self._rows += [row for row, _ in staying]
        applied = {row.key: _applied(row) for row in rows if row.key in done}
        return [_with(one, applied.get(one.key)) for one in told]

    @contextmanager
    def _steering(
        self, session: Session, edits: Sequence[tuple[Edit, ...]], scored: Sequence[Row], width: int, columns: Any
    ) -> Iterator[None]:
        """Hooks for a pass of rows with these edits; `scored` are their edits of attention scores."""
        with session.hooked(_sites(edits)):
            if not any(row.edits for row in scored):
                yield
                return
            layers = compile_scores(scored, width, head_count(self.layout), self.device)
            with steered_scores(self.layout, layers, columns):
                yield


class _Decoding:
    """What steers the batch's steps for as long as its rows stay the same."""

    def __init__(self, batch: Stepper) -> None:
        self.batch = batch
        self.edits = [row.edits for row in batch._rows]
        self.session = Session(batch.model, batch.layout, lambda *_: _residual(self.edits))
        self.width = batch._cache.width
        pads = [self.width - length for length in batch._cache.lengths]
        self.session.expect([len(row.asked.ids) for row in batch._rows], resumed=True, pads=pads)
        self.scored = [
            Row(_scores(row.edits), len(row.asked.ids), self.width - length)
            for row, length in zip(batch._rows, batch._cache.lengths, strict=True)
        ]

    def open(self) -> Any:
        """Hooks and attention for one step."""
        columns = self.batch._cache.width + 1
        return self.batch._steering(self.session, self.edits, self.scored, self.width, lambda: columns)


def _residual(edits: Sequence[tuple[Edit, ...]]) -> list[tuple[Edit, ...]]:
    return [tuple(edit for edit in one if not is_score_edit(edit)) for one in edits]


def _scores(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    return tuple(edit for edit in edits if is_score_edit(edit))


def _sites(edits: Sequence[tuple[Edit, ...]]) -> list[Site]:
    return sorted({edit.site for one in edits for edit in one if not is_score_edit(edit)})


def _applied(row: _Row, more: Tally | None = None) -> Applied:
    both = _Row(row.key, row.asked, pushed=dict(row.pushed))
    both.add(more or {})
    return Applied(row.names, doses_of(both.pushed))


def _with(told: Told, applied: Applied | None) -> Told:
    return Told(told.key, told.token, told.logprob, told.likeliest, told.finish, applied, told.error)


def _logprobs(
    logits: Tensor, token: int, alternatives: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The token's log-probability, and the likeliest tokens'."""
    if alternatives is None:
        return None, ()
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, len(logprobs)))
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
