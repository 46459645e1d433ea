"""Rejection as part of a decoding step: rows whose steered tokens must be plausible to the unsteered model.

In the batch such rows are unsteered: the cache holds the unsteered model's keys and values. If a row's gate is open,
its candidate steerings are computed as rows over that cache (see `rows`), and the first plausible candidate gives the
token. So each decision depends only on the text so far, and the schedules differ only in speed:

    optimistic   the decode pass; then, if a gate is open, one verify pass with all candidates. It includes draft
                 tokens: the two most likely tokens of each row with an open gate, and the chosen token of every other
                 row. If they are accepted, the next step needs no decode pass. For CPUs, where additional rows are
                 costly.
    fused        the decode pass includes all candidates of all rows. For GPUs, where additional rows cost little.

Both need a batch in which no row is steered at every token. In other batches the candidates have a separate pass,
without draft tokens.

A step synchronizes with the device once, and a second time if a gate is open and its candidates weren't fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.rejection import Rejection, gate_open, ladder, plausible, threshold
from trimtab.decoding.trace import Step
from trimtab.engines.meanings import ActiveMeanings
from trimtab.engines.transformers.drafts import Drafts
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.ranked import rank_layers
from trimtab.engines.transformers.rows import NewestTokens, compile_versions
from trimtab.engines.transformers.sampling import BatchSampler
from trimtab.engines.transformers.scores import activation_edits, edited_sites
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import UnsupportedError
from trimtab.steering import Edit

DRAFTS = 2
"""The number of draft tokens of a row with an open gate in its verify pass."""

Facts = Callable[[Tensor, Tensor], Tensor]
"""Computes the facts `[rows, facts]` of tokens `[rows]` and their logits `[rows, vocabulary]`."""
RowRungs = Sequence[tuple[int, int]]
"""Candidates as `(row of the batch, candidate index)`; those of a row are adjacent, the strongest first."""


@dataclass(frozen=True)
class Ladder:
    """How one row's tokens are verified: its candidate steerings, strongest first, and its layers' ranking."""

    rejection: Rejection
    schedule: str
    candidates: tuple[tuple[Edit, ...], ...] = ()
    order: tuple[int, ...] = ()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits of all candidates."""
        return tuple(dict.fromkeys(edit for edits in self.candidates for edit in edits))

    def descriptions(self) -> tuple[str, ...]:
        """A description of each candidate."""
        return tuple(map(_describe, self.candidates))


@dataclass(frozen=True)
class Past:
    """The state that rows continue from: their newest tokens, the unsteered cache, and its columns with these tokens.

    If rows run over copies of the cache, `cache` is a function that copies it as it was before these tokens. `holding`
    are the meanings of the newest tokens; empty for prompt tokens.
    """

    token: NewestTokens
    cache: Any
    columns: int
    holding: Sequence[ActiveMeanings] = ()


def schedule_for(layout: Layout) -> str:
    """The schedule for `"auto"`. It depends on the device only, not on timing, so that all runs on a machine round
    alike."""
    return "optimistic" if input_device(layout.decoder).type == "cpu" else "fused"


def check_rejection(edits: Sequence[Edit], prompt_length: int) -> None:
    """Raise `UnsupportedError` if an edit never acts on a token that is being decoded."""
    for edit in activation_edits(edits):
        spans = edit.positions.reach(prompt_length)
        if not any(stop is None or stop >= prompt_length for _, stop in spans):
            raise UnsupportedError(
                f"rejection steers the token that is being decoded, but {edit} acts only on the prompt"
            )


def make_ladder(
    passes: Any,
    layout: Layout,
    rejection: Rejection,
    edits: tuple[Edit, ...],
    past: Past,
    request: int,
    lengths: Sequence[int],
) -> Ladder:
    """Create the ladder of one request, ranking its layers if necessary.

    Args:
        passes: Runs rows: `Rows` or `Forks`.
        layout: The model's layout.
        rejection: The rejection settings.
        edits: The request's edits; empty if its gates are shut.
        past: The state after the prefill.
        request: The index of the request in it.
        lengths: The lengths of the prompts, in tokens.

    Raises:
        TrimtabError: No candidate is left, or the ranking leaves out a layer.
    """
    schedule = schedule_for(layout) if rejection.schedule == "auto" else rejection.schedule
    if not edits:
        return Ladder(rejection, schedule)
    order = () if isinstance(rejection.ranking, str) else rejection.ranking
    if rejection.ranks:
        pads = [past.columns - length for length in lengths]
        with passes.open(edited_sites(edits)):
            order = rank_layers(
                passes, layout, past.token, past.cache, past.columns, request, edits, list(lengths), pads,
                str(rejection.ranking),
            )  # fmt: skip
    return Ladder(rejection, schedule, ladder(edits, rejection, order), order)


@dataclass(frozen=True)
class _Gates:
    """The unsteered model's results for the verified rows, on the device."""

    scores: Tensor  # [verified, vocabulary], warped
    tau: Tensor  # [verified]
    best: Tensor  # [verified]
    opened: Tensor  # [verified]


@dataclass(frozen=True)
class Verified:
    """A step's tokens `[rows]` on the device, each row's facts, the outcome of each verified row, and the draft tokens.

    `ran`: whether there was a separate verify pass. `drafts` are its draft tokens, if any, with their logits
    `[drafts, vocabulary]`.
    """

    tokens: Tensor
    facts: list[list[float]]
    steps: dict[int, Step]
    ran: bool = False
    drafts: tuple[Drafts, Tensor] | None = None


class Verifier:
    """Verifies the rows of a batch that have candidate steerings, as long as the batch's rows don't change.

    Args:
        passes: Runs rows: `Rows` or `Forks`.
        layout: The model's layout.
        ladders: The ladder of each row; `None` if its tokens aren't verified.
        requests: The entry of the cache that each row continues from.
        lengths: The prompt length of each entry, in tokens.
        pads: The left padding of each entry.
        device: The device of the logits.
    """

    def __init__(
        self,
        passes: Any,
        layout: Layout,
        ladders: Sequence[Ladder | None],
        requests: Sequence[int],
        lengths: Sequence[int],
        pads: Sequence[int],
        device: torch.device,
    ) -> None:
        self.passes, self.requests, self.device = passes, tuple(requests), device
        self.count: int = len(ladders)
        by_row = {
            row: row_ladder
            for row, row_ladder in enumerate(ladders)
            if row_ladder is not None and row_ladder.candidates
        }
        self.rows: tuple[int, ...] = tuple(by_row)
        versions: list[tuple[int, tuple[Edit, ...]]] = []
        begun: dict[tuple, int] = {}  # the index of a ladder's first version; several answers to a prompt share one
        self._first: dict[int, int] = {}
        self._candidates = {row: len(row_ladder.candidates) for row, row_ladder in by_row.items()}
        for row, row_ladder in by_row.items():
            request = requests[row]
            key = row_ladder.candidates, lengths[request], pads[request]
            if key not in begun:
                begun[key] = len(versions)
                versions += [(request, edits) for edits in row_ladder.candidates]
            self._first[row] = begun[key]
        self.sites = edited_sites(
            [edit for row_ladder in by_row.values() for edits in row_ladder.candidates for edit in edits]
        )
        self._versions = compile_versions(layout, versions, lengths, pads)
        self._betas = torch.tensor([row_ladder.rejection.beta for row_ladder in by_row.values()], device=device)
        self._index = self._tensor(self.rows)
        self._verified_index = {row: i for i, row in enumerate(self.rows)}
        self.fused = (
            bool(by_row) and {row_ladder.schedule for row_ladder in by_row.values()} == {"fused"} and passes.shares
        )
        self._all = [(row, candidate) for row in self.rows for candidate in range(self._candidates[row])]

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return self.passes.tensor(tuple(numbers), self.device)

    def run_fused(self, past: Past) -> tuple[Tensor, Tensor]:
        """The logits of the unsteered rows, which enter the cache, and of all candidates, from one pass."""
        chosen: list[int | None] = []
        requests: list[int] = []
        unsteered: list[int] = []
        for row in range(self.count):
            unsteered.append(len(chosen))
            mine = range(self._candidates.get(row, 0))
            chosen += [None, *(self._first[row] + candidate for candidate in mine)]
            requests += [row] * (1 + len(mine))
        logits = self.passes.run(
            past.token,
            past.cache,
            past.columns,
            self._versions,
            chosen,
            requests,
            raw_enters_cache=True,
            holding=past.holding,
        ).to(dtype=torch.float32, device=self.device)
        candidates = [i for i, version in enumerate(chosen) if version is not None]
        return logits[self._tensor(unsteered)], logits[self._tensor(candidates)]

    def verify(
        self,
        sampler: BatchSampler,
        logits: Tensor,
        facts: Facts,
        past: Past,
        *,
        drafting: Sequence[bool] = (),
        ends: frozenset[int] = frozenset(),
        fused: Tensor | None = None,
    ) -> Verified:
        """Choose the next token of every row of the batch.

        Args:
            sampler: Chooses the rows' tokens.
            logits: The logits `[rows, vocabulary]` of the decode pass, in which verified rows weren't steered.
            facts: Computes the facts of tokens.
            past: The state of the batch, with the tokens that gave the logits.
            drafting: For each row whether to draft its following token; empty for no drafts.
            ends: The end tokens, which no token follows.
            fused: The logits of all candidates, if the decode pass included them.
        """
        scores = sampler.processed(logits)
        gates, own = self._gates(sampler, scores)
        tokens = self._put(sampler.select_tokens(scores), own)
        row_facts = torch.cat([facts(tokens, logits), self._gate_facts(gates, bool(drafting))], -1)
        if fused is not None:
            tokens, judged = self._judge(sampler, gates, fused, self._all, tokens, facts, row_facts.shape[-1])
            lines = torch.cat([row_facts, judged]).tolist()
            return self._outcome(tokens, lines[: self.count], self._all, lines[self.count :])
        lines = row_facts.tolist()
        opened = [row for row in self.rows if lines[row][-GATE_FACTS]]
        if not opened:
            return self._outcome(tokens, lines, [], [])
        places = [(row, candidate) for row in opened for candidate in range(self._candidates[row])]
        drafts = self._drafts(lines, set(opened), drafting, ends)
        candidate_logits = self.passes.run(
            past.token,
            past.cache,
            past.columns,
            self._versions,
            [self._first[row] + candidate for row, candidate in places],
            [self.requests[row] for row, _ in places],
            drafts=drafts,
            holding=past.holding,
        ).to(dtype=torch.float32, device=self.device)
        tokens, judged = self._judge(
            sampler, gates, candidate_logits[: len(places)], places, tokens, facts, row_facts.shape[-1]
        )
        kept = None if drafts is None else (drafts, candidate_logits[len(places) :])
        return replace(self._outcome(tokens, lines, places, judged.tolist()), ran=True, drafts=kept)

    # ---- on the device -----------------------------------------------------------------------------------

    def _gates(self, sampler: BatchSampler, scores: Tensor) -> tuple[_Gates, Tensor]:
        """The gates, and the unsteered model's tokens `[verified]`, restricted to plausible ones."""
        every = len(self.rows) == self.count
        scores = sampler.warped(scores if every else scores[self._index], self.rows)
        tau = threshold(scores, self._betas)
        best = scores.argmax(-1)
        tokens = _draw(sampler, scores, best, self.rows, scores, tau)
        return _Gates(scores, tau, best, gate_open(scores, tau)), tokens

    def _put(self, x: Tensor, verified: Tensor) -> Tensor:
        """`x` with the verified rows replaced by `verified`."""
        return verified if len(self.rows) == self.count else x.index_copy(0, self._index, verified)

    def _gate_facts(self, gates: _Gates, drafting: bool) -> Tensor:
        """`[rows, WIDTH]`: whether a row's gate is open, its best token, and its most likely tokens if drafting."""
        parts = [gates.opened[:, None].float(), gates.best[:, None].float()]
        likeliest = gates.scores.topk(DRAFTS, dim=-1).indices if drafting else gates.best[:, None].expand(-1, DRAFTS)
        values = torch.cat([*parts, likeliest.float()], -1)
        return self._put(values.new_zeros(self.count, GATE_FACTS), values)

    def _judge(
        self,
        sampler: BatchSampler,
        gates: _Gates,
        logits: Tensor,
        places: RowRungs,
        tokens: Tensor,
        facts: Facts,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """The batch's tokens `[rows]` after verification, and the facts of the candidates `[candidates, width]`.

        A row with a plausible candidate gets the token of the first one. The last `GATE_FACTS` facts begin with whether
        the candidate's best token is plausible, and that token.
        """
        of = tuple(row for row, _ in places)
        place = self._tensor([self._verified_index[row] for row in of])
        scores = sampler.warped(sampler.processed(logits, of), of)
        candidates, tau = scores.argmax(-1), gates.tau[place]
        # `amax` propagates NaN
        accepted = plausible(gates.scores, tau, candidates, place) & logits.amax(-1).isfinite()
        accepted &= gates.opened[place]
        drawn = _draw(sampler, scores, candidates, of, gates.scores, tau, place)
        candidate_facts = torch.cat([facts(drawn, logits), accepted[:, None].float(), candidates[:, None].float()], -1)
        candidate_facts = torch.nn.functional.pad(candidate_facts, (0, width - candidate_facts.shape[-1]))
        count = len(places)
        order = torch.where(accepted, self._tensor(range(count)), count)
        first = order.new_full((self.count,), count).scatter_reduce(0, self._tensor(of), order, "amin")
        return torch.where(first < count, drawn[first.clamp(max=count - 1)], tokens), candidate_facts

    # ---- on the host -------------------------------------------------------------------------------------

    def _drafts(
        self, lines: list[list[float]], opened: set[int], drafting: Sequence[bool], ends: frozenset[int]
    ) -> Drafts | None:
        """The draft tokens: the most likely tokens of rows with an open gate, and the chosen tokens of other rows."""
        rows: list[int] = []
        ids: list[int] = []
        for row, wanted in enumerate(drafting):
            mine = list(map(int, lines[row][-DRAFTS:])) if row in opened else [int(lines[row][0])]
            if not wanted or (row not in opened and mine[0] in ends):
                continue
            rows += [row] * len(mine)
            ids += mine
        return Drafts(tuple(self.requests[row] for row in rows), tuple(ids), tuple(rows)) if ids else None

    def _outcome(
        self,
        tokens: Tensor,
        lines: list[list[float]],
        places: RowRungs,
        judged: list[list[float]],
    ) -> Verified:
        """The outcome of each row: its token is from its first plausible candidate, or from the unsteered model."""
        accepted: dict[int, tuple[int, list[float]]] = {}
        for (row, candidate), line in zip(places, judged, strict=True):
            if line[-GATE_FACTS] and row not in accepted:
                accepted[row] = candidate, line
        steps: dict[int, Step] = {}
        for row in self.rows:
            opened, best = bool(lines[row][-GATE_FACTS]), int(lines[row][1 - GATE_FACTS])
            choice = accepted.get(row)
            token = int((choice[1] if choice else lines[row])[0])
            steps[row] = Step(opened, choice[0] if choice else None, best if token != best else None)
        facts = [accepted[row][1] if row in accepted else line for row, line in enumerate(lines)]
        return Verified(tokens, facts, steps)


def _draw(
    sampler: BatchSampler,
    scores: Tensor,
    best: Tensor,
    rows: tuple[int, ...],
    unsteered: Tensor,
    tau: Tensor,
    place: Tensor | None = None,
) -> Tensor:
    """The best tokens `[rows]` by warped scores, or samples restricted to what the unsteered model finds plausible."""
    if not sampler.any_sampled(rows):
        return best
    unsteered = unsteered if place is None else unsteered[place]
    return sampler.draw(scores.masked_fill(unsteered < tau[:, None], -torch.inf), best, rows)


GATE_FACTS = 2 + DRAFTS
"""The number of additional facts of a verified row: whether its gate is open, its best token, its likeliest tokens."""


def _describe(edits: tuple[Edit, ...]) -> str:
    layers = sorted({edit.site.layer for edit in edits})
    strengths = sorted({edit.strength for edit in edits})
    return f"{len(layers)} layers at strength {', '.join(f'{strength:g}' for strength in strengths)}"
