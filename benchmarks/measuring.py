"""Unsteered, steered and control arms over IFEval's items, and a table of the results."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.choosing import BATCH, say
from benchmarks.harness import BOOTSTRAP, Report, Result, Target
from benchmarks.machine import machine, versions
from trimtab.evaluate.answers import answer
from trimtab.evaluate.controls import means_for, random_like
from trimtab.evaluate.fluency import perplexities
from trimtab.evaluate.ifeval import IFEvalItem, scorer, with_repeated_instructions
from trimtab.evaluate.intervals import mcnemar, paired_bootstrap
from trimtab.evaluate.records import ArmPrompt, Record
from trimtab.lm import LM, DoseWarning
from trimtab.steering import Steering
from trimtab.text.repetition import REPEATED_LIMIT, repeated_share
from trimtab.tune.candidates import Setting

READ = 32
"""The number of prompts for which the perplexity is measured, which costs as much as generating the answers."""


def evaluate(
    lm: LM, items: Sequence[IFEvalItem], steerings: Mapping[str, Steering | None], mode: str, out: Path, tokens: int
) -> list[Record]:
    """The records of every arm and item; types that aren't steered reuse the unsteered answer in the steered arms."""
    twice = {item.item: item.prompt for item in with_repeated_instructions(items)}
    prompts = {item.item: item.prompt if mode == "with" else str(item.prompt_without_instruction) for item in items}
    means = means_for(lm, [each for each in steerings.values() if each is not None], list(prompts.values()))
    requests = []
    for item in items:
        prompt = prompts[item.item]
        steering = steerings[item.item]
        requests.append(ArmPrompt("unsteered", item.item, prompt, None, item.key))
        if steering is not None:
            seed = int(hashlib.sha256(item.item.encode()).hexdigest()[:6], 16)
            requests.append(ArmPrompt("steered", item.item, prompt, steering, item.key))
            requests.append(ArmPrompt("random", item.item, prompt, random_like(steering, seed, means), item.key))
        if mode == "with":
            requests.append(ArmPrompt("said twice", item.item, twice[item.item], None, item.key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        records = answer(
            lm,
            requests,
            score=scorer(items),
            max_new_tokens=tokens,
            out=out,
            batch_size=BATCH,
            progress=say(f"{mode} answers"),
        )
    plain = {record.item: record for record in records if record.arm == "unsteered"}
    return [
        *records,
        *(
            replace(plain[item.item], arm=arm)
            for item in items
            if steerings[item.item] is None
            for arm in ("steered", "random")
        ),
    ]


def report(
    lm: LM,
    benchmark: str,
    items: Sequence[IFEvalItem],
    records: Sequence[Record],
    steerings: Mapping[str, Steering | None],
    mode: str,
    settings: Mapping[str, Setting | None],
    target: Target | None = None,
) -> Report:
    """The table: accuracy (loose) of each arm, the paired gain, each type, perplexity and length."""
    arms: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        arms[record.arm][record.item] = record
    prompts = {item.item: item.prompt for item in items}
    groups = [item.key for item in items]
    results = []
    before = [arms["unsteered"][item.item].scores["loose"] for item in items]
    changed = [item.item for item in items if steerings[item.item] is not None]
    read = [changed[i * len(changed) // READ] for i in range(READ)] if len(changed) > READ else changed
    for arm, by_item in arms.items():
        case = f"{mode} instruction: {arm}"
        listed = [by_item[item.item] for item in items]
        after = [record.scores["loose"] for record in listed]
        results.append(_interval(case, "loose accuracy", paired_bootstrap(after, groups=groups)))
        whole = paired_bootstrap([_whole(record) for record in listed], groups=groups)
        results.append(_interval(case, "loose accuracy, answers that go in circles don't count", whole))
        if arm != "unsteered":
            gain = paired_bootstrap(before, after, groups=groups)
            results.append(_interval(case, "gain", gain, target if arm == "steered" else None))
            results.append(Result(case, "McNemar p", mcnemar(before, after), ""))
        results.append(Result(case, "tokens an answer", mean(r.tokens for r in listed), "tokens"))
        some = [by_item[item] for item in read]
        perplexity = perplexities_of(lm, [prompts[r.item] for r in some], [r.answer for r in some])
        if perplexity:
            what = f"median perplexity, {len(read)} of the prompts that are steered"
            results.append(Result(case, what, median(perplexity), ""))
    share = mean(steering is not None for steering in steerings.values())
    results.append(Result(f"{mode} instruction", "share of prompts steered", share, ""))
    for kind, count in Counter(item.types[0] for item in items).most_common():
        mine = [item.item for item in items if item.types[0] == kind]
        steered = sum(steerings[item] is not None for item in mine)
        how = settings.get(kind) or (f"{steered} steered" if steered else "not steered")
        case = f"{mode} instruction: {kind} (n={count}; {how})"
        for arm in ("unsteered", "steered", "random", *(["said twice"] if mode == "with" else [])):
            results.append(Result(case, arm, mean(arms[arm][item].scores["loose"] for item in mine), ""))
    return Report(benchmark, machine(), {**versions(), "model": lm.name}, tuple(results), spread=BOOTSTRAP)


def perplexities_of(lm: LM, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The perplexities of the answers that aren't empty, under the unsteered model, after the instructed prompts."""
    texts = []
    for prompt, text in zip(prompts, answers, strict=True):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids:
            texts.append((lm.encode(prompt), ids))
    return perplexities(lm, texts)


def _whole(record: Record) -> float:
    """The loose score of an answer, or 0 if it is repetitive."""
    return record.scores["loose"] if repeated_share(record.answer) <= REPEATED_LIMIT else 0.0


def _interval(case: str, metric: str, interval: Any, target: Target | None = None) -> Result:
    return Result(case, metric, interval.estimate, "", interval.low, interval.high, target)
