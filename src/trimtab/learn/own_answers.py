"""A model's own answers to learn from: made under a teacher's prompt, and kept where they do what it says.

A small model follows its prompt too seldom to learn much from. So where few answers are kept, it is asked again in the
way that is followed best on a few queries: in another phrasing, said twice, or while its answer, or the opening of it,
is steered along the mean difference of the prompts with and without the instruction (which needs no answers).
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
"""`check(query, answer, cut)`: whether an answer does what the teacher says; `cut` if the token limit stopped it."""

OPENING = 8
"""So many tokens of an answer are steered when the model is helped to begin."""
TRIES = 3
OFTEN = 0.5
"""A model that does what it is told in this share of answers isn't helped."""
HELP_DEPTHS, HELP_STRENGTHS = (0.3, 0.5, 0.7), (0.6, 1.2)
FEW = 8
"""What the model follows best is tried on so many queries: the first phrasings, each said as often as the teacher says
and once more, and then at which depth it is helped, how strongly in mean differences, and whether throughout or at the
opening alone."""
PHRASINGS = 4
SHORTLIST = 4
"""Of so many ways that were followed most often, those two are taken whose answers say most about their queries."""
PER_QUERY = 2
"""So many answers to one query are learned from, at most."""
ENOUGH = 0.75
"""The share of queries with that many answers, from which on the model isn't asked again."""
TO_THE_POINT = 0.75
"""The share of answers that are kept by what they say about their queries."""
WHILE_IT_BEGINS, THROUGHOUT = Positions.opening(OPENING), Positions.from_last_prompt_token()
LEAST = 8
"""Fewer answers than this are too few to learn from."""
MARGIN = 0.05
"""Where nothing checks the answers: how much likelier an answer is with the teacher's prompt than without, at least,
in nats per token."""
BATCH = 64


class TooFewAnswersError(TrimtabError):
    """Hardly any answer of the model does what its prompt says, so nothing can be learned from them."""


@dataclass(frozen=True)
class Way:
    """A way of asking: the teacher's `turn`, and the steering while the model answers."""

    turn: int
    help: Steering | None = None


@dataclass(frozen=True)
class Lesson:
    """An answer that was kept: `instructed` and `plain` are the prompts' ids with and without what the teacher says.

    `turn` is the phrasing that the teacher used, and `help` the steering under which the model wrote.
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
        """How it was asked."""
        return Way(self.turn, self.help)


@dataclass(frozen=True)
class Try:
    """One time of asking: the help (`""`: none), how many queries were asked, and how many answers kept."""

    help: str
    asked: int
    kept: int


@dataclass(frozen=True)
class Answers:
    """What was made: all answers that do what the teacher says, those to learn from, and the tries."""

    good: tuple[Lesson, ...]
    lessons: tuple[Lesson, ...]
    tries: tuple[Try, ...]

    @property
    def answered(self) -> int:
        """To how many queries there is an answer."""
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
    """The model's own answers under a teacher's prompt, at most two a query.

    Args:
        lm: The model.
        teacher: What is said.
        queries: What is asked, each different.
        check: Whether an answer does what it should; `None`: it does where it is more likely with what the teacher
            says than without (by `MARGIN` nats per token).
        tokens: The maximum length of an answer, in tokens.
        progress: Called with the answers made and those that may be made.

    Raises:
        TrimtabError: Fewer than `LEAST` answers were kept, counting at most two a query.
    """
    made = Making(lm, teacher, check, tokens)
    good: list[Lesson] = []
    tries: list[Try] = []
    ways, tried_ways, searched = [Way(0)], set[Way](), False
    total = TRIES * len(queries)
    for turn in range(TRIES):
        lacking = _lacking(queries, good)
        ways = [way for way in ways if way not in tried_ways]  # asked the same way, it answers the same
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
            f"of {sum(attempt.asked for attempt in tries)} answers written under this prompt, {len(good)} do what"
            f" it says; {LEAST} are needed, at most {PER_QUERY} a query. Say it in other words, give examples, or"
            " more queries"
        )
    if progress is not None:
        progress(total, total)
    return Answers(tuple(good), tuple(_to_the_point(made, good)), tuple(tries))


def _lacking(queries: Sequence[str], good: Sequence[Lesson]) -> list[str]:
    """The queries with fewer answers than may be learned from."""
    counts = Counter(lesson.query for lesson in good)
    return [query for query in queries if counts[query] < PER_QUERY]


def _different(lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons, each answer to a query once."""
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
    """Makes answers under a teacher's prompt, and judges them."""

    lm: LM
    teacher: Teacher
    check: Check | None
    tokens: int

    def answers(self, rows: Sequence[tuple[str, Way]], progress: Progress | None = None) -> list[Lesson]:
        """The answers to these queries, each asked in its way, that do what the teacher says."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doses: a help may be too much, and then its answers aren't kept
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
        """The teacher's prompt, as token ids."""
        return tuple(self.lm.encode(self.teacher.ask(query, turn), system=self.teacher.system))

    def best_ways(self, queries: Sequence[str], good: Sequence[Lesson]) -> tuple[list[Way], list[Try], list[Lesson]]:
        """The two ways of asking in which the model follows best, the best one first.

        They are tried on some of the queries; what was kept of that comes with them.

        Args:
            queries: What may be asked.
            good: The answers there are already; ways are tried on queries that have none.
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
        """Mean differences of the prompts with and without what the teacher says: all that may be of help."""
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
        """What each answer says about its query: how much more likely it is after it than after another query under
        the same teacher, which is the pointwise mutual information, in nats.
        """
        queries = list(dict.fromkeys(lesson.query for lesson in lessons))
        other = dict(zip(queries, [*queries[1:], *queries[:1]], strict=True))
        own = logprobs(self.lm, [Forced(lesson.instructed, lesson.answer) for lesson in lessons])
        swapped = logprobs(
            self.lm, [Forced(self.instructed(other[lesson.query], lesson.turn), lesson.answer) for lesson in lessons]
        )
        return [float((a - b).sum()) for a, b in zip(own, swapped, strict=True)]


def _to_the_point(made: Making, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Of each query's answers the two that say most about it, without the quarter of all that says least."""
    says = {id(lesson): nats for lesson, nats in zip(lessons, made.says(lessons), strict=True)}
    best: list[Lesson] = []
    for query in dict.fromkeys(lesson.query for lesson in lessons):
        mine = sorted((lesson for lesson in lessons if lesson.query == query), key=lambda lesson: -says[id(lesson)])
        best += mine[:PER_QUERY]
    ranked = sorted(best, key=lambda lesson: -says[id(lesson)])[: max(LEAST, round(TO_THE_POINT * len(best)))]
    chosen = {id(lesson) for lesson in ranked}
    return [lesson for lesson in best if id(lesson) in chosen]


def _likelier(lm: LM, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Those whose answers are more likely with what the teacher says than without."""
    instructed = logprobs(lm, [Forced(lesson.instructed, lesson.answer) for lesson in lessons])
    bare = logprobs(lm, [Forced(lesson.plain, lesson.answer) for lesson in lessons])
    return [
        lesson
        for lesson, with_it, without in zip(lessons, instructed, bare, strict=True)
        if float((with_it - without).mean()) >= MARGIN
    ]


@torch.no_grad()
def logprobs(lm: LM, texts: Sequence[Forced]) -> list[Tensor]:
    """For each text the log-probability of each token of its answer, `[answer tokens]`, unsteered."""
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
    """What a steering adds, as changes of a teacher-forced pass."""
    changes: dict[Site, Change] = {}
    for edit in help_.edits:
        kernel, row = call_of([edit])
        changes[edit.site] = partial(_added, kernel, as_rows(row, torch.float32, [edit]))
    return changes


def _added(kernel: Kernel, rows: Rows, x: Tensor) -> Tensor:
    wide = x.float()
    return kernel(wide, {name: row.to(x.device) for name, row in rows.items()}) - wide


def helped(lesson: Lesson) -> int:
    """How many tokens of the answer were written under the help."""
    if lesson.help is None:
        return 0
    opening = lesson.help.edits[0].positions == WHILE_IT_BEGINS
    return min(OPENING, len(lesson.answer)) if opening else len(lesson.answer)
