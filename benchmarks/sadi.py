"""SADI against CAA on two-option questions: learned from the same pairs, and both tuned on questions outside the test.

Each task is learned from pairs of a correct (or matching) and a wrong letter, read in one pass at every site that is
compared. Each method's settings are tried on held-out questions, and the one with the highest share of the correct
letter is tested once. Intermediate results are stored in a folder, so that a run can be resumed.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.behaviours import by_arm
from benchmarks.choosing import say
from benchmarks.harness import BOOTSTRAP, Report, Result
from benchmarks.machine import machine, versions
from trimtab.bench.behaviours import stem
from trimtab.evaluate.ab import ABItem, ab_requests, evenly_spaced, read_ab, score_ab
from trimtab.evaluate.intervals import Interval, paired_bootstrap
from trimtab.evaluate.records import Record
from trimtab.files.steering_file import load_steering, save_steering
from trimtab.lm import LM, DoseWarning
from trimtab.methods.sadi import SITE_KINDS, choose, differences_at, edits_of
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.text.pairs import Pair, digest

CAA_FILES = ("generate_dataset.json", "test_dataset_ab.json")
TASKS: Mapping[str, tuple[Path, ...]] = {
    "TruthfulQA": (Path("truthfulqa") / "truthful_qa_ab.json",),
    "MMLU": (Path("mmlu") / "mmlu.json",),
    "corrigible": tuple(Path("caa") / "corrigible-neutral-HHH" / file for file in CAA_FILES),
    "hallucination": tuple(Path("caa") / "hallucination" / file for file in CAA_FILES),
}
"""The files of a task's questions: a single one, or one to learn from and one to test on."""
DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7)
STRENGTHS = (1.0, 2.0, 4.0)
GRID: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "heads": ((2, 6, 12), (0.5, 1.0, 2.0)),
    "neurons": ((10, 50, 200), (0.5, 1.0, 2.0)),
    "hidden": ((4, 20), (0.5, 1.0, 2.0)),
}
"""SADI's sites, and the values of K and delta to try. The paper's deltas start at 4, which breaks a small model."""
WHERE = Positions.from_last_prompt_token()
"""Both act at the last prompt token and at the bracket after it, at which the letter is predicted."""
BATCH = 64
UNSTEERED, CAA = "unsteered", "CAA"


@dataclass(frozen=True)
class Questions:
    """A task's questions to learn from, to choose settings on, and to test on."""

    learn: list[ABItem]
    held_out: list[ABItem]
    test: list[ABItem]


def run(
    model: str | None, data: Path, folder: Path, tasks: Sequence[str], pairs: int, held_out: int, limit: int
) -> Report:
    """Learn from `pairs`, choose on `held_out` questions and test on `limit` of each task."""
    lm = LM.load(model, dtype="float32")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        for task in tasks:
            questions = read([data / file for file in TASKS[task]], pairs, held_out, limit)
            settings = families(lm, task, questions, folder)
            chosen = best(lm, task, settings, questions, folder)
            arms: dict[str, Steering | None] = {UNSTEERED: None} | {f: settings[f][name] for f, name in chosen.items()}
            records_by_arm = scored(lm, f"{task}-test", questions.test, arms, folder)
            results += lines(task, chosen, records_by_arm)
    return Report("sadi", machine(), {**versions(), "model": lm.name}, tuple(results), spread=BOOTSTRAP)


def read(files: Sequence[Path], pairs: int, held_out: int, limit: int) -> Questions:
    """The questions, split with a seed without overlap; those to learn from are balanced between (A) and (B)."""
    test_file = read_ab(files[-1], exclude=True)[0]
    if len(files) == 1:
        drawn = list(test_file)
        random.Random(0).shuffle(drawn)
        test, free = drawn[:limit], drawn[limit:]
    else:
        test, free = evenly_spaced(test_file, limit), read_ab(files[0], exclude=True)[0]
        random.Random(0).shuffle(free)
    stems = {stem(item.question) for item in (test_file if len(files) > 1 else test)}
    free = [item for item in free if stem(item.question) not in stems]
    sides = [[item for item in free if item.matching == letter] for letter in "AB"]
    balanced = [item for both in zip(*sides, strict=False) for item in both]
    return Questions(balanced[held_out : held_out + pairs], balanced[:held_out], test)


def families(lm: LM, task: str, questions: Questions, folder: Path) -> dict[str, dict[str, Steering]]:
    """CAA's settings and those of SADI's three forms, by name, all from one pass over the pairs."""
    learn = [Pair(f"({i.matching})", f"({i.other})", i.question, "letters") for i in questions.learn]
    layers = range(lm.layout.layers)
    kinds = ("residual", *SITE_KINDS.values())
    file = folder / f"{task}.safetensors"
    kept = load_steering(file) if file.is_file() else None
    if kept is None or kept.card.data != digest(learn):
        read_at = differences_at(lm, learn, [Site(layer, k) for k in kinds for layer in layers], progress=say(task))
        edits = tuple(Edit(site, Add(difference.float())) for site, difference in sorted(read_at.items()))
        kept = Steering(edits, Card("differences", lm.identity, digest(learn)))
        save_steering(kept, file)
    lm.check(kept)
    differences = {edit.site: edit.operation.direction.double() for edit in kept.edits}
    by_family: dict[str, dict[str, Steering]] = {CAA: {}}
    for layer in sorted({round(depth * lm.layout.layers) for depth in DEPTHS}):
        vector = Steering((Edit(Site(layer), Add(differences[Site(layer)].float()), WHERE),))
        by_family[CAA] |= {f"layer {layer} x {strength:g}": strength * vector for strength in STRENGTHS}
    for site, (ks, deltas) in GRID.items():
        mine = {where: x for where, x in differences.items() if where.kind == SITE_KINDS[site]}
        made = {}
        for k in ks:
            masks = choose(lm, mine, k=k)
            for delta in deltas:
                made[f"K {k}, delta {delta:g}"] = Steering(edits_of(mine, masks, delta=delta, positions=WHERE))
        by_family[f"SADI, {site}"] = made
    return by_family


def best(
    lm: LM, task: str, settings: Mapping[str, Mapping[str, Steering]], questions: Questions, folder: Path
) -> dict[str, str]:
    """Each family's setting with the highest mean share of the correct letter on the held-out questions."""
    arms = {f"{family}: {name}": steering for family, of in settings.items() for name, steering in of.items()}
    records_by_arm = scored(lm, f"{task}-held-out", questions.held_out, arms, folder)
    shares = {
        family: {
            name: mean(record.scores["matching"] for record in records_by_arm[f"{family}: {name}"].values())
            for name in of
        }
        for family, of in settings.items()
    }
    (folder / f"{task}-held-out.json").write_text(json.dumps(shares, indent=2) + "\n")
    return {family: max(of, key=lambda name: of[name]) for family, of in shares.items()}


def scored(
    lm: LM, name: str, items: Sequence[ABItem], arms: Mapping[str, Steering | None], folder: Path
) -> dict[str, dict[str, Record]]:
    """The records of every question in every arm, by arm and item."""
    out = folder / f"{name}.jsonl"
    requests = ab_requests(lm, items, arms)
    return by_arm(score_ab(lm, requests, items, out=out, batch_size=BATCH, progress=say(name)))


def lines(task: str, chosen: Mapping[str, str], records_by_arm: Mapping[str, Mapping[str, Record]]) -> list[Result]:
    """Each arm's shares and choices, their change from unsteered, and SADI's forms against CAA."""
    results = []
    for arm, records in records_by_arm.items():
        case = f"{task} (n={len(records)}): {arm}" + (f" ({chosen[arm]})" if arm in chosen else "")
        for score, title in (("matching", "right letter's share"), ("chosen", "right letter chosen")):
            results.append(_line(case, title, compared(records, None, score)))
            if arm != UNSTEERED:
                results.append(
                    _line(case, f"{title}, minus unsteered", compared(records, records_by_arm[UNSTEERED], score))
                )
            if arm not in (UNSTEERED, CAA):
                results.append(_line(case, f"{title}, minus CAA", compared(records, records_by_arm[CAA], score)))
        mass = mean(record.scores["mass"] for record in records.values())
        results.append(Result(case, "mass of both letters", mass, ""))
    return results


def compared(records: Mapping[str, Record], before: Mapping[str, Record] | None, score: str) -> Interval:
    """The mean of a score, or of its change from `before`, item by item."""
    after = [records[item].scores[score] for item in sorted(records)]
    if before is None:
        return paired_bootstrap(after)
    return paired_bootstrap([before[item].scores[score] for item in sorted(records)], after)


def _line(case: str, metric: str, interval: Interval) -> Result:
    return Result(case, metric, interval.estimate, "", interval.low, interval.high)


def missing(data: Path, tasks: Sequence[str]) -> list[Path]:
    """The files of these tasks that don't exist."""
    return [file for task in tasks for file in TASKS[task] if not (data / file).is_file()]
