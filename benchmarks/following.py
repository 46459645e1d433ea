"""Do tuned instruction steerings make a model follow instructions? IFEval's prompts with a single instruction on the
form of the answer, without and with the instruction in the prompt.

Directions are learned, and the layer, operation and strength of each type of instruction chosen, on the package's own
queries and phrasings; IFEval's prompts are only answered. Intermediate results are stored in a folder, so that a run
can be resumed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from trimtab.lm import LM
from trimtab.methods.instruct import learn_many
from trimtab.steering import Positions

DATASET = Path("ifeval") / "ifeval_single_instr_format.jsonl"
GAINS = {"without": Target(0.15), "with": Target(0.08)}
LEARN_QUERIES = 20
OPENING = Positions.opening(8)
EVERYWHERE = (("project", 1.0, None), ("add", 1.0, None), ("add", 2.0, None))
OPENINGS = (("add", 2.0, OPENING), ("add", 4.0, OPENING))
"""Two searches for each type: steering throughout, and only at the beginning of the answer."""

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

    With `nats` there is no search: each type is steered at the strength that has this divergence.
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
                keep(folder / f"{mode}-{kind.replace(':', '-')}{name}.json", partial(choose, lm, task, grid, longest))
                for name, grid in {"": EVERYWHERE, "-opening": OPENINGS}.items()
            ]
        )
    steerings = {
        item.item: steering_of(moments[instances[item.item].name], chosen[instances[item.item].kind].setting)
        for item in items
    }
    records = evaluate(lm, items, steerings, mode, folder / f"{mode}-answers.jsonl", tokens)
    settings = {kind: choice.setting for kind, choice in chosen.items()}
    measured = report(lm, "following", items, records, steerings, mode, settings, GAINS[mode])
    tokens_each = mean(choice.tokens for choice in chosen.values())
    spent = Result(f"{mode} instruction", "tokens read and generated to choose, a type", tokens_each, "tokens")
    return replace(measured, results=(*measured.results, spent))


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
