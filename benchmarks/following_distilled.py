"""Do distilled steerings make a model follow instructions? IFEval's prompts with a single instruction on the form of
the answer, without and with the instruction in the prompt.

Each instruction that enough of the prompts have is distilled into its own steering, which serves both modes; the other
prompts are answered unsteered, and counted. With the instruction in the prompt, there can also be one steering for
prompts of all types (`one`): the model is taught to follow a prompt as if it were said twice. All of that is learned on
the package's own queries and phrasings; IFEval's prompts are only answered. Intermediate results are stored in a
folder, so that a run can be resumed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.following import complies
from benchmarks.harness import Report, Result, Target
from benchmarks.measuring import evaluate, report
from trimtab.data import instruction_type, queries
from trimtab.data.types import LANGUAGES, Value, instruction_types
from trimtab.errors import TrimtabError
from trimtab.evaluate.ifeval import IFEvalItem, read_ifeval
from trimtab.evaluate.intervals import paired_bootstrap
from trimtab.files.load import load
from trimtab.learn.descent import Descent
from trimtab.learn.teachers import Teacher
from trimtab.lm import LM
from trimtab.methods.distill import learn_distill
from trimtab.steering import Steering

LEAST = 4
"""The minimum number of prompts for an instruction to be learned."""
TWICE = Teacher(text="{query}\n\n{query}")
HIGHLIGHTS = (3, 5)
"""Prompts for at most three highlights share an instruction, and so do those for more."""
PROMPTS = 128
"""The number of prompts that the steering for prompts with an instruction is learned from."""
GAINS = {"without": Target(0.15), "with": Target(0.08)}
MORE_THAN_TWICE = Target(0.0)


@dataclass(frozen=True)
class Instance:
    """One instruction: its type and the values of all of its parameters."""

    kind: str
    values: tuple[tuple[str, Value], ...]

    @property
    def name(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.values)])

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)[:80] + ".safetensors"


def run(
    model: str | None,
    file: Path,
    mode: str,
    folder: Path,
    tokens: int,
    learn_tokens: int,
    fit: str,
    how: Descent,
    dtype: str,
    rank: int | None = None,
    *,
    one_for_all: bool,
) -> Report:
    """Learn what isn't in the folder yet (a folder has one seed), and answer in all arms."""
    lm = LM.load(model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    items = read_ifeval(file)
    if one_for_all:
        path = folder / f"follow-{fit}.safetensors"
        steering = kept_or_learned(path, lambda: follow(lm, fit, how, rank, learn_tokens))
        steerings: dict[str, Steering | None] = {item.item: steering for item in items}
    else:
        steerings = _distilled(lm, items, folder, fit, how, rank, learn_tokens)
    records = evaluate(
        lm, items, steerings, mode, folder / f"{mode}-{fit}-{'one' if one_for_all else 'each'}-answers.jsonl", tokens
    )
    made = report(lm, "following-distilled", items, records, steerings, mode, {}, GAINS[mode])
    learned = f"{fit}, {how.steps} steps of {how.rate:g}, seed {how.seed}"
    made = replace(made, versions={**made.versions, "dtype": dtype, "fit": learned})
    if mode == "without":
        return made
    scores = {arm: {r.item: r.scores["loose"] for r in records if r.arm == arm} for arm in ("said twice", "steered")}
    twice, mine = ([scores[arm][item.item] for item in items] for arm in ("said twice", "steered"))
    more = paired_bootstrap(twice, mine, groups=[item.key for item in items])
    row = Result(
        "with instruction: steered", "gain over said twice", more.estimate, "", more.low, more.high, MORE_THAN_TWICE
    )
    return replace(made, results=(*made.results, row))


def kept_or_learned(path: Path, learn: Callable[[], Steering | None]) -> Steering | None:
    """The steering in the file, learned and saved first if it doesn't exist; `None` if nothing can be learned."""
    nothing = path.with_suffix(".none")
    if nothing.is_file():
        return None
    if not path.is_file():
        started = time.perf_counter()
        learned = learn()
        print(f"{path.stem}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)
        if learned is None:
            nothing.write_text("")
            return None
        learned.save(path)
    return load(path)


# ---- without the instruction in the prompt -------------------------------------------------------------------


def _distilled(
    lm: LM, items: Sequence[IFEvalItem], folder: Path, fit: str, how: Descent, rank: int | None, tokens: int
) -> dict[str, Steering | None]:
    instances = {item.item: instance_of(item) for item in items}
    counts = Counter(instances.values())
    steerings: dict[Instance, Steering | None] = {}
    for each, count in counts.most_common():
        if count < LEAST:
            steerings[each] = None
            continue
        steerings[each] = kept_or_learned(
            folder / f"{fit}-{each.file}", partial(distilled, lm, each, fit, how, rank, tokens)
        )
    return {item: steerings[instance] for item, instance in instances.items()}


def instance_of(item: IFEvalItem) -> Instance:
    """The instruction of an item with a single one. Numbers of highlights are mapped to one of `HIGHLIGHTS`."""
    (kind,), (kwargs,) = item.types, item.kwargs
    names = {code: name for name, code in LANGUAGES.items()}
    values = []
    for parameter in instruction_type(kind).parameters:
        value = kwargs[parameter.argument]
        value = value[0] if isinstance(value, list) else value
        if parameter.kind == "language":
            value = names[value]
        if parameter.argument == "num_highlights":
            value = next((n for n in HIGHLIGHTS if value <= n), HIGHLIGHTS[-1])
        values.append((parameter.name, value))
    return Instance(kind, tuple(values))


def distilled(lm: LM, instance: Instance, fit: str, how: Descent, rank: int | None, tokens: int) -> Steering | None:
    """The instruction, said twice, as a steering; `None` if the model follows it too rarely."""
    kind, values = instruction_type(instance.kind), dict(instance.values)
    arguments = kind.arguments(values)
    try:
        return learn_distill(
            lm,
            teacher=Teacher(instruction=tuple(kind.phrasings("learn", values)), times=2),
            check=lambda query, answer, cut: complies(instance.kind, arguments, answer, cut),
            fit=fit,
            rank=rank,
            steps=how.steps,
            rate=how.rate,
            seed=how.seed,
            tokens=tokens,
            options={"instance": instance.name},
            say=lambda words: print(f"{instance.name}: {words}", flush=True),
        )
    except TrimtabError as error:
        print(f"{instance.name}: {error}", flush=True)
        return None


# ---- with the instruction in the prompt ----------------------------------------------------------------------


def follow(lm: LM, fit: str, how: Descent, rank: int | None, tokens: int) -> Steering:
    """The effect of saying a prompt twice, over all types of instructions, as one steering for prompts said once."""
    prompts = prompts_of_all_types(PROMPTS)
    return learn_distill(
        lm,
        teacher=TWICE,
        queries=list(prompts),
        check=lambda query, answer, cut: complies(*prompts[query], answer, cut),
        fit=fit,
        rank=rank,
        steps=how.steps,
        rate=how.rate,
        seed=how.seed,
        tokens=tokens,
        with_prompt=0.0,
        say=lambda words: print(f"follow: {words}", flush=True),
    )


def prompts_of_all_types(count: int) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Prompts with an instruction of each type in turn, with the type and arguments for IFEval's check."""
    kinds = [kind for kind in instruction_types().values() if kind.name != "combination:repeat_prompt"]
    base = list(queries("learn", more=True))
    by_prompt: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for i in range(count):
        kind, turn = kinds[i % len(kinds)], i // len(kinds)
        values = {p.name: p.values[turn % len(p.values)] for p in kind.parameters}
        said = kind.learn[turn % len(kind.learn)].format(**values)
        by_prompt[f"{base[(7 * i) % len(base)]} {said}"] = (kind.name, kind.arguments(values))
    return by_prompt
