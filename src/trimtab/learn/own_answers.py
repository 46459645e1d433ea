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

from trimtab.engines.folding import as_rows, kernel_call
from trimtab.engines.request import Text
from trimtab.engines.transformers.forced import Change, PromptAnswer, group_by_pass, teacher_forcing
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
MAX_ATTEMPTS = 3
SUFFICIENT_SHARE = 0.5
"""If at least this share of answers follows the teacher, the model isn't helped by a steering."""
HELP_DEPTHS, HELP_STRENGTHS = (0.3, 0.5, 0.7), (0.6, 1.2)
TRIAL_QUERIES = 8
"""The number of queries on which ways of asking are tried: first phrasings, each repeated as often as the teacher does
and once more; then helps, at several depths and strengths (in mean differences), at the opening or throughout."""
PHRASINGS = 4
SHORTLIST = 4
"""Among this many ways that are followed most often, the two with the most query-specific answers are used."""
MAX_PER_QUERY = 2
"""The maximum number of answers per query to learn from."""
COMPLETE_SHARE = 0.75
"""If at least this share of queries has that many answers, the model isn't asked again."""
SPECIFIC_SHARE = 0.75
"""The share of answers that are kept, ranked by how specific they are to their queries."""
OPENING_POSITIONS, ANSWER_POSITIONS = Positions.opening(OPENING), Positions.from_last_prompt_token()
MIN_ANSWERS = 8
"""The minimum number of answers to learn from."""
MARGIN = 0.05
"""Without a `check`: the minimum gain in an answer's log-probability from the teacher's prompt, in nats per token."""
BATCH = 64


class TooFewAnswersError(TrimtabError):
    """Too few answers of the model follow its prompt to learn from them."""


@dataclass(frozen=True)
class AskMode:
    """A way of asking: the teacher's `variant`, and a steering that helps while the model answers."""

    variant: int
    help: Steering | None = None


@dataclass(frozen=True)
class Lesson:
    """An answer to learn from. `instructed` and `plain` are the token ids of the prompt with and without the teacher.

    `variant` selects the teacher's phrasing, and `help` is the steering under which the answer was generated.
    """

    query: str
    variant: int
    instructed: tuple[int, ...]
    plain: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    help: Steering | None = None

    @property
    def ask_mode(self) -> AskMode:
        """The way of asking."""
        return AskMode(self.variant, self.help)


@dataclass(frozen=True)
class Attempt:
    """One round of generating answers: the help (`""`: none), the number of answers generated, and the number kept."""

    help: str
    asked: int
    kept: int


@dataclass(frozen=True)
class Answers:
    """Generated answers: all that follow the teacher, those to learn from, and the rounds of generation."""

    accepted: tuple[Lesson, ...]
    lessons: tuple[Lesson, ...]
    attempts: tuple[Attempt, ...]

    @property
    def answered_count(self) -> int:
        """The number of queries that have an answer."""
        return len({lesson.query for lesson in self.accepted})


def generate_own_answers(
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
        TooFewAnswersError: Fewer than `MIN_ANSWERS` answers were kept, counting at most two per query.
    """
    generator = AnswerGenerator(lm, teacher, check, tokens)
    accepted: list[Lesson] = []
    attempts: list[Attempt] = []
    modes, tried_modes, searched = [AskMode(0)], set[AskMode](), False
    total = MAX_ATTEMPTS * len(queries)
    for number in range(MAX_ATTEMPTS):
        incomplete = _incomplete_queries(queries, accepted)
        modes = [mode for mode in modes if mode not in tried_modes]  # the same way would give the same answers
        if not modes or len(incomplete) <= (1 - COMPLETE_SHARE) * len(queries):
            break
        way = modes.pop(0)
        tried_modes.add(way)
        report = None if progress is None else _offset_progress(progress, number * len(queries), total)
        new = generator.generate([(query, way) for query in incomplete], report)
        accepted = _without_duplicates([*accepted, *new])
        attempts.append(Attempt(_help_name(way.help), len(incomplete), len(new)))
        if len(new) >= SUFFICIENT_SHARE * len(incomplete):
            modes = [AskMode((way.variant + 1) % teacher.phrasing_count, way.help)]
        elif not searched and number < MAX_ATTEMPTS - 1:
            searched = True
            modes, trial_attempts, new_lessons = generator.find_best_modes(incomplete, accepted)
            accepted = _without_duplicates([*accepted, *new_lessons])
            attempts += trial_attempts
    if sum(min(count, MAX_PER_QUERY) for count in Counter(lesson.query for lesson in accepted).values()) < MIN_ANSWERS:
        raise TooFewAnswersError(
            f"{len(accepted)} of {sum(attempt.asked for attempt in attempts)} answers written under this prompt follow"
            f" it; {MIN_ANSWERS} are needed, at most {MAX_PER_QUERY} per query. Reword the prompt, or give examples or"
            " more queries"
        )
    if progress is not None:
        progress(total, total)
    return Answers(tuple(accepted), tuple(_most_specific(generator, accepted)), tuple(attempts))


def _incomplete_queries(queries: Sequence[str], good: Sequence[Lesson]) -> list[str]:
    """The queries with fewer than `MAX_PER_QUERY` answers."""
    counts = Counter(lesson.query for lesson in good)
    return [query for query in queries if counts[query] < MAX_PER_QUERY]


def _without_duplicates(lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons without duplicate answers to a query."""
    return list({(lesson.query, lesson.answer): lesson for lesson in reversed(lessons)}.values())[::-1]


def _help_name(help_: Steering | None) -> str:
    if help_ is None:
        return ""
    (edit,) = help_.edits
    return f"{edit.strength:g} at block {edit.site.layer}, {edit.positions}"


def _offset_progress(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


@dataclass(frozen=True)
class AnswerGenerator:
    """Generates answers under a teacher's prompt, and judges them."""

    lm: LM
    teacher: Teacher
    check: Check | None
    tokens: int

    def generate(self, rows: Sequence[tuple[str, AskMode]], progress: Progress | None = None) -> list[Lesson]:
        """Generate an answer to each query, asked in the given way, and return those that follow the teacher."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about doses: if a help is too strong, its answers aren't kept
            answers = self.lm.generate(
                [self.teacher.ask(query, mode.variant) for query, mode in rows],
                [way.help for _, way in rows],
                system=self.teacher.system,
                max_new_tokens=self.tokens,
                batch_size=BATCH,
                progress=progress,
            )
        generated = []
        for (query, way), answer in zip(rows, answers, strict=True):
            if not answer.text.strip() or repeated_share(answer.text) > REPEATED_LIMIT:
                continue
            if self.check is not None and not self.check(query, answer.text, answer.finish_reason == "length"):
                continue
            plain, ids = tuple(self.lm.encode(query)), tuple(answer.token_ids)
            generated.append(
                Lesson(query, way.variant, self.instructed(query, way.variant), plain, ids, answer.text, way.help)
            )
        return generated if self.check is not None else _more_likely_with_prompt(self.lm, generated)

    def instructed(self, query: str, turn: int) -> tuple[int, ...]:
        """The token ids of the teacher's prompt for this query."""
        return tuple(self.lm.encode(self.teacher.ask(query, turn), system=self.teacher.system))

    def find_best_modes(
        self, queries: Sequence[str], accepted: Sequence[Lesson]
    ) -> tuple[list[AskMode], list[Attempt], list[Lesson]]:
        """The two best ways of asking, the best one first, and the rounds and kept answers of trying them.

        Ways are tried on a few of the queries.

        Args:
            queries: The queries to choose from.
            accepted: The existing answers. Queries without any are preferred.
        """
        answered_queries = {lesson.query for lesson in accepted}
        candidate_queries = [query for query in queries if query not in answered_queries] or list(queries)
        sample_queries = candidate_queries[:: max(1, len(candidate_queries) // TRIAL_QUERIES)][:TRIAL_QUERIES]
        phrasing_modes = [AskMode(variant) for variant in self.teacher.prompt_variants(PHRASINGS)][1:]
        lessons = (
            self.generate([(query, mode) for mode in phrasing_modes for query in sample_queries])
            if phrasing_modes
            else []
        )
        attempts = (
            [Attempt("said in other ways", len(phrasing_modes) * len(sample_queries), len(lessons))]
            if phrasing_modes
            else []
        )
        counts = Counter(lesson.ask_mode for lesson in lessons)
        best = max([AskMode(0), *phrasing_modes], key=lambda way: counts[way])
        help_modes: list[AskMode] = []
        if counts[best] < SUFFICIENT_SHARE * len(sample_queries):
            help_modes = [AskMode(best.variant, help_) for help_ in self.candidate_helps(queries, best.variant)]
            help_lessons = self.generate([(query, way) for way in help_modes for query in sample_queries])
            attempts.append(
                Attempt("tried at several blocks", len(sample_queries) * len(help_modes), len(help_lessons))
            )
            lessons += help_lessons
            counts = Counter(lesson.ask_mode for lesson in lessons)
        ranked = sorted([*phrasing_modes, *help_modes], key=lambda way: -counts[way])[:SHORTLIST]
        shortlist_lessons = [lesson for lesson in lessons if lesson.ask_mode in ranked]
        specificity = dict.fromkeys(ranked, 0.0)
        for lesson, nats in zip(shortlist_lessons, self.specificities(shortlist_lessons), strict=True):
            specificity[lesson.ask_mode] += nats
        return sorted(ranked, key=lambda way: -specificity[way])[:2], attempts, lessons

    def candidate_helps(self, queries: Sequence[str], variant: int) -> list[Steering]:
        """The candidate helps: the mean difference of the prompts with and without the teacher, at several settings."""
        last = self.lm.layout.layers - 1
        layers = sorted({min(round(depth * self.lm.layout.layers), last) for depth in HELP_DEPTHS})
        sides = [(self.instructed(query, variant), self.lm.encode(query)) for query in queries]
        pairs = [
            (Text(instructed, [len(instructed) - 1]), Text(plain, [len(plain) - 1])) for instructed, plain in sides
        ]
        moments = contrast(self.lm, pairs, layers)
        return [
            strength * Steering((Edit(Site(layer), Add(moments[layer].difference.float()), where),))
            for where in (OPENING_POSITIONS, ANSWER_POSITIONS)
            for strength in HELP_STRENGTHS
            for layer in layers
        ]

    def specificities(self, lessons: Sequence[Lesson]) -> list[float]:
        """How specific each answer is to its query, in nats: its log-probability minus that after another query.

        Both are under the same teacher. This is an estimate of the pointwise mutual information.
        """
        queries = list(dict.fromkeys(lesson.query for lesson in lessons))
        other = dict(zip(queries, [*queries[1:], *queries[:1]], strict=True))
        own = logprobs(self.lm, [PromptAnswer(lesson.instructed, lesson.answer) for lesson in lessons])
        swapped = logprobs(
            self.lm,
            [PromptAnswer(self.instructed(other[lesson.query], lesson.variant), lesson.answer) for lesson in lessons],
        )
        return [float((a - b).sum()) for a, b in zip(own, swapped, strict=True)]


def _most_specific(made: AnswerGenerator, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The two most query-specific answers of each query, without the least specific quarter of all of them."""
    says = {id(lesson): nats for lesson, nats in zip(lessons, made.specificities(lessons), strict=True)}
    best: list[Lesson] = []
    for query in dict.fromkeys(lesson.query for lesson in lessons):
        mine = sorted((lesson for lesson in lessons if lesson.query == query), key=lambda lesson: -says[id(lesson)])
        best += mine[:MAX_PER_QUERY]
    ranked = sorted(best, key=lambda lesson: -says[id(lesson)])[: max(MIN_ANSWERS, round(SPECIFIC_SHARE * len(best)))]
    chosen = {id(lesson) for lesson in ranked}
    return [lesson for lesson in best if id(lesson) in chosen]


def _more_likely_with_prompt(lm: LM, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons whose answers are more likely with the teacher's prompt than without it, by `MARGIN`."""
    instructed = logprobs(lm, [PromptAnswer(lesson.instructed, lesson.answer) for lesson in lessons])
    bare = logprobs(lm, [PromptAnswer(lesson.plain, lesson.answer) for lesson in lessons])
    return [
        lesson
        for lesson, with_it, without in zip(lessons, instructed, bare, strict=True)
        if float((with_it - without).mean()) >= MARGIN
    ]


@torch.no_grad()
def logprobs(lm: LM, texts: Sequence[PromptAnswer]) -> list[Tensor]:
    """For each text, the unsteered log-probability of each token of its answer, `[answer tokens]`."""
    gathered: list[Tensor] = []
    with teacher_forcing(lm.model, lm.layout, []) as run, torch.no_grad():
        for numbers in group_by_pass(lm.model, texts):
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
        kernel, row = kernel_call([edit])
        changes[edit.site] = partial(_kernel_change, kernel, as_rows(row, torch.float32, [edit]))
    return changes


def _kernel_change(kernel: Kernel, rows: Rows, x: Tensor) -> Tensor:
    wide = x.float()
    return kernel(wide, {name: row.to(x.device) for name, row in rows.items()}) - wide


def helped_token_count(lesson: Lesson) -> int:
    """The number of the answer's tokens that were generated under the help."""
    if lesson.help is None:
        return 0
    opening = lesson.help.edits[0].positions == OPENING_POSITIONS
    return min(OPENING, len(lesson.answer)) if opening else len(lesson.answer)
