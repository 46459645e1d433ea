"""The decoding loop with rejection, for transformers' `generate(custom_generate=…)`.

The raw stream is decoded as ever, with the model's own attention. Where its gate opens, the rungs of the ladder are
computed as rows over its cache (see `rows`), and the first plausible one gives the token. As the cache is always the
raw one, each decision depends on the text so far and on nothing else, and schedules differ only in their speed:

    optimistic   the raw pass; then, if a gate is open, all rungs in one pass, which is the next step's raw pass too:
                 unsteered rows of the token after go with it, for the raw model's two best tokens, one of which is
                 mostly taken. Where rows cost something: on CPUs
    fused        the raw token and all rungs in one pass each step. Where rows cost next to nothing: on GPUs
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.decoding.rejection import Rejection, ladder, plausible_set
from trimtab.decoding.trace import Step, Trace
from trimtab.engines.meanings import NOTHING, Followed, Follower, Holding, follower, meanings_of
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.forks import Forks
from trimtab.engines.transformers.judging import Asked, Chosen, Judged, Raw, judge, read_raw
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.ranked import rank_layers
from trimtab.engines.transformers.raw_cache import Guesses, RawCache
from trimtab.engines.transformers.rows import Rows, Token, Versions, compile_versions
from trimtab.engines.transformers.scores import is_score_edit
from trimtab.engines.transformers.sharing import rows_for
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Site

GUESSES = 2
"""How many tokens `optimistic` guesses where a gate is open, and takes along in the pass of the rungs."""

REFUSED = {
    "num_beams": "beams share no cache; decode greedily or sample",
    "prompt_lookup_num_tokens": "drafts aren't checked for plausibility",
    "cache_implementation": "rows need the default cache",
    **dict.fromkeys(compat.CACHE_NAMES, "rows need a cache of their own"),
    "use_cache": "rows need the cache",
    "custom_generate": "the loop is trimtab's own",
    "prefill_chunk_size": "the last prompt token's own pass is needed whole",
}


Found = dict[tuple[int, int], Tensor]
"""The logits `[vocabulary]` of a request's rung."""


@dataclass(frozen=True)
class Request:
    """One prompt of a batch: its length, the edits in force, and how they are rejected (`None`: nothing is steered)."""

    prompt_length: int
    edits: tuple[Edit, ...]
    rejection: Rejection | None


@dataclass
class _Stream:
    """One row of the batch: which versions its rungs are, and its steps so far."""

    versions: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    steps: list[Step] = field(default_factory=list)
    text: Follower | None = None  # where the edits ask what is generated
    at: Followed | None = None  # where that is

    @property
    def holding(self) -> Holding:
        """The meanings of the newest token."""
        return NOTHING if self.at is None else self.at.holding

    def read(self, token: int) -> None:
        """This token is the newest."""
        if self.text is not None:
            self.at = self.text.after(self.at or self.text.start, token)


def check_rejection(requests: Sequence[Request], options: dict[str, Any]) -> None:
    """Raises `TrimtabError` for what can't run with rejection; without a request there is nothing to refuse."""
    if not requests:
        return
    for name, why in REFUSED.items():
        if options.get(name) not in (None, 1) and not (name == "use_cache" and options[name] is True):
            raise TrimtabError(f"rejection can't run with {name}: {why}")
    for request in requests:
        for edit in request.edits:
            if not is_score_edit(edit) and not _reaches_decoding(edit, request.prompt_length):
                raise UnsupportedError(
                    f"rejection steers the token that is being decoded, and {edit} acts on the prompt alone"
                )
    schedules = {r.rejection.schedule for r in requests if r.rejection is not None}
    if len(schedules) > 1:
        raise TrimtabError(f"one batch has one schedule, not {', '.join(sorted(schedules))}")


def schedule_for(layout: Layout) -> str:
    """What `auto` is: by the device, and not by trying, so that every run on a machine rounds alike."""
    return "optimistic" if input_device(layout.decoder).type == "cpu" else "fused"


def _reaches_decoding(edit: Edit, prompt_length: int) -> bool:
    spans = edit.positions.reach(prompt_length)
    return any(stop is None or stop >= prompt_length for _, stop in spans)


class RejectingLoop:
    """Decodes one batch. `open()` around `model.generate(custom_generate=loop.decode)`; then `traces()`."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        requests: Sequence[Request],
        streamer: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.requests = list(requests)
        self.rows: Any = rows_for(model, layout)
        self.streamer = streamer  # transformers keeps it from a custom_generate
        self.streams: list[_Stream] = []
        asked = next((r.rejection.schedule for r in requests if r.rejection is not None), "auto")
        self.schedule = schedule_for(layout) if asked == "auto" else asked
        self.passes = 0
        self.first = 0.0
        self._began = 0.0
        self._filler: int | None = None  # what ended rows go on with; without it, with their best token
        self._guessing = 0  # how many guesses of the next step's raw row a pass of this one's rungs takes along
        self._guessed: tuple[Guesses, Tensor] | None = None  # these, and their logits

    @contextmanager
    def open(self) -> Iterator[None]:
        """The hooks and the attention that rows need, for as long as the context is open."""
        self._began = time.perf_counter()
        with ExitStack() as self._opened:
            self._opened.enter_context(self.rows.open(self._sites()))
            yield

    def _sites(self) -> list[Site]:
        return sorted({e.site for r in self.requests for e in r.edits if not is_score_edit(e)})

    def _fork(self) -> None:
        """Let rows go over copies of the cache, from before the first token on."""
        self._opened.close()
        self.rows = Forks(self.model, self.layout)
        self._opened.enter_context(self.rows.open(self._sites()))

    def traces(self) -> list[Trace]:
        """What happened in each row of the batch, one step a token (those after a row's end included)."""
        found = []
        for stream, request in zip(self.streams, self._spread(self.requests), strict=True):
            rungs: tuple[str, ...] = ()
            if request.rejection is not None and request.edits:
                rungs = tuple(_describe(edits) for edits in ladder(request.edits, request.rejection, stream.order))
            found.append(Trace(tuple(stream.steps), rungs, stream.order, self.schedule, self.passes, self.first))
        return found

    def _spread(self, each: Sequence[Any]) -> list[Any]:
        repeat = len(self.streams) // len(each)
        return [one for one in each for _ in range(repeat)]

    # ---- the loop ----------------------------------------------------------------------------------------

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Transformers' own greedy or sampling loop, with the choice of each token put in between."""
        if synced_gpus:
            raise UnsupportedError("rejection can't run with synced_gpus")
        config = generation_config
        streamer = self.streamer if streamer is None else streamer
        told = compat.first_inputs(model, input_ids, model_kwargs).get("position_ids")
        if isinstance(self.rows, Rows) and told is None:
            self._fork()
        cache = self.rows.start(model, model_kwargs)
        model_kwargs = compat.put_cache(model_kwargs, cache)
        count = len(input_ids)
        self.streams = [_Stream() for _ in range(count)]
        unfinished = torch.ones(count, dtype=torch.long, device=input_ids.device)
        ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        pad = compat.pad_token(config)
        self._filler = int(pad) if ends else None
        going = [True] * count  # which rows are unfinished
        logits: tuple[Tensor, ...] = ()

        inputs = compat.first_inputs(model, input_ids, model_kwargs)
        output, token = self.rows.read(inputs)
        self.rows.check_cached(cache, input_ids.shape[1])
        raw = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        model_kwargs = compat.after_pass(model, model_kwargs, output)
        del output, inputs
        steer = self._prepare(token, cache, input_ids.shape[1])
        self._follow(input_ids)
        betas = [r.rejection.beta if r.rejection is not None else 1.0 for r in self._spread(self.requests)]
        asked = Asked.of(betas, [len(stream.versions) for stream in self.streams], input_ids.device)
        ahead: Found = {}
        shares = isinstance(self.rows, Rows)
        fused = shares and self.schedule == "fused"
        while True:
            self.rows.check_cached(cache, input_ids.shape[1])
            last = input_ids.shape[1] + 1 >= config.max_length
            self._guessed = None
            self._guessing = 0 if last or fused or steer is None or not shares else GUESSES
            chosen = self._choose(
                input_ids, token, cache, raw, ahead, steer, asked, going, logits_processor, config.do_sample
            )
            next_tokens = chosen.choice
            if config.return_dict_in_generate and config.output_logits:
                logits += (chosen.used,)
            if ends:
                next_tokens = next_tokens * unfinished + pad.to(next_tokens.device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
            if streamer is not None:
                streamer.put(next_tokens.cpu())
            if not self.first:
                self.first = time.perf_counter() - self._began
            fed = [
                one if alive or self._filler is None else self._filler
                for one, alive in zip(chosen.tokens, going, strict=True)
            ]
            for stream, one in zip(self.streams, fed, strict=True):
                stream.read(one)
            unfinished = unfinished & ~stopping_criteria(input_ids, ())
            going = [bool(alive) for alive in unfinished.tolist()]
            if not any(going):
                break
            inputs = compat.next_inputs(model, input_ids, model_kwargs)
            ahead = {}
            guessed = self._come_true(cache, fed)
            if guessed is not None or (fused and steer is not None):
                token = Token.of(inputs)
            if guessed is not None:
                raw = guessed
                model_kwargs = compat.after_skipped_pass(model, model_kwargs, cache)
            elif fused and steer is not None:
                self.passes += 1
                raw, ahead = self._fused(token, cache, input_ids.shape[1], steer, going)
                model_kwargs = compat.after_skipped_pass(model, model_kwargs, cache)
            else:
                self.passes += 1
                output, token = self.rows.read(inputs)
                raw = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
                model_kwargs = compat.after_pass(model, model_kwargs, output)
                del output
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        return compat.generated(input_ids, logits or None, cache)

    def _choose(
        self,
        input_ids: Tensor,
        token: Token,
        cache: RawCache,
        logits: Tensor,
        ahead: Found,
        steer: Versions | None,
        asked: Asked,
        going: list[bool],
        processor: Any,
        sample: bool,
    ) -> Chosen:
        """The next token of each row. The host waits once for what the unsteered model says; once for rungs."""
        scores = processor(input_ids, logits.clone()) if len(processor) else logits
        raw = read_raw(logits, scores, asked, going, self._guessing)
        chosen = Chosen.best_of(raw)
        if steer is not None and any(raw.opened):
            chosen = self._rungs(input_ids, token, cache, raw, ahead, steer, going, processor)
        if sample:
            allowed = plausible_set(raw.scores, raw.tau) | ~asked.steered[:, None]
            probabilities = chosen.final.masked_fill(~allowed, -torch.inf).softmax(-1)
            chosen.choice = torch.multinomial(probabilities, 1)[:, 0]
            chosen.tokens = chosen.choice.tolist()
        for b, stream in enumerate(self.streams):
            other = raw.tokens[b] if chosen.tokens[b] != raw.tokens[b] else None
            stream.steps.append(Step(raw.opened[b], chosen.rungs[b], other))
        return chosen

    def _rungs(
        self,
        input_ids: Tensor,
        token: Token,
        cache: RawCache,
        raw: Raw,
        ahead: Found,
        steer: Versions,
        going: list[bool],
        processor: Any,
    ) -> Chosen:
        """The tokens of all rows, where for those whose gate is open the first plausible rung decides."""
        waiting = [b for b, is_open in enumerate(raw.opened) if is_open]
        chosen = Chosen.best_of(raw).copy()
        found = dict(ahead)
        judged: dict[tuple[int, int], Judged] = {}
        for r in range(max(len(self.streams[b].versions) for b in waiting)):
            here = [b for b in waiting if r < len(self.streams[b].versions)]
            if not here:
                break
            if (here[0], r) not in found:
                asked = [(b, n) for b in here for n in range(r, len(self.streams[b].versions))]
                versions = [self.streams[b].versions[n] for b, n in asked]
                guesses = self._guess(raw, going) if self._guessing else None
                self.passes += 1
                rows = self.rows.run(
                    token,
                    cache,
                    input_ids.shape[1],
                    steer,
                    versions,
                    [b for b, _ in asked],
                    guesses=guesses,
                    holding=self._holding(),
                ).to(dtype=torch.float32, device=raw.logits.device)
                found |= dict(zip(asked, rows, strict=False))
                if guesses is not None:
                    self._guessed = guesses, rows[len(asked) :]
            if (here[0], r) not in judged:
                these = [(b, n) for b, n in found if b in here and n >= r and (n == r or not len(processor))]
                of = self.rows.tensor(tuple(b for b, _ in these), raw.logits.device)
                logits = torch.stack([found[place] for place in these])
                judged |= dict(zip(these, judge(input_ids, raw, of, logits, processor), strict=True))
            for b in here:
                one = judged[b, r]
                if one.accepted:
                    chosen.rungs[b], chosen.tokens[b] = r, one.token
                    chosen.choice[b], chosen.used[b], chosen.final[b] = one.candidate, found[b, r], one.scores
                    waiting.remove(b)
        return chosen

    def _guess(self, raw: Raw, going: list[bool]) -> Guesses:
        """The best tokens of rows whose gate is open, and what the others go on with."""
        requests: list[int] = []
        ids: list[int] = []
        for b, (is_open, alive) in enumerate(zip(raw.opened, going, strict=True)):
            mine = raw.ranked[b] if is_open else raw.ranked[b][:1]
            mine = mine if alive or self._filler is None else (self._filler,)
            requests += [b] * len(mine)
            ids += mine
        return Guesses(tuple(requests), tuple(ids))

    def _come_true(self, cache: RawCache, tokens: Sequence[int]) -> Tensor | None:
        """The raw logits of the next step, `[batch, vocabulary]`, if all of its tokens were guessed; `None` else."""
        if self._guessed is None:
            return None
        guesses, logits = self._guessed
        rows = guesses.true(tokens)
        if rows is None:
            return None
        guesses.enter(cache, rows)
        return logits[self.rows.tensor(tuple(rows), logits.device)]

    def _fused(
        self, token: Token, cache: RawCache, columns: int, steer: Versions, going: list[bool]
    ) -> tuple[Tensor, Found]:
        """One pass of the raw rows, `[batch, …]`, and the rungs of rows that are still going."""
        chosen: list[int | None] = []
        requests: list[int] = []
        asked: dict[tuple[int, int], int] = {}  # the row of a request's rung
        for b, stream in enumerate(self.streams):
            mine = stream.versions if going[b] else ()
            asked |= {(b, r): len(chosen) + 1 + r for r in range(len(mine))}
            chosen += [None, *mine]
            requests += [b] * (1 + len(mine))
        found = self.rows.run(
            token, cache, columns, steer, chosen, requests, raw_enters_cache=True, holding=self._holding()
        )
        found = found.to(dtype=torch.float32, device=token.ids.device)
        alone = tuple(i for i, version in enumerate(chosen) if version is None)
        raw = found[self.rows.tensor(alone, found.device)]
        return raw, {place: found[row] for place, row in asked.items()}

    def _holding(self) -> list[Holding]:
        """The meanings of each request's newest token."""
        return [stream.holding for stream in self.streams]

    # ---- before the first token --------------------------------------------------------------------------

    def _follow(self, prompts: Tensor) -> None:
        """Follow the texts of requests whose edits ask what is generated. `prompts` are padded on the left."""
        for row, (request, stream) in enumerate(zip(self._spread(self.requests), self.streams, strict=True)):
            if meanings_of(request.edits):
                ids = prompts[row, prompts.shape[1] - request.prompt_length :].tolist()
                stream.text = follower(self.tokenizer, request.edits, ids)

    def _prepare(self, token: Token, cache: RawCache, columns: int) -> Versions | None:
        """Rank the layers, and build the ladders."""
        requests = self._spread(self.requests)
        lengths = [request.prompt_length for request in requests]
        pads = [columns - length for length in lengths]
        versions: list[tuple[int, tuple[Edit, ...]]] = []
        ranked: dict[int, tuple[int, ...]] = {}
        for b, (request, stream) in enumerate(zip(requests, self.streams, strict=True)):
            if request.rejection is None or not request.edits:
                continue
            stream.order = ranked.get(id(request), ())
            if request.rejection.ranks and not stream.order:
                ranking = str(request.rejection.ranking)
                stream.order = rank_layers(
                    self.rows, self.layout, token, cache, columns, b, request.edits, lengths, pads, ranking
                )
            elif not isinstance(request.rejection.ranking, str):
                stream.order = request.rejection.ranking
            ranked[id(request)] = stream.order
            rungs = ladder(request.edits, request.rejection, stream.order)
            stream.versions = tuple(range(len(versions), len(versions) + len(rungs)))
            versions += [(b, edits) for edits in rungs]
        return compile_versions(self.layout, versions, lengths, pads) if versions else None


def _describe(edits: tuple[Edit, ...]) -> str:
    layers = sorted({edit.site.layer for edit in edits})
    strengths = sorted({edit.strength for edit in edits})
    return f"{len(layers)} layers at strength {', '.join(f'{strength:g}' for strength in strengths)}"
