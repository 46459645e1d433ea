"""Answers that a model gives under a prompt: which are kept, which help they get, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import prompt

from trimtab import LM, Add, Edit, Positions, Site, Steering, TrimtabError
from trimtab.engines.transformers.forced import PromptAnswer, teacher_forcing
from trimtab.learn import own_answers as module
from trimtab.learn.own_answers import (
    MARGIN,
    MAX_PER_QUERY,
    MIN_ANSWERS,
    OPENING,
    SHORTLIST,
    TRIAL_QUERIES,
    AnswerGenerator,
    Answers,
    AskMode,
    Lesson,
    generate_own_answers,
    logprobs,
)
from trimtab.learn.teachers import Teacher
from trimtab.text.repetition import repeated_share

QUERIES = [prompt(i, 3 + i % 4) for i in range(16)]
PHRASINGS = ("w7 w8", "w9 w9 w9", "w77")
TEACHER = Teacher(PHRASINGS)
TOKENS = 12


@pytest.fixture(scope="module")
def lm() -> LM:
    """Of all tiny models one whose answers seldom loop."""
    return tiny.tiny("llama", seed=1, dtype=torch.float32)


def anything(_query: str, _answer: str, _cut: bool) -> bool:
    return True


def kept_by(check: Any, teacher: Teacher = TEACHER, *, lm: LM, **more: Any) -> Answers:
    return generate_own_answers(lm, teacher, QUERIES, check=check, tokens=TOKENS, **more)


def watched(lm: LM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], Any, dict[str, Any]]]:
    """What the model was asked, under which steering."""
    calls: list[Any] = []
    generate = lm.generate

    def recorded(prompts: Any, steering: Any = None, **more: Any) -> Any:
        calls.append((prompts, steering, more))
        return generate(prompts, steering, **more)

    monkeypatch.setattr(lm, "generate", recorded)
    return calls


def odd(_query: str, answer: str, _cut: bool) -> bool:
    """About a half of all answers do this."""
    return int(answer.split()[0][1:]) % 2 == 1


# ---- what is kept --------------------------------------------------------------------------------------------


def test_lessons_are_what_the_model_answers(lm: LM) -> None:
    kept = kept_by(anything, lm=lm)
    for lesson in kept.lessons:
        assert lesson.instructed == tuple(lm.encode(TEACHER.ask(lesson.query, lesson.variant)))
        assert lesson.plain == tuple(lm.encode(lesson.query))
        (answer,) = lm.generate(TEACHER.ask(lesson.query, lesson.variant), max_new_tokens=TOKENS)
        assert (lesson.answer, lesson.text) == (tuple(answer.token_ids), answer.text)
        assert lesson.help is None


def test_the_check_is_asked_of_every_answer_and_obeyed(lm: LM) -> None:
    checked: list[tuple[str, str, bool]] = []

    def check(query: str, answer: str, cut: bool) -> bool:
        checked.append((query, answer, cut))
        return odd(query, answer, cut)

    kept = kept_by(check, lm=lm)
    assert kept.lessons
    assert all(odd(lesson.query, lesson.text, True) for lesson in kept.lessons)
    assert {(lesson.query, lesson.text, True) for lesson in kept.lessons} < set(checked)  # no end of text: all are cut
    assert sum(attempt.kept for attempt in kept.attempts) == sum(odd(*call) for call in checked)


def test_whether_the_limit_cut_an_answer_is_told(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = lm.generate(TEACHER.ask(QUERIES[0], 0), max_new_tokens=TOKENS)[0].token_ids[4]
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", int(ends))
    cuts: list[tuple[str, bool]] = []
    kept = kept_by(lambda query, answer, cut: cuts.append((query, cut)) or True, lm=lm)
    assert (QUERIES[0], False) in cuts
    assert {cut for _, cut in cuts} == {True, False}
    whole = [lesson for lesson in kept.lessons if len(lesson.answer) < TOKENS]
    assert all(lesson.answer[-1] == ends for lesson in whole)  # how an answer ends is learned, too


def test_at_most_two_a_query_and_each_but_once(lm: LM) -> None:
    kept = kept_by(anything, lm=lm)
    counts = Counter(lesson.query for lesson in kept.lessons)
    assert max(counts.values()) <= MAX_PER_QUERY
    assert len({(lesson.query, lesson.answer) for lesson in kept.lessons}) == len(kept.lessons)
    assert [lesson.query for lesson in kept.lessons] == sorted(
        (lesson.query for lesson in kept.lessons), key=QUERIES.index
    )


def test_answers_that_turn_in_circles_or_are_empty_are_left_out(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    generate = lm.generate

    def looping(prompts: Any, *args: Any, **more: Any) -> Any:
        answers = generate(prompts, *args, **more)
        texts = {0: "w5 " * TOKENS, 1: "  "}
        return [replace(original, text=texts.get(i, original.text)) for i, original in enumerate(answers)]

    monkeypatch.setattr(lm, "generate", looping)
    kept = kept_by(lambda _q, answer, _c: checked.append(answer) or True, lm=lm)
    assert not any("w5 w5 w5 w5" in answer or not answer.strip() for answer in checked)
    assert all(repeated_share(lesson.text) <= module.REPEATED_LIMIT for lesson in kept.lessons)
    assert kept.attempts[0].kept <= len(QUERIES) - 2


def test_too_few_are_an_error_that_says_what_to_do(lm: LM) -> None:
    few = set(QUERIES[: MIN_ANSWERS // 2 - 1])
    with pytest.raises(
        TrimtabError, match=rf"of \d+ answers .* {MIN_ANSWERS} are needed.*give examples or more queries"
    ):
        kept_by(lambda query, _answer, _cut: query in few, lm=lm)
    with pytest.raises(TrimtabError, match=r"^0 of 184 answers written under this prompt follow it"):
        kept_by(lambda *_: False, lm=lm)


def test_without_a_check_answers_are_kept_that_the_prompt_makes_likelier(lm: LM) -> None:
    kept = kept_by(None, lm=lm)
    likelihoods = logprobs(lm, [PromptAnswer(lesson.instructed, lesson.answer) for lesson in kept.lessons])
    bare = logprobs(lm, [PromptAnswer(lesson.plain, lesson.answer) for lesson in kept.lessons])
    gains = [float((a - b).mean()) for a, b in zip(likelihoods, bare, strict=True)]
    assert min(gains) >= MARGIN
    monkey = pytest.MonkeyPatch()
    monkey.setattr(module, "MARGIN", sorted(gains)[len(gains) // 2])
    try:
        assert kept_by(None, lm=lm).attempts[0].kept < kept.attempts[0].kept
    finally:
        monkey.undo()


def test_log_probabilities_are_the_models_own(lm: LM) -> None:
    texts = [PromptAnswer(tuple(lm.encode(prompt(i, 1 + i))), tuple(lm.encode(prompt(40 + i, 4)))) for i in range(5)]
    for text, result in zip(texts, logprobs(lm, texts), strict=True):
        with torch.no_grad():
            whole = lm.model(input_ids=torch.tensor([[*text.prompt, *text.answer]])).logits[0].log_softmax(-1)
        expected = [float(whole[len(text.prompt) - 1 + i, token]) for i, token in enumerate(text.answer)]
        assert result.tolist() == pytest.approx(expected, abs=1e-4)


# ---- how often it is asked -----------------------------------------------------------------------------------


def test_phrasings_take_turns(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(lm, monkeypatch)
    kept_by(anything, lm=lm)
    for (prompts, _, _), said in zip(calls, PHRASINGS, strict=False):
        assert all(text.endswith(said) for text in prompts)
    assert len(calls) >= 2


def test_what_was_asked_the_same_way_is_not_asked_again(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers to the same prompts are the same."""
    calls = watched(lm, monkeypatch)
    kept = kept_by(anything, Teacher(PHRASINGS[:1]), lm=lm)
    assert len(calls) == 1
    assert len(kept.attempts) == 1
    assert len(kept.lessons) == max(MIN_ANSWERS, round(0.75 * kept.attempts[0].kept))


def test_queries_that_have_their_answers_are_not_asked_again(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(lm, monkeypatch)
    kept_by(lambda query, _answer, _cut: query in QUERIES[:10], lm=lm)
    assert [len(prompts) for prompts, _, _ in calls] == [16, 16, 6]


def test_progress_goes_on_to_the_end(lm: LM) -> None:
    reported: list[tuple[int, int]] = []
    kept_by(anything, lm=lm, progress=lambda done, total: reported.append((done, total)))
    assert reported == sorted(reported)
    assert reported[-1][0] == reported[-1][1] == 3 * len(QUERIES)


def test_it_is_said_beside_the_system_message(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        lm.tokenizer,
        "chat_template",
        "{% for m in messages %}{% if m.role == 'system' %}w70{% else %}w71{% endif %} {{ m.content }} {% endfor %}w72",
    )
    kept = kept_by(anything, Teacher(system="w5 w6"), lm=lm)
    for lesson in kept.lessons:
        assert lm.tokenizer.decode(lesson.instructed) == f"w70 w5 w6 w71 {lesson.query} w72"
        assert lm.tokenizer.decode(lesson.plain) == f"w71 {lesson.query} w72"


# ---- the help ------------------------------------------------------------------------------------------------


def rarely(limit: int) -> Callable[[str, str, bool], bool]:
    """Of the first try nothing is kept, of later ones everything."""
    calls = Counter[str]()

    def check(_query: str, _answer: str, _cut: bool) -> bool:
        calls["asked"] += 1
        return calls["asked"] > limit

    return check


def test_a_model_that_does_as_told_is_not_helped(lm: LM) -> None:
    assert all(attempt.help == "" for attempt in kept_by(anything, lm=lm).attempts)


def test_help_acts_on_the_opening_or_on_all_of_the_answer(lm: LM) -> None:
    kept = kept_by(rarely(16 + 5 * TRIAL_QUERIES), lm=lm)
    assert [attempt.help for attempt in kept.attempts][:3] == ["", "said in other ways", "tried at several blocks"]
    helped = [taught for taught in kept.accepted if taught.help is not None]
    counts = {Positions.opening(OPENING): OPENING, Positions.from_last_prompt_token(): TOKENS}
    assert {edit.positions for taught in helped if taught.help for edit in taught.help.edits} == set(counts)
    for lesson in helped[::6]:
        assert lesson.help is not None
        (edit,) = lesson.help.edits
        assert module.helped_token_count(lesson) == min(counts[edit.positions], len(lesson.answer))
        (answer,) = lm.generate(TEACHER.ask(lesson.query, lesson.variant), lesson.help, max_new_tokens=TOKENS)
        assert lesson.answer == tuple(answer.token_ids)


def test_help_is_the_mean_difference_of_the_prompts_with_and_without(lm: LM) -> None:
    helps = AnswerGenerator(lm, TEACHER, odd, TOKENS).candidate_helps(QUERIES, 1)
    assert len(helps) == len(set(helps)) == 12
    for help_ in helps[::5]:
        (edit,) = help_.edits
        assert edit.strength in module.HELP_STRENGTHS
        total = torch.zeros(tiny.WIDTH, dtype=torch.float64)
        for query in QUERIES:
            instructed, bare = (
                next(iter(lm.capture(text, [edit.site.layer])[0].values()))[0]
                for text in (TEACHER.ask(query, 1), query)
            )
            total += (instructed - bare).double()
        assert torch.allclose(edit.operation.direction.double(), total / len(QUERIES), atol=1e-4)


# ---- which way is best ---------------------------------------------------------------------------------------


def test_what_is_said_in_other_words_or_once_more_comes_before_help(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(lm, monkeypatch)
    made = AnswerGenerator(lm, TEACHER, anything, TOKENS)
    ways, tries, best = made.find_best_modes(QUERIES, [])
    assert [len(prompts) for prompts, _, _ in calls] == [5 * TRIAL_QUERIES]
    assert [attempt.help for attempt in tries] == ["said in other ways"]
    assert {way.variant for way in ways} < {1, 2, 3, 4, 5}  # the first is what failed
    assert all(way.help is None for way in ways)
    assert tries[0].kept == len(best)


def test_where_words_are_not_enough_help_is_tried_with_the_best_of_them(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watched(lm, monkeypatch)
    ids = {tuple(lm.encode(TEACHER.ask(query, 5))) for query in QUERIES}
    answers = {
        answer.text for answer in lm.generate([TEACHER.ask(query, 5) for query in QUERIES], max_new_tokens=TOKENS)
    }
    calls.clear()
    check = lambda _query, answer, _cut: answer in answers and len(answer) % 3 == 0  # noqa: E731
    ways, tries, best = AnswerGenerator(lm, TEACHER, check, TOKENS).find_best_modes(QUERIES, [])
    assert {lesson.instructed for lesson in best if lesson.help is None} <= ids
    assert [attempt.help for attempt in tries] == ["said in other ways", "tried at several blocks"]
    assert tries[0].asked == 5 * TRIAL_QUERIES
    assert 0 < tries[0].kept < TRIAL_QUERIES / 2
    prompts, helps, _ = calls[1]
    assert len(prompts) == 12 * TRIAL_QUERIES
    assert None not in helps
    assert all(text.endswith(" ".join([PHRASINGS[2]] * 2)) for text in prompts)
    assert len(ways) == 2


def test_what_can_be_said_in_one_way_only_gets_help_at_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(lm, monkeypatch)
    kept = kept_by(rarely(14), Teacher(text="w5 w6 w7"), lm=lm)
    assert [attempt.help for attempt in kept.attempts][:2] == ["", "tried at several blocks"]
    assert [len(prompts) for prompts, _, _ in calls][:2] == [16, 12 * TRIAL_QUERIES]


def test_the_best_are_those_followed_often_whose_answers_say_most(lm: LM) -> None:
    made = AnswerGenerator(lm, TEACHER, odd, TOKENS)
    ways, _, best = made.find_best_modes(QUERIES, [])
    counts = Counter(best_lesson.ask_mode for best_lesson in best)
    says: Counter[AskMode] = Counter()
    for lesson, nats in zip(best, made.specificities(best), strict=True):
        says[lesson.ask_mode] += nats  # type: ignore[assignment]
    often = {way for way, _ in counts.most_common(SHORTLIST)}
    least = min(counts[way] for way in often)
    assert all(counts[way] >= least for way in ways)
    assert says[ways[0]] >= says[ways[1]]


def test_ways_are_tried_on_queries_that_have_no_answer_yet(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(lm, monkeypatch)
    made = AnswerGenerator(lm, TEACHER, anything, TOKENS)
    good = made.generate([(query, AskMode(0)) for query in QUERIES[:12]])
    made.find_best_modes(QUERIES, good)
    prompts, _, _ = calls[1]
    assert {text for text in prompts if any(text.startswith(f"{query} ") for query in QUERIES[:12])} == set()
    assert len(prompts) == 5 * len(QUERIES[12:])


def test_where_one_way_is_not_enough_the_next_is_tried(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watched(lm, monkeypatch)
    with pytest.raises(TrimtabError):
        kept_by(lambda *_: False, lm=lm)
    assert [len(prompts) for prompts, _, _ in calls] == [16, 5 * TRIAL_QUERIES, 12 * TRIAL_QUERIES, 16, 16]
    rounds = [list(zip(prompts, helps, strict=True)) for prompts, helps, _ in calls]
    assert not set(rounds[3]) & set(rounds[4])
    assert not set(rounds[0]) & set(rounds[3])


@pytest.mark.parametrize("operation", [Add(tiny.direction(1)), tiny.read_write(2, 3)])
def test_help_as_changes_is_help(lm: LM, operation: Any) -> None:
    """Whatever the operation: what was learned may be the help."""
    help_ = 0.6 * Steering((Edit(Site(1), operation),))
    text = PromptAnswer(tuple(lm.encode(prompt(1, 5))), tuple(lm.encode(prompt(2, 4))))
    with teacher_forcing(lm.model, lm.layout, [Site(1)]) as run, torch.no_grad():
        (result,) = run.logits([text], module.help_changes(help_))
    with lm.steered(help_, prompt_lengths=[5]), torch.no_grad():
        ids = torch.tensor([[*text.prompt, *text.answer[:-1]]])
        expected = lm.model(input_ids=ids, use_cache=False).logits[0, 4:]
    assert torch.allclose(result, expected, atol=1e-3)
    assert module.helped_token_count(Lesson("w3", 0, (3,), (3,), (4, 5), "w4 w5", help_)) == 2
    assert module.helped_token_count(Lesson("w3", 0, (3,), (3,), (4, 5), "w4 w5")) == 0


# ---- what they say -------------------------------------------------------------------------------------------


def candidates(lm: LM) -> tuple[Any, list[Lesson]]:
    """Three answers a query, though not to every one."""
    made = AnswerGenerator(lm, TEACHER, anything, TOKENS)
    lessons = [
        answer
        for turn in range(3)
        for answer in made.generate([(query, AskMode(turn)) for query in QUERIES[: 12 - turn]])
    ]
    return made, sorted(lessons, key=lambda answer: QUERIES.index(answer.query))


@torch.no_grad()
def naive_says(lm: LM, lesson: Lesson, other: str) -> float:
    """How much likelier an answer is after its query than after another."""
    likelihoods = []
    for query in (lesson.query, other):
        instructed = lm.encode(TEACHER.ask(query, lesson.variant))
        whole = lm.model(input_ids=torch.tensor([[*instructed, *lesson.answer]])).logits[0].double().log_softmax(-1)
        likelihoods.append(sum(float(whole[len(instructed) - 1 + i, token]) for i, token in enumerate(lesson.answer)))
    return likelihoods[0] - likelihoods[1]


def test_those_are_kept_that_say_most_about_their_queries(lm: LM) -> None:
    made, lessons = candidates(lm)
    kept = module._most_specific(made, lessons)
    queries = list(dict.fromkeys(lesson.query for lesson in lessons))
    says = {
        (lesson.query, lesson.variant): naive_says(
            lm, lesson, queries[(queries.index(lesson.query) + 1) % len(queries)]
        )
        for lesson in lessons
    }
    best = []
    for query in queries:
        mine = sorted(
            (lesson for lesson in lessons if lesson.query == query),
            key=lambda lesson: -says[lesson.query, lesson.variant],
        )
        best += mine[:MAX_PER_QUERY]
    count = max(MIN_ANSWERS, round(module.SPECIFIC_SHARE * len(best)))
    expected = sorted(best, key=lambda lesson: -says[lesson.query, lesson.variant])[:count]
    assert len(kept) == count < len(best)
    assert {(lesson.query, lesson.variant) for lesson in kept} == {
        (lesson.query, lesson.variant) for lesson in expected
    }
    assert [lesson.query for lesson in kept] == sorted((lesson.query for lesson in kept), key=queries.index)


def test_it_answers_the_same_again(lm: LM) -> None:
    assert kept_by(odd, lm=lm) == kept_by(odd, lm=lm)
