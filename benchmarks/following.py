"""Do tuned instruction steerings make a model follow instructions? IFEval's prompts with a single instruction on the
form of the answer, without and with the instruction in the prompt.

Directions are learned, and the layer, operation and strength of each type of instruction chosen, on the package's own
queries and phrasings; IFEval's prompts are only answered. What a run has done is kept in a folder, so that it can be
stopped and started again.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.harness import Report, Result, Target
from benchmarks.machine import machine, versions
from trimtab.data import instruction_pairs, instruction_type, queries
from trimtab.data.types import LANGUAGES, Value
from trimtab.engines.transformers.generate import Generation
from trimtab.evaluate.answers import answer
from trimtab.evaluate.constraints import is_bullets, is_json, repeated_share
from trimtab.evaluate.controls import random_like
from trimtab.evaluate.fluency import Fluency, distinct_n, fluencies, perplexities
from trimtab.evaluate.ifeval import IFEvalItem, follows, read_ifeval, repeated, scorer
from trimtab.evaluate.intervals import mcnemar, paired_bootstrap
from trimtab.evaluate.records import Record, Request
from trimtab.lm import LM, DoseWarning
from trimtab.methods.instruct import learn_many, steering_from
from trimtab.steering import Steering
from trimtab.tune.candidates import Candidate, Setting
from trimtab.tune.guard import STANDARD
from trimtab.tune.halving import Rung
from trimtab.tune.split import split_by_query
from trimtab.tune.tune import Outcome, search

DATASET = Path("ifeval") / "ifeval_single_instr_format.jsonl"
TARGETS = {"without": Target(0.15), "with": Target(0.08)}
LEARN_QUERIES = 20
SEARCH_QUERIES = 12
HELD_OUT_QUERIES = 8
RUNGS = (Rung(2, 6), Rung(6, 3), Rung(SEARCH_QUERIES, 1))
DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GRID = (("project", 1.0), ("add", 1.0), ("add", 2.0))
BATCH = 64

Progress = Callable[[int, int], None]
Moments = Mapping[str, Mapping[int, Any]]


@dataclass(frozen=True)
class Instance:
    """An instruction as the test has it: its type, and the parameters that change what is said (not numbers)."""

    kind: str
    values: tuple[tuple[str, Value], ...]

    @property
    def name(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.values)])


@dataclass(frozen=True)
class Choice:
    """What the search chose for a type: a setting, or `None` for not steering, and why."""

    setting: Setting | None
    reason: str
    answers: int
    tokens: int


def run(
    model: str | None,
    file: Path,
    mode: str,
    folder: Path,
    tokens: int,
    tune_tokens: int,
    limit: int | None,
    skip: Sequence[str] = (),
) -> Report:
    """Tune and evaluate, with the instruction in the prompt or `without` it. Types to `skip` are not steered."""
    lm = LM.load(model)
    folder.mkdir(parents=True, exist_ok=True)
    items = read_ifeval(file, limit)
    instances = {item.item: instance_of(item) for item in items}
    layers = sorted({round(depth * lm.layout.layers) for depth in DEPTHS})
    sets = {one.name: pairs_of(one) for one in sorted(set(instances.values()), key=lambda one: one.name)}
    moments = learn_many(lm, sets, layers, progress=_say("learning"))
    by_kind: dict[str, list[Instance]] = defaultdict(list)
    for one in sorted(set(instances.values()), key=lambda one: one.name):
        by_kind[one.kind].append(one)
    chosen = {}
    for kind in sorted(by_kind):
        if kind in skip:
            chosen[kind] = Choice(None, "not searched", 0, 0)
            continue
        kept = folder / f"{mode}-{kind.replace(':', '-')}.json"
        if not kept.is_file():
            _keep(kept, tune_kind(lm, by_kind[kind], moments, layers, mode, tune_tokens))
        chosen[kind] = _choice(kept)
    steerings = {
        item.item: steering_of(moments[instances[item.item].name], chosen[instances[item.item].kind].setting)
        for item in items
    }
    records = evaluate(lm, items, steerings, mode, folder / f"{mode}-answers.jsonl", tokens)
    return report(lm, items, records, steerings, chosen, mode)


def instance_of(item: IFEvalItem) -> Instance:
    """The instruction of an item that has one."""
    (kind,), (kwargs,) = item.types, item.kwargs
    names = {code: name for name, code in LANGUAGES.items()}
    values = []
    for parameter in instruction_type(kind).parameters:
        if parameter.kind in ("text", "language") and parameter.argument in kwargs:
            value = kwargs[parameter.argument]
            value = value[0] if isinstance(value, list) else value
            values.append((parameter.name, names[value] if parameter.kind == "language" else value))
    return Instance(kind, tuple(values))


def pairs_of(instance: Instance) -> list[Any]:
    phrasings = instruction_type(instance.kind).phrasings("learn", dict(instance.values))
    return instruction_pairs(queries("learn")[:LEARN_QUERIES], phrasings)


def steering_of(moments: Mapping[int, Any], setting: Setting | None) -> Steering | None:
    if setting is None:
        return None
    return setting.strength * steering_from(moments, setting.layer, operation=setting.operation)


# ---- choosing ----------------------------------------------------------------------------------------------


def tune_kind(
    lm: LM, instances: Sequence[Instance], moments: Moments, layers: Sequence[int], mode: str, tokens: int
) -> Choice:
    """The setting for one type, searched over its instances in turn, on queries that no direction was learned on."""
    base = [*queries("tune", more=True)][: SEARCH_QUERIES + HELD_OUT_QUERIES]
    kind = instruction_type(instances[0].kind)
    mine = [instances[i % len(instances)] for i in range(len(base))]
    texts, arguments = [], []
    for i, (query, instance) in enumerate(zip(base, mine, strict=True)):
        values = {p.name: p.values[i % len(p.values)] for p in kind.parameters} | dict(instance.values)
        said = kind.phrasings("test", values)
        texts.append(f"{query} {said[i % len(said)]}")
        arguments.append(kind.arguments(values, query))
    prompts = texts if mode == "with" else base
    candidates, settings = [], {}
    for operation, strength in GRID:
        for layer in layers:
            steering = strength * steering_from(moments[instances[0].name], layer, operation=operation)
            setting = Setting(layer, strength, str(steering.edits[0].positions), operation)
            candidates.append(Candidate(setting, steering))
            settings[steering] = setting

    def trial(
        steerings: Sequence[Steering | None], rows: Sequence[int], progress: Callable[[int, int], None]
    ) -> list[Outcome]:
        own = [
            None if one is None else steering_of(moments[mine[i].name], settings[one])
            for one, i in zip(steerings, rows, strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoseWarning)
            answers = lm.generate(
                [prompts[i] for i in rows], own, max_new_tokens=tokens, batch_size=BATCH, progress=progress
            )
        read = _read(lm, [texts[i] for i in rows], answers, confirm=set(rows) <= held_out)
        return [
            Outcome(
                float(complies(kind.name, arguments[i], found.text, found.finish_reason == "length")),
                found.applied.dose,
                len(found.token_ids),
                fluency,
            )
            for i, found, fluency in zip(rows, answers, read, strict=True)
        ]

    held_out = set(split_by_query(base, held_out=HELD_OUT_QUERIES / len(base), seed=0).held_out)
    tuned = search(
        candidates,
        base,
        trial,
        guard=STANDARD,
        rows=BATCH,
        rungs=RUNGS,
        held_out=HELD_OUT_QUERIES / len(base),
        tokens_each=tokens,
        progress=_say(f"{mode} {kind.name}"),
    )
    print(f"{mode} {kind.name}: {tuned.setting}: {tuned.reason}", flush=True)
    return Choice(tuned.setting, tuned.reason, tuned.answers, tuned.tokens)


def _read(lm: LM, prompts: Sequence[str], answers: Sequence[Generation], *, confirm: bool) -> list[Fluency]:
    """How the answers read; perplexities, which cost as much as the answers, only where the choice is confirmed."""
    if confirm:
        return fluencies(lm, prompts, answers)
    return [
        Fluency(
            perplexity=math.e,
            distinct=distinct_n(one.text),
            repeated=repeated_share(one.text),
            tokens=len(one.token_ids),
            empty=not one.text.strip(),
            cut=one.finish_reason == "length",
        )
        for one in answers
    ]


def complies(kind: str, arguments: Mapping[str, Any], text: str, cut: bool) -> bool:
    """IFEval's loose verdict; an answer that the token limit cut is given the benefit of what it had no time for."""
    if cut and kind == "startend:quotation":
        return text.strip().startswith('"')
    if cut and kind == "detectable_format:json_format":
        return is_json(text, cut=True)
    if cut and kind == "detectable_format:number_bullet_lists":
        return is_bullets(text, cut=True)
    return follows(kind, arguments, text, loose=True)


def _keep(path: Path, choice: Choice) -> None:
    path.write_text(json.dumps(asdict(choice), indent=2) + "\n")


def _choice(path: Path) -> Choice:
    stored = json.loads(path.read_text())
    setting = None if stored["setting"] is None else Setting(**stored["setting"])
    return Choice(**{**stored, "setting": setting})


# ---- measuring ---------------------------------------------------------------------------------------------


def evaluate(
    lm: LM, items: Sequence[IFEvalItem], steerings: Mapping[str, Steering | None], mode: str, out: Path, tokens: int
) -> list[Record]:
    """Every arm on every item; where a type isn't steered, its unsteered answer stands for the steered arms."""
    twice = {item.item: item.prompt for item in repeated(items)}
    requests = []
    for item in items:
        prompt = item.prompt if mode == "with" else str(item.prompt_without_instruction)
        steering = steerings[item.item]
        requests.append(Request("unsteered", item.item, prompt, None, item.key))
        if steering is not None:
            seed = int(hashlib.sha256(item.item.encode()).hexdigest()[:6], 16)
            requests.append(Request("steered", item.item, prompt, steering, item.key))
            requests.append(Request("random", item.item, prompt, random_like(steering, seed), item.key))
        if mode == "with":
            requests.append(Request("said twice", item.item, twice[item.item], None, item.key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        found = answer(
            lm,
            requests,
            score=scorer(items),
            max_new_tokens=tokens,
            out=out,
            batch_size=BATCH,
            progress=_say(f"{mode} answers"),
        )
    plain = {record.item: record for record in found if record.arm == "unsteered"}
    return [
        *found,
        *(
            replace(plain[item.item], arm=arm)
            for item in items
            if steerings[item.item] is None
            for arm in ("steered", "random")
        ),
    ]


def report(
    lm: LM,
    items: Sequence[IFEvalItem],
    records: Sequence[Record],
    steerings: Mapping[str, Steering | None],
    chosen: Mapping[str, Choice],
    mode: str,
) -> Report:
    """The table: accuracy (loose) of each arm, the paired gain, each type, perplexity and length."""
    arms: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        arms[record.arm][record.item] = record
    prompts = {item.item: item.prompt for item in items}
    groups = [item.key for item in items]
    results = []
    before = [arms["unsteered"][item.item].scores["loose"] for item in items]
    for arm, found in arms.items():
        case = f"{mode} instruction: {arm}"
        listed = [found[item.item] for item in items]
        after = [record.scores["loose"] for record in listed]
        results.append(_interval(case, "loose accuracy", paired_bootstrap(after, groups=groups)))
        if arm != "unsteered":
            gain = paired_bootstrap(before, after, groups=groups)
            results.append(_interval(case, "gain", gain, TARGETS[mode] if arm == "steered" else None))
            results.append(Result(case, "McNemar p", mcnemar(before, after), ""))
        results.append(Result(case, "tokens an answer", mean(r.tokens for r in listed), "tokens"))
        perplexity = perplexities_of(lm, [prompts[r.item] for r in listed], [r.answer for r in listed])
        results.append(Result(case, "median perplexity", median(perplexity), ""))
    share = mean(steering is not None for steering in steerings.values())
    results.append(Result(f"{mode} instruction", "share of prompts steered", share, ""))
    for kind, count in Counter(item.types[0] for item in items).most_common():
        mine = [item.item for item in items if item.types[0] == kind]
        case = f"{mode} instruction: {kind} (n={count}; {chosen[kind].setting or 'not steered'})"
        for arm in ("unsteered", "steered", "random", *(["said twice"] if mode == "with" else [])):
            results.append(Result(case, arm, mean(arms[arm][item].scores["loose"] for item in mine), ""))
    return Report("following", machine(), {**versions(), "model": lm.name}, tuple(results))


def perplexities_of(lm: LM, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Of the answers under the unsteered model, after the prompts with the instruction; empty ones left out."""
    texts = []
    for prompt, text in zip(prompts, answers, strict=True):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids:
            texts.append((lm.encode(prompt), ids))
    return perplexities(lm, texts)


def _interval(case: str, metric: str, found: Any, target: Target | None = None) -> Result:
    return Result(case, metric, found.estimate, "", found.low, found.high, target)


def _say(what: str) -> Progress:
    return lambda done, total: print(f"\r{what}: {done}/{total}   ", end="", flush=True)
