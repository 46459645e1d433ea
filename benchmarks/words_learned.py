"""Words and lengths again, each with its own learned steering: distilled, or from the word's logit.

All arms answer the same prompts: unsteered, steered and random directions without the instruction in the prompt (or
with it), and unsteered with the instruction said once and twice. Steerings are learned on the package's own queries and
phrasings; IFEval's prompts are only answered. Steerings and answers are stored in a folder, so that a run can be
resumed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

from benchmarks.choosing import BATCH, say
from benchmarks.following_distilled import kept_or_learned
from benchmarks.harness import BOOTSTRAP, Report, Result, Target
from benchmarks.machine import machine, versions
from benchmarks.measuring import perplexities_of
from benchmarks.words import AT_MOST, SENTENCES, WORDS, length_items
from trimtab.data import instruction_type, queries
from trimtab.data.types import Value
from trimtab.errors import TrimtabError
from trimtab.evaluate import on_topic
from trimtab.evaluate.answers import answer
from trimtab.evaluate.controls import means_for, random_like
from trimtab.evaluate.ifeval import IFEvalItem, follows, read_ifeval, scorer, with_repeated_instructions
from trimtab.evaluate.intervals import mcnemar, paired_bootstrap
from trimtab.evaluate.records import ArmPrompt, Record
from trimtab.learn.teachers import Teacher
from trimtab.learn.unembedding import unembedding
from trimtab.lm import LM, DoseWarning
from trimtab.methods.distill import learn_distill
from trimtab.methods.word_logit import PROMPT_COUNT, learn_word_logit
from trimtab.steering import Steering
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share

LEARNERS = ("distill", "logit")
GAIN = Target(0.0)
ONCE, TWICE = "said once", "said twice"


@dataclass(frozen=True)
class Fit:
    """How a steering is distilled: the fit, the number of the package's queries, and the tokens per answer."""

    fit: str
    queries: int
    tokens: int


def run(
    model: str | None,
    data: Path,
    task: str,
    mode: str,
    folder: Path,
    tokens: int,
    limit: int | None,
    learner: str,
    how: Fit,
    dtype: str,
) -> Report:
    """Learn what isn't in the folder yet, one steering per word or number of sentences, and answer in all arms."""
    lm = LM.load(model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if task == "length":
        base = queries("test")[:limit]
        items = [item for most in AT_MOST for item in length_items(base, most)]
    else:
        items = read_ifeval(data / "ifeval" / f"{WORDS[task][3]}.jsonl", limit)
    by = learner if learner == "logit" else f"{learner}-{how.fit}"
    steerings = learned(lm, items, folder, learner, by, how)
    records = answers(lm, items, steerings, mode, folder / f"{mode}-{task}-{{}}.jsonl", by, tokens)
    result_rows = rows(lm, f"{task}, {mode} the instruction", items, records, steerings)
    about = {"dtype": dtype, "learner": learner if learner == "logit" else f"distill, {how.fit}, {how.queries} queries"}
    return Report("words", machine(), {**versions(), "model": lm.name, **about}, result_rows, spread=BOOTSTRAP)


# ---- learning ------------------------------------------------------------------------------------------------


def learned(
    lm: LM, items: Sequence[IFEvalItem], folder: Path, learner: str, by: str, how: Fit
) -> dict[str, Steering | None]:
    """Each item's steering, shared by items with the same instruction; `None` if none can be learned."""
    learn = _by_logit(lm) if learner == "logit" else partial(_distilled, lm, how=how)
    kinds = {item.item: instruction_of(item) for item in items}
    steerings: dict[tuple[str, str | int], Steering | None] = {}
    for kind, value in dict.fromkeys(kinds.values()):
        stem = "".join(c if c.isalnum() else "-" for c in f"{by}-{kind}-{value}")
        path = folder / f"{stem}.safetensors"
        steerings[kind, value] = kept_or_learned(path, partial(_or_none, learn, kind, value))
    return {item: steerings[each] for item, each in kinds.items()}


def instruction_of(item: IFEvalItem) -> tuple[str, str | int]:
    """The type of an item's single instruction, and its word or the maximum number of sentences."""
    (kind,), (kwargs,) = item.types, item.kwargs
    if kind == SENTENCES:
        return kind, kwargs["num_sentences"] - 1
    (word,) = kwargs["keywords" if kind == WORDS["include"][0] else "forbidden_words"]
    return kind, word


def _or_none(learn: Callable[[str, str | int], Steering], kind: str, value: str | int) -> Steering | None:
    try:
        return learn(kind, value)
    except TrimtabError as error:
        print(f"{kind} {value}: {error}", flush=True)
        return None


def _by_logit(lm: LM) -> Callable[[str, str | int], Steering]:
    head = unembedding(lm, queries("learn")[:PROMPT_COUNT])

    def learn(kind: str, value: str | int) -> Steering:
        if kind == SENTENCES:
            raise TrimtabError("a length has no logit; distil it")
        return learn_word_logit(lm, str(value), exclude=kind == WORDS["exclude"][0], head=head)

    return learn


def _distilled(lm: LM, kind: str, value: str | int, *, how: Fit) -> Steering:
    """The instruction, said twice, as a steering, from answers that follow it."""
    values: dict[str, Value] = {"relation": "less than", "n": int(value) + 1} if kind == SENTENCES else {"word": value}
    described = instruction_type(kind)
    arguments = described.arguments(values)
    return learn_distill(
        lm,
        teacher=Teacher(instruction=tuple(described.phrasings("learn", values)), times=2),
        queries=queries("learn", more=True)[: how.queries],
        check=lambda query, text, cut: not (cut and kind == SENTENCES) and follows(kind, arguments, text, loose=False),
        fit=how.fit,
        tokens=how.tokens,
        say=lambda words: print(f"{kind} {value}: {words}", flush=True),
    )


# ---- answering -----------------------------------------------------------------------------------------------


def answers(
    lm: LM,
    items: Sequence[IFEvalItem],
    steerings: Mapping[str, Steering | None],
    mode: str,
    out: Path,
    by: str,
    tokens: int,
) -> list[Record]:
    """The records of every arm and item; for an item without a steering, its unsteered answer is reused in the steered
    arms.

    Unsteered answers are stored in their own file, for all learners: `out` is a file name with a placeholder.
    """
    twice = {item.item: item.prompt for item in with_repeated_instructions(items)}
    bare = {item.item: item.prompt if mode == "with" else str(item.prompt_without_instruction) for item in items}
    means = means_for(lm, [each for each in steerings.values() if each is not None], list(bare.values()))
    plain, steered = [], []
    for item in items:
        name, steering = item.item, steerings[item.item]
        plain.append(ArmPrompt("unsteered", name, bare[name], None, item.key))
        plain.append(ArmPrompt(TWICE, name, twice[name], None, item.key))
        if mode == "without":
            plain.append(ArmPrompt(ONCE, name, item.prompt, None, item.key))
        if steering is not None:
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:6], 16)
            steered.append(ArmPrompt("steered", name, bare[name], steering, item.key))
            steered.append(ArmPrompt("random", name, bare[name], random_like(steering, seed, means), item.key))
    records: list[Record] = []
    for which, requests in (("plain", plain), (by, steered)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoseWarning)
            records += answer(
                lm,
                requests,
                score=scorer(items),
                max_new_tokens=tokens,
                out=out.with_name(out.name.format(which)),
                batch_size=BATCH,
                progress=say(f"answers, {which}"),
            )
    unsteered = {record.item: record for record in records if record.arm == "unsteered"}
    lacking = [item.item for item in items if steerings[item.item] is None]
    return [*records, *(replace(unsteered[name], arm=arm) for name in lacking for arm in ("steered", "random"))]


def rows(
    lm: LM,
    case: str,
    items: Sequence[IFEvalItem],
    records: Sequence[Record],
    steerings: Mapping[str, Steering | None],
) -> tuple[Result, ...]:
    """For each arm the share that passes, and paired differences; also topic, repetition, perplexity and tokens."""
    arms: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        arms[record.arm][record.item] = record
    groups = [item.key for item in items]
    held = {arm: [records_of[item.item].scores["loose"] for item in items] for arm, records_of in arms.items()}
    results = []
    for arm, by_item in arms.items():
        mine = f"{case}: {arm}"
        listed = [by_item[item.item] for item in items]
        share = paired_bootstrap(held[arm], groups=groups)
        results.append(Result(mine, "holds", share.estimate, "", share.low, share.high))
        for other in ("unsteered", ONCE, TWICE) if arm == "steered" else ("unsteered",):
            if other == arm or other not in held:
                continue
            gain = paired_bootstrap(held[other], held[arm], groups=groups)
            goal = GAIN if (arm, other) == ("steered", "unsteered") else None
            results.append(Result(mine, f"gain over {other}", gain.estimate, "", gain.low, gain.high, goal))
            results.append(Result(mine, f"gain over {other}, McNemar p", mcnemar(held[other], held[arm]), ""))
        topic = mean(on_topic(str(item.prompt_without_instruction), by_item[item.item].answer) for item in items)
        circles = mean(repeated_share(record.answer) > REPEATED_LIMIT for record in listed)
        results.append(Result(mine, "on topic", topic, ""))
        results.append(Result(mine, "go in circles", circles, ""))
        perplexity = perplexities_of(lm, [item.prompt for item in items], [record.answer for record in listed])
        if perplexity:
            results.append(Result(mine, "median perplexity, told and unsteered", median(perplexity), ""))
        results.append(Result(mine, "tokens an answer", mean(record.tokens for record in listed), "tokens"))
    share_steered = mean(steering is not None for steering in steerings.values())
    return (*results, Result(case, "share of prompts steered", share_steered, ""))
