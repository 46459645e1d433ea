"""Words to include or exclude (IFEval's prompts with one keyword), lengths, and a letter case plus an excluded word.

As in Stolfo et al. (2410.12877, sections 4.2, 4.3 and 5): a word is excluded by subtracting the direction that includes
it, and lengths are steered along "be concise". Layers and strengths are chosen on the validation prompts that come with
the data, or, for lengths, on the package's own queries; the test prompts are only answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.choosing import (
    HELD_OUT_QUERIES,
    SEARCH_QUERIES,
    Moments,
    Task,
    choose,
    keep,
    kept,
    layers_of,
    say,
    steering_of,
)
from benchmarks.harness import Report
from benchmarks.measuring import evaluate, report
from trimtab.data import instruction_pairs, instruction_type, length_phrasings, queries
from trimtab.evaluate.ifeval import IFEvalItem, follows, read_ifeval
from trimtab.lm import LM
from trimtab.methods.instruct import learn_many
from trimtab.methods.words import WORD_QUERIES
from trimtab.steering import Steering

WORDS = {
    "include": ("keywords:existence", "keywords", "inclusion_validation", "ifeval_single_keyword_include", 1),
    "exclude": (
        "keywords:forbidden_words",
        "forbidden_words",
        "exclusion_validation",
        "ifeval_single_keyword_exclude",
        -1,
    ),
}
WEIGHTS = (1.0, 2.0, 4.0)
SENTENCES = "length_constraints:number_sentences"
AT_MOST = (1, 2, 3)


def words(
    model: str | None, data: Path, task: str, mode: str, folder: Path, tokens: int, tune_tokens: int, limit: int | None
) -> Report:
    """Words to `include` or `exclude`, `with` the instruction in the prompt or `without` it."""
    kind, argument, validation, test, sign = WORDS[task]
    lm = LM.load(model)
    folder.mkdir(parents=True, exist_ok=True)
    tried = spread(read_ifeval(data / "ifeval" / f"{validation}.jsonl"), SEARCH_QUERIES + HELD_OUT_QUERIES)
    items = read_ifeval(data / "ifeval" / f"{test}.jsonl", limit)
    moments = word_moments(lm, [item.kwargs[0][argument][0] for item in [*tried, *items]])
    chosen = keep(
        folder / f"{mode}-{task}.json",
        partial(
            choose,
            lm,
            Task(
                f"{mode} {task}",
                [item.prompt if mode == "with" else str(item.prompt_without_instruction) for item in tried],
                [item.prompt for item in tried],
                [moments[item.kwargs[0][argument][0]] for item in tried],
                lambda i, answer, _: follows(kind, tried[i].kwargs[0], answer, loose=False),
            ),
            [("add", sign * weight, None) for weight in WEIGHTS],
            tune_tokens,
        ),
    )
    steerings = {item.item: steering_of(moments[item.kwargs[0][argument][0]], chosen.setting) for item in items}
    records = evaluate(lm, items, steerings, mode, folder / f"{mode}-{task}-answers.jsonl", tokens)
    return report(lm, task, items, records, steerings, mode, {kind: chosen.setting})


def lengths(model: str | None, mode: str, folder: Path, tokens: int, tune_tokens: int) -> Report:
    """At most one, two or three sentences, steered along the direction of conciseness."""
    lm = LM.load(model)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = instruction_pairs(queries("learn"), length_phrasings("concise"))
    moments = learn_many(lm, {"concise": pairs}, layers_of(lm), progress=say("learning"))["concise"]
    tried = length_items(queries("tune", more=True)[: SEARCH_QUERIES + HELD_OUT_QUERIES])
    items = [item for most in AT_MOST for item in length_items(queries("test"), most)]
    chosen = keep(
        folder / f"{mode}-length.json",
        partial(
            choose,
            lm,
            Task(
                f"{mode} length",
                [item.prompt if mode == "with" else str(item.prompt_without_instruction) for item in tried],
                [item.prompt for item in tried],
                [moments] * len(tried),
                lambda i, answer, cut: not cut and follows(SENTENCES, tried[i].kwargs[0], answer, loose=False),
            ),
            [("add", weight, None) for weight in (0.5, 1.0, 2.0)],
            tune_tokens,
        ),
    )
    steerings = {item.item: steering_of(moments, chosen.setting) for item in items}
    records = evaluate(lm, items, steerings, mode, folder / f"{mode}-length-answers.jsonl", tokens)
    return report(lm, "length", items, records, steerings, mode, {SENTENCES: chosen.setting})


def length_items(base: Sequence[str], most: int | None = None) -> list[IFEvalItem]:
    """Queries with "at most N sentences"; without a number, with each of `AT_MOST` in turn."""
    items = []
    for i, query in enumerate(base):
        n = most or AT_MOST[i % len(AT_MOST)]
        text = f"{query} Answer using at most {n} sentence{'s' if n > 1 else ''}."
        kwargs = {"relation": "less than", "num_sentences": n + 1}
        items.append(IFEvalItem(f"{i}.{n}", str(i), text, (SENTENCES,), (kwargs,), query))
    return items


def word_moments(lm: LM, word_list: Sequence[str]) -> Mapping[str, Moments]:
    """The moments of "include the word W", for each word, at all layers that are tried."""
    kind = instruction_type("keywords:existence")
    base = queries("learn")[:WORD_QUERIES]
    sets = {word: instruction_pairs(base, kind.phrasings("learn", {"word": word})) for word in dict.fromkeys(word_list)}
    return learn_many(lm, sets, layers_of(lm), progress=say("learning"))


def spread(items: Sequence[IFEvalItem], count: int) -> list[IFEvalItem]:
    """`count` of the items, evenly spaced, so that they come from different queries."""
    return [items[i * len(items) // count] for i in range(count)]


def both(model: str | None, data: Path, mode: str, folder: Path, tokens: int, limit: int | None) -> Report:
    """A letter case and an excluded word at once, with the settings that were chosen for each alone.

    Raises `FileNotFoundError` if the single searches haven't been run in this folder.
    """
    lm = LM.load(model)
    items = read_ifeval(data / "ifeval" / "casing_plus_exclusion.jsonl", limit)
    cases = {item.types[0] for item in items}
    single = [f"{mode}-{name.replace(':', '-')}.json" for name in (*sorted(cases), "exclude")]
    if missing := [name for name in single if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder / missing[0]} isn't there; run following and words in this folder first")
    settings = {case: kept(folder / f"{mode}-{case.replace(':', '-')}.json").setting for case in cases}
    word = kept(folder / f"{mode}-exclude.json").setting
    excluded = word_moments(lm, [item.kwargs[1]["forbidden_words"][0] for item in items])
    base = queries("learn")[:WORD_QUERIES]
    sets = {case: instruction_pairs(base, instruction_type(case).phrasings("learn")) for case in sorted(cases)}
    cased = learn_many(lm, sets, layers_of(lm), progress=say("learning"))
    steerings: dict[str, Steering | None] = {}
    for item in items:
        parts = [
            steering_of(cased[item.types[0]], settings[item.types[0]]),
            steering_of(excluded[item.kwargs[1]["forbidden_words"][0]], word),
        ]
        there = [part for part in parts if part is not None]
        steerings[item.item] = sum(there[1:], start=there[0]) if there else None
    records = evaluate(lm, items, steerings, mode, folder / f"{mode}-both-answers.jsonl", tokens)
    return report(lm, "case and word", items, records, steerings, mode, settings)
