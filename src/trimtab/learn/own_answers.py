"""A model's own answers to learn from: made under a teacher's prompt, and kept where they do what it says.

A small model follows its prompt too seldom to learn much from. So where few answers are kept, the model is asked again
while its answer, or the opening of it, is steered along the mean difference of the prompts with and without the
instruction (which needs no answers); how it is helped best is tried on a few queries.
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

from trimtab.engines.folding import as_rows, row_of
from trimtab.engines.transformers.forced import Change, Forced, forcing, passes
from trimtab.engines.transformers.read import Text
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
HELP_QUERIES = 8
"""At which depth the model is helped, how strongly in mean differences, and whether all of its answer or the opening
alone, is tried on so many queries."""
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
"""Where nothing checks the answers: how much likelier an answer is with the teacher's prompt than without, at least, in
nats a token."""
BATCH = 32


class TooFewAnswersError(TrimtabError):
    """Hardly any answer of the model does what its prompt says, so nothing can be learned from them."""


@dataclass(frozen=True)
class Lesson:
    """An answer that was kept: `asked` and `plain` are the prompts' ids with and without what the teacher says.

    `turn` is the phrasing that the teacher used, and `help` the steering under which the model wrote.
    """

    query: str
    turn: int
    asked: tuple[int, ...]
    plain: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    help: Steering | None = None


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
        return len({one.query for one in self.good})


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
            says than without (by `MARGIN` nats a token).
        tokens: The most tokens of an answer.
        progress: Called with the answers made and those that may be made.

    Raises:
        TrimtabError: Fewer than `LEAST` answers were kept, counting at most two a query.
    """
    made = Making(lm, teacher, check, tokens)
    good: list[Lesson] = []
    tries: list[Try] = []
    helps: list[Steering] = []
    help_: Steering | None = None
    ways: set[tuple[Steering | None, int]] = set()
    total = TRIES * len(queries)
    for turn in range(TRIES):
        lacking = _lacking(queries, good)
        way = (help_, turn % teacher.turns)
        if len(lacking) <= (1 - ENOUGH) * len(queries) or way in ways:  # asked the same way, it answers the same
            break
        ways.add(way)
        report = None if progress is None else _after(progress, turn * len(queries), total)
        new = made.answers(lacking, turn, [help_], report)
        good = _different([*good, *new])
        tries.append(Try(_named(help_), len(lacking), len(new)))
        if len(new) >= OFTEN * len(lacking) or turn == TRIES - 1:
            continue
        if not helps:
            helps, tried, found = made.best_helps(lacking, turn)
            good = _different([*good, *found])
            tries.append(tried)
        help_ = helps.pop(0)
    if sum(min(count, PER_QUERY) for count in Counter(one.query for one in good).values()) < LEAST:
        raise TooFewAnswersError(
            f"of {sum(one.asked for one in tries)} answers that the model wrote under this prompt, {len(good)} do what"
            f" it says; {LEAST} are needed, at most {PER_QUERY} a query. Say it in other words, give examples, or"
            " more queries"
        )
    if progress is not None:
        progress(total, total)
    return Answers(tuple(good), tuple(_to_the_point(made, good)), tuple(tries))


def _lacking(queries: Sequence[str], good: Sequence[Lesson]) -> list[str]:
    """The queries with fewer answers than may be learned from."""
    counts = Counter(one.query for one in good)
    return [query for query in queries if counts[query] < PER_QUERY]


def _different(lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons, each answer to a query once."""
    return list({(one.query, one.answer): one for one in reversed(lessons)}.values())[::-1]


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

    def answers(
        self,
        queries: Sequence[str],
        turn: int,
        helps: Sequence[Steering | None],
        progress: Progress | None = None,
    ) -> list[Lesson]:
        """The answers to each query, under each help, that do what the teacher says."""
        rows = [(query, help_) for help_ in helps for query in queries]
        answers = self.lm.generate(
            [self.teacher.ask(query, turn) for query, _ in rows],
            [help_ for _, help_ in rows],
            system=self.teacher.system,
            max_new_tokens=self.tokens,
            batch_size=BATCH,
            progress=progress,
        )
        made = []
        for (query, help_), answer in zip(rows, answers, strict=True):
            if not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT:
                continue
            if self.check is not None and not self.check(query, answer.text, answer.finish_reason == "length"):
                continue
            plain, ids = tuple(self.lm.encode(query)), tuple(answer.token_ids)
            made.append(Lesson(query, turn, self.asked(query, turn), plain, ids, answer.text, help_))
        return made if self.check is not None else _likelier(self.lm, made)

    def asked(self, query: str, turn: int) -> tuple[int, ...]:
        """The teacher's prompt, as token ids."""
        return tuple(self.lm.encode(self.teacher.ask(query, turn), system=self.teacher.system))

    def best_helps(self, queries: Sequence[str], turn: int) -> tuple[list[Steering], Try, list[Lesson]]:
        """The two helps under which most answers do what the teacher says, the best one first.

        They are tried on some of the queries; what was kept of that comes with them.
        """
        last = self.lm.layout.layers - 1
        layers = sorted({min(round(depth * self.lm.layout.layers), last) for depth in HELP_DEPTHS})
        sides = [(self.asked(query, n), self.lm.encode(query)) for n, query in enumerate(queries)]
        pairs = [(Text(asked, [len(asked) - 1]), Text(plain, [len(plain) - 1])) for asked, plain in sides]
        moments = contrast(self.lm, pairs, layers)
        helps = [
            strength * Steering((Edit(Site(layer), Add(moments[layer].difference.float()), where),))
            for where in (WHILE_IT_BEGINS, THROUGHOUT)
            for strength in HELP_STRENGTHS
            for layer in layers
        ]
        some = queries[:: max(1, len(queries) // HELP_QUERIES)][:HELP_QUERIES]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doses: that is what is tried here
            found = self.answers(some, turn, helps)
        counts = Counter(one.help for one in found)
        best = sorted(helps, key=lambda help_: -counts[help_])[:2]
        return best, Try("tried at several blocks", len(some) * len(helps), len(found)), found


def _to_the_point(made: Making, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Of each query's answers the two that say most about it, without the quarter of all that says least.

    What an answer says about its query is how much more likely it is after it than after another query under the same
    teacher: the pointwise mutual information, in nats.
    """
    queries = list(dict.fromkeys(one.query for one in lessons))
    other = dict(zip(queries, [*queries[1:], queries[0]], strict=True))
    own = logprobs(made.lm, [Forced(one.asked, one.answer) for one in lessons])
    swapped = logprobs(made.lm, [Forced(made.asked(other[one.query], one.turn), one.answer) for one in lessons])
    says = {id(one): float((a - b).sum()) for one, a, b in zip(lessons, own, swapped, strict=True)}
    best: list[Lesson] = []
    for query in queries:
        mine = sorted((one for one in lessons if one.query == query), key=lambda one: -says[id(one)])
        best += mine[:PER_QUERY]
    ranked = sorted(best, key=lambda one: -says[id(one)])[: max(LEAST, round(TO_THE_POINT * len(best)))]
    chosen = {id(one) for one in ranked}
    return [one for one in best if id(one) in chosen]


def _likelier(lm: LM, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Those whose answers are more likely with what the teacher says than without."""
    told = logprobs(lm, [Forced(one.asked, one.answer) for one in lessons])
    bare = logprobs(lm, [Forced(one.plain, one.answer) for one in lessons])
    return [
        one
        for one, with_it, without in zip(lessons, told, bare, strict=True)
        if float((with_it - without).mean()) >= MARGIN
    ]


@torch.no_grad()
def logprobs(lm: LM, texts: Sequence[Forced]) -> list[Tensor]:
    """For each text the log-probability of each token of its answer, `[answer tokens]`, unsteered."""
    found: list[Tensor] = []
    with forcing(lm.model, lm.layout, []) as run, torch.no_grad():
        for numbers in passes(lm.model, texts):
            for text, logits in zip(
                [texts[i] for i in numbers], run.logits([texts[i] for i in numbers], {}), strict=True
            ):
                ids = torch.tensor(text.answer, device=logits.device)[:, None]
                found.append(logits.log_softmax(-1).gather(-1, ids)[:, 0].cpu())
    return found


def help_changes(help_: Steering) -> dict[Site, Change]:
    """What a steering adds, as changes of a teacher-forced pass."""
    changes: dict[Site, Change] = {}
    for edit in help_.edits:
        rows = as_rows(row_of([edit]), torch.float32, [edit])
        changes[edit.site] = partial(_added, edit.operation.kernel, rows)
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
