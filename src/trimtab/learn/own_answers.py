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
from trimtab.text.chat import Prompt
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

if TYPE_CHECKING:
    from trimtab.lm import LM

Check = Callable[[str, str, bool], bool]
"""`check(query, answer, cut)`: whether an answer does what the teacher says; `cut` if the token limit stopped it."""

OPENING = 8
"""So many tokens of an answer are steered when the model is helped to begin."""
HELP = (0.6, 1.0)
"""How strongly, in mean differences, one try after another."""
HELP_DEPTH = 0.6
ENOUGH = 0.75
"""The share of queries with an answer that is kept, from which on the model isn't asked again."""
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
    asked_of = {query: [_encode(lm, teacher, query, turn) for turn in range(teacher.turns)] for query in queries}
    plain_of = {query: tuple(lm.encode(query)) for query in queries}
    kept: dict[str, list[Lesson]] = {query: [] for query in queries}
    tries: list[tuple[float, int, int]] = []
    plans = [(0, 0.0), *((turn + 1, strength) for turn, strength in enumerate(HELP))]
    total, done = len(plans) * len(queries), 0
    towards: Steering | None = None
    for turn, strength in plans:
        open_ = [query for query in queries if not kept[query]] if tries else list(queries)
        if tries and len(open_) <= (1 - ENOUGH) * len(queries):
            break
        if strength and towards is None:
            towards = _towards(lm, [(asked_of[query][0], plain_of[query]) for query in queries])
        help_ = strength * towards if strength and towards is not None else None
        before = sum(map(len, kept.values()))
        prompts = [teacher.ask(query, turn) for query in open_]
        system = teacher.system
        report = None if progress is None else lambda n, _, d=done: progress(d + n, total)
        answers = lm.generate(prompts, help_, system=system, max_new_tokens=tokens, batch_size=BATCH, progress=report)
        made = [
            Lesson(
                query,
                asked_of[query][turn % teacher.turns],
                plain_of[query],
                tuple(answer.token_ids),
                answer.text,
                min(OPENING, len(answer.token_ids)) if help_ is not None else 0,
                help_,
            )
            for query, answer in zip(open_, answers, strict=True)
            if answer.token_ids and answer.text.strip() and repeated_share(answer.text) <= REPEATED_LIMIT
        ]
        cut = {
            (query, answer.text): answer.finish_reason == "length" for query, answer in zip(open_, answers, strict=True)
        }
        if check is None:
            good = _likelier(lm, made)
        else:
            good = [one for one in made if check(one.query, one.text, cut[one.query, one.text])]
        for one in good:
            kept[one.query].append(one)
        done += len(queries)
        tries.append((strength, sum(map(len, kept.values())) - before, len(open_)))
    lessons = tuple(one for query in queries for one in kept[query])
    if len(lessons) < LEAST:
        raise TrimtabError(
            f"of {sum(asked for _, _, asked in tries)} answers that the model wrote under this prompt, {len(lessons)}"
            f" do what it says; {LEAST} are needed. Say it in other words, give examples, or more queries"
        )
    if progress is not None:
        progress(total, total)
    return Answers(lessons, tuple(tries))


def _encode(lm: LM, teacher: Teacher, query: str, turn: int) -> tuple[int, ...]:
    prompt: Prompt = teacher.ask(query, turn)
    return tuple(lm.encode(prompt, system=teacher.system))


def _towards(lm: LM, prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Steering:
    """The mean difference of the prompts' last tokens, which acts while an answer begins."""
    layer = round(HELP_DEPTH * lm.layout.layers)
    pairs = [(Text(asked, [len(asked) - 1]), Text(plain, [len(plain) - 1])) for asked, plain in prompts]
    difference = contrast(lm, pairs, [layer])[layer].difference.float()
    return Steering((Edit(Site(layer), Add(difference), Positions.opening(OPENING)),))


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
