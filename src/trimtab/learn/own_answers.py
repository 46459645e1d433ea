"""A model's own answers as training data: generated under a teacher's prompt, and kept if they follow it.

A small model follows its prompt too rarely for many answers to be kept. Then it is asked again, in the way that it
follows best on a few queries: with another phrasing, with the instruction repeated, or while its answer, or only its
opening, is steered along the mean difference of the prompts with and without the instruction (which needs no answers).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.folding import as_rows, call_of
from trimtab.engines.request import Text
from trimtab.engines.transformers.forced import Change, Forced, forcing, passes
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import Progress, contrast
from trimtab.learn.teachers import Teacher
from trimtab.steering import Add, Edit, Positions, Site, Steering
from trimtab.steering.operations import Kernel, Rows
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.lm import LM

Check = Callable[[str, str, bool], bool]
"""`check(query, answer, cut)`: whether an answer follows the teacher; `cut` is true if the token limit stopped it."""

OPENING = 8
"""The number of tokens that are steered if only the opening of an answer is helped."""
TRIES = 3
OFTEN = 0.5
"""If at least this share of answers follows the teacher, the model isn't helped by a steering."""
HELP_DEPTHS, HELP_STRENGTHS = (0.3, 0.5, 0.7), (0.6, 1.2)
FEW = 8
"""The number of queries on which ways of asking are tried: first phrasings, each repeated as often as the teacher does
and once more; then helps, at several depths and strengths (in mean differences), at the opening or throughout."""
PHRASINGS = 4
SHORTLIST = 4
"""Among this many ways that are followed most often, the two with the most query-specific answers are used."""
PER_QUERY = 2
"""The maximum number of answers per query to learn from."""
ENOUGH = 0.75
"""If at least this share of queries has that many answers, the model isn't asked again."""
TO_THE_POINT = 0.75
"""The share of answers that are kept, ranked by how specific they are to their queries."""
WHILE_IT_BEGINS, THROUGHOUT = Positions.opening(OPENING), Positions.from_last_prompt_token()
LEAST = 8
"""The minimum number of answers to learn from."""
MARGIN = 0.05
"""Without a `check`: the minimum gain in an answer's log-probability from the teacher's prompt, in nats per token."""
BATCH = 64


class TooFewAnswersError(TrimtabError):
    """Too few answers of the model follow its prompt to learn from them."""


@dataclass(frozen=True)
class Way:
    """A way of asking: the teacher's `turn`, and a steering that helps while the model answers."""

    turn: int
    help: Steering | None = None


@dataclass(frozen=True)
class Lesson:
    """An answer to learn from. `instructed` and `plain` are the token ids of the prompt with and without the teacher.

    `turn` selects the teacher's phrasing, and `help` is the steering under which the answer was generated.
    """

    query: str
    turn: int
    instructed: tuple[int, ...]
    plain: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    help: Steering | None = None

    @property
    def way(self) -> Way:
        """The way of asking."""
        return Way(self.turn, self.help)


@dataclass(frozen=True)
class Try:
    """One round of generating answers: the help (`""`: none), the number of answers generated, and the number kept."""

    help: str
    asked: int
    kept: int


@dataclass(frozen=True)
class Answers:
    """Generated answers: all that follow the teacher, those to learn from, and the rounds of generation."""

    good: tuple[Lesson, ...]
    lessons: tuple[Lesson, ...]
    tries: tuple[Try, ...]

    @property
    def answered(self) -> int:
        """The number of queries that have an answer."""
        return len({lesson.query for lesson in self.good})


def own_answers(
    lm: LM,
    teacher: Teacher,
    queries: Sequence[str],
    *,
    check: Check | None,
    tokens: int,
    progress: Progress | None = None,
) -> Answers:
    """Generate the model's own answers under a teacher's prompt.

    Args:
        lm: The model.
        teacher: The prompt.
        queries: Distinct queries.
        check: Whether an answer follows the teacher. `None`: it does if it is more likely with the teacher's prompt
            than without it (by `MARGIN` nats per token).
        tokens: The maximum length of an answer, in tokens.
        progress: `progress(done, total)`: the number of answers generated, and the maximum number.

    Returns:
        The answers; at most two per query to learn from.

    Raises:
        TooFewAnswersError: Fewer than `LEAST` answers were kept, counting at most two per query.
    """
    made = Making(lm, teacher, check, tokens)
    good: list[Lesson] = []
    tries: list[Try] = []
    ways, tried_ways, searched = [Way(0)], set[Way](), False
    total = TRIES * len(queries)
    for turn in range(TRIES):
        lacking = _lacking(queries, good)
        ways = [way for way in ways if way not in tried_ways]  # the same way would give the same answers
        if not ways or len(lacking) <= (1 - ENOUGH) * len(queries):
            break
        way = ways.pop(0)
        tried_ways.add(way)
        report = None if progress is None else _after(progress, turn * len(queries), total)
        new = made.answers([(query, way) for query in lacking], report)
        good = _different([*good, *new])
        tries.append(Try(_named(way.help), len(lacking), len(new)))
        if len(new) >= OFTEN * len(lacking):
            ways = [Way((way.turn + 1) % teacher.turns, way.help)]
        elif not searched and turn < TRIES - 1:
            searched = True
            ways, more, new_lessons = made.best_ways(lacking, good)
            good = _different([*good, *new_lessons])
            tries += more
    if sum(min(count, PER_QUERY) for count in Counter(lesson.query for lesson in good).values()) < LEAST:
        raise TooFewAnswersError(
            f"{len(good)} of {sum(attempt.asked for attempt in tries)} answers written under this prompt follow it;"
            f" {LEAST} are needed, at most {PER_QUERY} per query. Reword the prompt, or give examples or more queries"
        )
    if progress is not None:
        progress(total, total)
    return Answers(tuple(good), tuple(_to_the_point(made, good)), tuple(tries))


def _lacking(queries: Sequence[str], good: Sequence[Lesson]) -> list[str]:
    """The queries with fewer than `PER_QUERY` answers."""
    counts = Counter(lesson.query for lesson in good)
    return [query for query in queries if counts[query] < PER_QUERY]


def _different(lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons without duplicate answers to a query."""
    return list({(lesson.query, lesson.answer): lesson for lesson in reversed(lessons)}.values())[::-1]


def _named(help_: Steering | None) -> str:
    if help_ is None:
        return ""
    (edit,) = help_.edits
    return f"{edit.strength:g} at block {edit.site.layer}, {edit.positions}"


def _after(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


@dataclass(frozen=True)
class Making:
    """Generates answers under a teacher's prompt, and judges them."""

    lm: LM
    teacher: Teacher
    check: Check | None
    tokens: int

    def answers(self, rows: Sequence[tuple[str, Way]], progress: Progress | None = None) -> list[Lesson]:
        """Generate an answer to each query, asked in the given way, and return those that follow the teacher."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about doses: if a help is too strong, its answers aren't kept
            answers = self.lm.generate(
                [self.teacher.ask(query, way.turn) for query, way in rows],
                [way.help for _, way in rows],
                system=self.teacher.system,
                max_new_tokens=self.tokens,
                batch_size=BATCH,
                progress=progress,
            )
        made = []
        for (query, way), answer in zip(rows, answers, strict=True):
            if not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT:
                continue
            if self.check is not None and not self.check(query, answer.text, answer.finish_reason == "length"):
                continue
            plain, ids = tuple(self.lm.encode(query)), tuple(answer.token_ids)
            made.append(Lesson(query, way.turn, self.instructed(query, way.turn), plain, ids, answer.text, way.help))
        return made if self.check is not None else _likelier(self.lm, made)

    def instructed(self, query: str, turn: int) -> tuple[int, ...]:
        """The token ids of the teacher's prompt for this query."""
        return tuple(self.lm.encode(self.teacher.ask(query, turn), system=self.teacher.system))

    def best_ways(self, queries: Sequence[str], good: Sequence[Lesson]) -> tuple[list[Way], list[Try], list[Lesson]]:
        """The two best ways of asking, the best one first, and the rounds and kept answers of trying them.

        Ways are tried on a few of the queries.

        Args:
            queries: The queries to choose from.
            good: The existing answers. Queries without any are preferred.
        """
        answered = {lesson.query for lesson in good}
        bare = [query for query in queries if query not in answered] or list(queries)
        some = bare[:: max(1, len(bare) // FEW)][:FEW]
        words = [Way(turn) for turn in self.teacher.ways(PHRASINGS)][1:]
        lessons = self.answers([(query, way) for way in words for query in some]) if words else []
        tries = [Try("said in other ways", len(words) * len(some), len(lessons))] if words else []
        counts = Counter(lesson.way for lesson in lessons)
        best = max([Way(0), *words], key=lambda way: counts[way])
        helped: list[Way] = []
        if counts[best] < OFTEN * len(some):
            helped = [Way(best.turn, help_) for help_ in self.helps(queries, best.turn)]
            more = self.answers([(query, way) for way in helped for query in some])
            tries.append(Try("tried at several blocks", len(some) * len(helped), len(more)))
            lessons += more
            counts = Counter(lesson.way for lesson in lessons)
        ranked = sorted([*words, *helped], key=lambda way: -counts[way])[:SHORTLIST]
        listed = [lesson for lesson in lessons if lesson.way in ranked]
        says = dict.fromkeys(ranked, 0.0)
        for lesson, nats in zip(listed, self.says(listed), strict=True):
            says[lesson.way] += nats
        return sorted(ranked, key=lambda way: -says[way])[:2], tries, lessons

    def helps(self, queries: Sequence[str], turn: int) -> list[Steering]:
        """The candidate helps: the mean difference of the prompts with and without the teacher, at several settings."""
        last = self.lm.layout.layers - 1
        layers = sorted({min(round(depth * self.lm.layout.layers), last) for depth in HELP_DEPTHS})
        sides = [(self.instructed(query, turn), self.lm.encode(query)) for query in queries]
        pairs = [
            (Text(instructed, [len(instructed) - 1]), Text(plain, [len(plain) - 1])) for instructed, plain in sides
        ]
        moments = contrast(self.lm, pairs, layers)
        return [
            strength * Steering((Edit(Site(layer), Add(moments[layer].difference.float()), where),))
            for where in (WHILE_IT_BEGINS, THROUGHOUT)
            for strength in HELP_STRENGTHS
            for layer in layers
        ]

    def says(self, lessons: Sequence[Lesson]) -> list[float]:
        """How specific each answer is to its query, in nats: its log-probability minus that after another query.

        Both are under the same teacher. This is an estimate of the pointwise mutual information.
        """
        queries = list(dict.fromkeys(lesson.query for lesson in lessons))
        other = dict(zip(queries, [*queries[1:], *queries[:1]], strict=True))
        own = logprobs(self.lm, [Forced(lesson.instructed, lesson.answer) for lesson in lessons])
        swapped = logprobs(
            self.lm, [Forced(self.instructed(other[lesson.query], lesson.turn), lesson.answer) for lesson in lessons]
        )
        return [float((a - b).sum()) for a, b in zip(own, swapped, strict=True)]


def _to_the_point(made: Making, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The two most query-specific answers of each query, without the least specific quarter of all of them."""
    says = {id(lesson): nats for lesson, nats in zip(lessons, made.says(lessons), strict=True)}
    best: list[Lesson] = []
    for query in dict.fromkeys(lesson.query for lesson in lessons):
        mine = sorted((lesson for lesson in lessons if lesson.query == query), key=lambda lesson: -says[id(lesson)])
        best += mine[:PER_QUERY]
    ranked = sorted(best, key=lambda lesson: -says[id(lesson)])[: max(LEAST, round(TO_THE_POINT * len(best)))]
    chosen = {id(lesson) for lesson in ranked}
    return [lesson for lesson in best if id(lesson) in chosen]


def _likelier(lm: LM, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons whose answers are more likely with the teacher's prompt than without it, by `MARGIN`."""
    instructed = logprobs(lm, [Forced(lesson.instructed, lesson.answer) for lesson in lessons])
    bare = logprobs(lm, [Forced(lesson.plain, lesson.answer) for lesson in lessons])
    return [
        lesson
        for lesson, with_it, without in zip(lessons, instructed, bare, strict=True)
        if float((with_it - without).mean()) >= MARGIN
    ]


@torch.no_grad()
def logprobs(lm: LM, texts: Sequence[Forced]) -> list[Tensor]:
    """For each text, the unsteered log-probability of each token of its answer, `[answer tokens]`."""
    gathered: list[Tensor] = []
    with forcing(lm.model, lm.layout, []) as run, torch.no_grad():
        for numbers in passes(lm.model, texts):
            for text, logits in zip(
                [texts[i] for i in numbers], run.logits([texts[i] for i in numbers], {}), strict=True
            ):
                ids = torch.tensor(text.answer, device=logits.device)[:, None]
                gathered.append(logits.log_softmax(-1).gather(-1, ids)[:, 0].cpu())
    return gathered


def help_changes(help_: Steering) -> dict[Site, Change]:
    """The changes that a steering makes, for a teacher-forced pass."""
    changes: dict[Site, Change] = {}
    for edit in help_.edits:
        kernel, row = call_of([edit])
        changes[edit.site] = partial(_added, kernel, as_rows(row, torch.float32, [edit]))
    return changes


def _added(kernel: Kernel, rows: Rows, x: Tensor) -> Tensor:
    wide = x.float()
    return kernel(wide, {name: row.to(x.device) for name, row in rows.items()}) - wide


def helped(lesson: Lesson) -> int:
    """The number of the answer's tokens that were generated under the help."""
    if lesson.help is None:
        return 0
    opening = lesson.help.edits[0].positions == WHILE_IT_BEGINS
    return min(OPENING, len(lesson.answer)) if opening else len(lesson.answer)
