"""A model's own answers to learn from: made under a teacher's prompt, and kept where they do what it says.

A small model follows its prompt too seldom to learn much from. So where few answers are kept, the model is asked again
while its answer's opening is steered along the mean difference of the prompts with and without the instruction (which
needs no answers), and writes the rest of it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import Change, Forced, forcing, passes
from trimtab.engines.transformers.read import Text
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import contrast
from trimtab.learn.teachers import Teacher
from trimtab.steering import Add, Edit, Positions, Site, Steering
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.lm import LM

Check = Callable[[str, str, bool], bool]
"""`check(query, answer, cut)`: whether an answer does what the teacher says; `cut` if the token limit stopped it."""

OPENING = 8
"""So many tokens of an answer are steered when the model is helped to begin."""
TRIES = 3
HELP = (0.6, 1.0)
"""How strongly, in mean differences, the first time that help is needed and the second."""
OFTEN = 0.5
"""A model that does what it is told in this share of answers isn't helped."""
HELP_DEPTH = 0.6
PER_QUERY = 2
"""So many answers to one query are learned from, at most."""
ENOUGH = 0.75
"""The share of queries with that many answers, from which on the model isn't asked again."""
TO_THE_POINT = 0.75
"""The share of answers that are kept by what they say about their queries."""
LEAST = 8
"""Fewer answers than this are too few to learn from."""
MARGIN = 0.05
"""Where nothing checks the answers: how much likelier an answer is with the teacher's prompt than without, at least, in
nats a token."""
BATCH = 32


@dataclass(frozen=True)
class Lesson:
    """An answer that was kept: `asked` and `plain` are the prompts' ids with and without what the teacher says.

    The first `helped` tokens of the answer were written under the `help`.
    """

    query: str
    turn: int
    asked: tuple[int, ...]
    plain: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    helped: int = 0
    help: Steering | None = None


@dataclass(frozen=True)
class Answers:
    """What was made and what was kept: the lessons, and for each try how many answers were kept of how many."""

    lessons: tuple[Lesson, ...]
    tries: tuple[tuple[float, int, int], ...]  # the strength of the help, kept, asked


def own_answers(
    lm: LM,
    teacher: Teacher,
    queries: Sequence[str],
    *,
    check: Check | None,
    tokens: int,
    progress: Callable[[int, int], None] | None = None,
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
        TrimtabError: Fewer than `LEAST` answers were kept.
    """
    made = _Making(lm, teacher, check, tokens)
    found: dict[str, list[Lesson]] = {query: [] for query in queries}
    tries: list[tuple[float, int, int]] = []
    helps, strength, total = iter(HELP), 0.0, TRIES * len(queries)
    ways: set[tuple[float, int]] = set()
    for turn in range(TRIES):
        lacking = [query for query in queries if len(found[query]) < PER_QUERY]
        way = (strength, turn % teacher.turns)
        if len(lacking) <= (1 - ENOUGH) * len(queries) or way in ways:  # asked the same way, it answers the same
            break
        ways.add(way)
        report = None if progress is None else _after(progress, turn * len(queries), total)
        new = made.answers(lacking, turn, strength, report)
        for one in new:
            if all(one.answer != other.answer for other in found[one.query]):
                found[one.query].append(one)
        tries.append((strength, len(new), len(lacking)))
        if len(new) < OFTEN * len(lacking):
            strength = next(helps, strength)
    candidates = [one for query in queries for one in found[query]]
    if len(candidates) < LEAST:
        raise TrimtabError(
            f"of {sum(asked for _, _, asked in tries)} answers that the model wrote under this prompt,"
            f" {len(candidates)} do what it says; {LEAST} are needed. Say it in other words, give examples, or more"
            " queries"
        )
    lessons = _to_the_point(lm, made, candidates)
    if progress is not None:
        progress(total, total)
    return Answers(tuple(lessons), tuple(tries))


def _after(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, total)


@dataclass
class _Making:
    """Makes answers and judges them; what all tries need is made once."""

    lm: LM
    teacher: Teacher
    check: Check | None
    tokens: int
    _towards: Steering | None = None

    def answers(
        self, queries: Sequence[str], turn: int, strength: float, progress: Callable[[int, int], None] | None
    ) -> list[Lesson]:
        """The answers to these queries that do what the teacher says, helped so strongly."""
        help_ = strength * self.towards(queries) if strength else None
        prompts = [self.teacher.ask(query, turn) for query in queries]
        answers = self.lm.generate(
            prompts,
            help_,
            system=self.teacher.system,
            max_new_tokens=self.tokens,
            batch_size=BATCH,
            progress=progress,
        )
        made = []
        for query, answer in zip(queries, answers, strict=True):
            if not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT:
                continue
            if self.check is not None and not self.check(query, answer.text, answer.finish_reason == "length"):
                continue
            ids = tuple(answer.token_ids)
            helped = min(OPENING, len(ids)) if help_ is not None else 0
            plain = tuple(self.lm.encode(query))
            made.append(Lesson(query, turn, self.asked(query, turn), plain, ids, answer.text, helped, help_))
        return made if self.check is not None else _likelier(self.lm, made)

    def asked(self, query: str, turn: int) -> tuple[int, ...]:
        return tuple(self.lm.encode(self.teacher.ask(query, turn), system=self.teacher.system))

    def towards(self, queries: Sequence[str]) -> Steering:
        """The mean difference of the prompts' last tokens, which acts while an answer begins."""
        if self._towards is None:
            layer = min(round(HELP_DEPTH * self.lm.layout.layers), self.lm.layout.layers - 1)
            sides = [(self.asked(query, turn), self.lm.encode(query)) for turn, query in enumerate(queries)]
            pairs = [(Text(asked, [len(asked) - 1]), Text(plain, [len(plain) - 1])) for asked, plain in sides]
            difference = contrast(self.lm, pairs, [layer])[layer].difference.float()
            self._towards = Steering((Edit(Site(layer), Add(difference), Positions.opening(OPENING)),))
        return self._towards


def _to_the_point(lm: LM, made: _Making, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Of each query's answers the two that say most about it, without the quarter of all that says least.

    What an answer says about its query is how much more likely it is after it than after another query under the same
    teacher: the pointwise mutual information, in nats.
    """
    queries = list(dict.fromkeys(one.query for one in lessons))
    other = dict(zip(queries, [*queries[1:], queries[0]], strict=True))
    own = logprobs(lm, [Forced(one.asked, one.answer) for one in lessons])
    swapped = logprobs(lm, [Forced(made.asked(other[one.query], one.turn), one.answer) for one in lessons])
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


def help_changes(lesson: Lesson) -> dict[Site, Change]:
    """What the help adds, as a change of a teacher-forced pass."""
    if lesson.help is None:
        return {}
    return {edit.site: _adding(edit.strength * edit.operation.direction) for edit in lesson.help.edits}


def _adding(vector: Tensor) -> Change:
    return lambda x: vector.to(x.device, x.dtype).expand_as(x)
