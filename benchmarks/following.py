"""Do tuned instruction steerings make a model follow instructions? IFEval's prompts with a single instruction on the
form of the answer, without and with the instruction in the prompt.

Directions are learned, and the layer, operation and strength of each type of instruction chosen, on the package's own
queries and phrasings; IFEval's prompts are only answered. Intermediate results are stored in a folder, so that a run
can be resumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.choosing import (
    HELD_OUT_QUERIES,
    SEARCH_QUERIES,
    Choice,
    Moments,
    Task,
    better,
    by_nats,
    choose,
    keep,
    kept,
    layers_of,
    say,
    steering_of,
)
from benchmarks.harness import Report, Result, Target
from benchmarks.measuring import evaluate, report
from trimtab.data import instruction_pairs, instruction_type, queries
from trimtab.data.types import LANGUAGES, Value
from trimtab.evaluate.constraints import is_bullets
from trimtab.evaluate.ifeval import IFEvalItem, follows, read_ifeval
from trimtab.evaluate.records import Record
from trimtab.lm import LM
from trimtab.methods.instruct import learn_many
from trimtab.steering import Positions, Steering

DATASET = Path("ifeval") / "ifeval_single_instr_format.jsonl"
GAINS = {"without": Target(0.15), "with": Target(0.08)}
LEARN_QUERIES = 20
OPENING = Positions.opening(8)
EVERYWHERE = (("project", 1.0, None), ("add", 1.0, None), ("add", 2.0, None))
OPENINGS = (("add", 2.0, OPENING), ("add", 4.0, OPENING))
"""Two searches for each type: steering throughout, and only at the beginning of the answer."""

NEAR = 0.05
"""A type's accuracy by nats is near that of tune's best if it is at most this much lower."""
JSON = "detectable_format:json_format"
JSON_TOKENS = 128
"""JSON passes only if it is complete, so cut answers fail; in the search, answers have at least this many tokens."""


@dataclass(frozen=True)
class Instance:
    """An instruction of the test: its type, and the parameters that change its wording (not numbers)."""

    kind: str
    values: tuple[tuple[str, Value], ...]

    @property
    def name(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.values)])


def run(
    model: str | None,
    file: Path,
    mode: str,
    folder: Path,
    tokens: int,
    tune_tokens: int,
    limit: int | None,
    skip: Sequence[str] = (),
    nats: float | None = None,
) -> Report:
    """Tune and evaluate, with the instruction in the prompt or `without` it. Types in `skip` are not steered.

    With `nats` there is no search: each type is steered at the strength that has this divergence. If the folder has the
    choices of an earlier search for every type, the report compares both, type by type.
    """
    lm = LM.load(model)
    folder.mkdir(parents=True, exist_ok=True)
    items = read_ifeval(file, limit)
    instances = {item.item: instance_of(item) for item in items}
    sets = {each.name: pairs_of(each) for each in sorted(set(instances.values()), key=lambda each: each.name)}
    moments = learn_many(lm, sets, layers_of(lm), progress=say("learning"))
    by_kind: dict[str, list[Instance]] = defaultdict(list)
    for each in sorted(set(instances.values()), key=lambda each: each.name):
        by_kind[each.kind].append(each)
    chosen = {}
    for kind in sorted(by_kind):
        if kind in skip:
            chosen[kind] = Choice(None, "not searched", 0, 0)
            continue
        task = task_of(by_kind[kind], moments, mode)
        if nats is not None:
            chosen[kind] = by_nats(lm, task, nats)
            continue
        longest = max(tune_tokens, JSON_TOKENS) if kind == JSON else tune_tokens
        chosen[kind] = better(
            [
                keep(file, partial(choose, lm, task, grid, longest))
                for file, grid in zip(searches(folder, mode, kind), (EVERYWHERE, OPENINGS), strict=True)
            ]
        )

    def steerings_by(choices: Mapping[str, Choice]) -> dict[str, Steering | None]:
        return {
            item.item: steering_of(moments[instances[item.item].name], choices[instances[item.item].kind].setting)
            for item in items
        }

    steerings = steerings_by(chosen)
    records = evaluate(lm, items, steerings, mode, answers_file(folder, mode, nats), tokens)
    settings = {kind: choice.setting for kind, choice in chosen.items()}
    measured = report(lm, "following", items, records, steerings, mode, settings, GAINS[mode])
    tokens_each = mean(choice.tokens for choice in chosen.values())
    spent = Result(f"{mode} instruction", "tokens read and generated to choose, a type", tokens_each, "tokens")
    more = [spent]
    searched = {kind: searches(folder, mode, kind) for kind in chosen if kind not in skip}
    if nats is not None and all(file.is_file() for files in searched.values() for file in files):
        tuned = {kind: [kept(file) for file in files] for kind, files in searched.items()}
        choices = {kind: better(tuned[kind]) if kind in tuned else choice for kind, choice in chosen.items()}
        best = evaluate(lm, items, steerings_by(choices), mode, answers_file(folder, mode, None), tokens)
        more += compared(
            mode,
            scores_by_kind(items, records, searched),
            scores_by_kind(items, best, searched),
            {kind: chosen[kind].tokens for kind in searched},
            {kind: sum(choice.tokens for choice in both) for kind, both in tuned.items()},
        )
    return replace(measured, results=(*measured.results, *more))


def searches(folder: Path, mode: str, kind: str) -> tuple[Path, Path]:
    """The files with the choices of a type's two searches."""
    stem = f"{mode}-{kind.replace(':', '-')}"
    return folder / f"{stem}.json", folder / f"{stem}-opening.json"


def answers_file(folder: Path, mode: str, nats: float | None) -> Path:
    """The file with the answers: of the choices by search, or by nats."""
    return folder / (f"{mode}-answers.jsonl" if nats is None else f"{mode}-{nats:g}-nats-answers.jsonl")


def scores_by_kind(
    items: Sequence[IFEvalItem], records: Sequence[Record], kinds: Iterable[str]
) -> dict[str, list[float]]:
    """The loose scores of the steered answers to each type's items."""
    steered = {record.item: record.scores["loose"] for record in records if record.arm == "steered"}
    return {kind: [steered[item.item] for item in items if item.types[0] == kind] for kind in kinds}


def compared(
    mode: str,
    scores: Mapping[str, Sequence[float]],
    best: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    best_tokens: Mapping[str, int],
) -> list[Result]:
    """Choices by nats against those of the searches: for each type, and in short.

    Args:
        mode: With or without the instruction in the prompt.
        scores: Each type's scores, of the choice by nats.
        best: Each type's scores, of the searches' best choice, for the same items.
        tokens: The tokens that each type's choice by nats cost.
        best_tokens: The tokens that both searches cost.
    """
    results = []
    for kind in scores:
        case = f"{mode} instruction: {kind}, by nats against tune's best"
        results.append(Result(case, "accuracy, by nats minus tune's best", mean(scores[kind]) - mean(best[kind]), ""))
        results.append(Result(case, "tokens to choose, by nats / tune", tokens[kind] / best_tokens[kind], ""))
    near = [mean(scores[kind]) >= mean(best[kind]) - NEAR - 1e-9 for kind in scores]
    case = f"{mode} instruction, by nats against tune's best"
    return [
        *results,
        Result(case, f"types at most {100 * NEAR:.0f} points below tune's best", mean(near), "share"),
        Result(case, "tokens to choose, by nats / tune", sum(tokens.values()) / sum(best_tokens.values()), ""),
    ]


def instance_of(item: IFEvalItem) -> Instance:
    """The instruction of an item with a single one."""
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


# ---- choosing ----------------------------------------------------------------------------------------------


def task_of(instances: Sequence[Instance], moments: Mapping[str, Moments], mode: str) -> Task:
    """The search for one type, cycling through its instances, on queries that no direction was learned on."""
    base = [*queries("tune", more=True)][: SEARCH_QUERIES + HELD_OUT_QUERIES]
    kind = instruction_type(instances[0].kind)
    mine = [instances[i % len(instances)] for i in range(len(base))]
    instructed, arguments = [], []
    for i, (query, instance) in enumerate(zip(base, mine, strict=True)):
        values = {p.name: p.values[i % len(p.values)] for p in kind.parameters} | dict(instance.values)
        said = kind.phrasings("test", values)
        instructed.append(f"{query} {said[i % len(said)]}")
        arguments.append(kind.arguments(values, query))
    return Task(
        f"{mode} {kind.name}",
        instructed if mode == "with" else base,
        instructed,
        [moments[each.name] for each in mine],
        lambda i, answer, cut: complies(kind.name, arguments[i], answer, cut),
    )


def complies(kind: str, arguments: Mapping[str, Any], text: str, cut: bool) -> bool:
    """IFEval's loose verdict; an answer that the token limit cut off is judged by its beginning."""
    if cut and kind == "startend:quotation":
        return text.strip().startswith('"')
    if cut and kind == "detectable_format:number_bullet_lists":
        return is_bullets(text, cut=True)
    return follows(kind, arguments, text, loose=True)
