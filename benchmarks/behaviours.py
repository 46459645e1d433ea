"""The effect of vectors on five behaviours, and their costs: CAA's (Rimsky et al., 2312.06681, sections 4, 5 and 7), or
trained ones (BiPO, Cao et al., 2406.00045).

Vectors are learned, and the layer of CAA's is chosen, on pairs of the generate sets; the test sets are only scored.
With `both_orders` each question is learned from and asked with its answers swapped, too: a small model prefers one
letter whatever it stands for, and almost any direction shifts that preference, which then hides everything else.
Intermediate results are stored in a folder, so that a run can be resumed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from benchmarks.choosing import say
from benchmarks.distill import orthogonal_like
from benchmarks.harness import BOOTSTRAP, Report, Result, Target
from benchmarks.machine import machine, versions
from benchmarks.measuring import perplexities_of
from benchmarks.static import PROMPTS
from trimtab.bench.behaviours import SYSTEM, stem
from trimtab.evaluate.ab import ABItem, ab_requests, in_both_orders, polarity, read_ab, score_ab
from trimtab.evaluate.answers import answer
from trimtab.evaluate.controls import random_like
from trimtab.evaluate.fluency import distinct_n
from trimtab.evaluate.intervals import Interval, paired_bootstrap
from trimtab.evaluate.records import ArmPrompt, Record
from trimtab.files.steering_file import load_steering, save_steering
from trimtab.lm import LM
from trimtab.methods.bipo import learn_bipo
from trimtab.methods.caa import Norm, equalised, learn_behaviours
from trimtab.report.sweep import Cell, draw_sweep
from trimtab.steering import Steering
from trimtab.text.chat import has_template
from trimtab.text.pairs import Pair, digest
from trimtab.text.repetition import repeated_share

CAPABILITY = Path("mmlu") / "mmlu.json"
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
DEPTHS = tuple(0.2 + i / 15 for i in range(10))
BASELINE = "unsteered"
SCORE = "p(matching) / (p(matching) + p(other))"
BATCH = 64
TRAINED_EVERY, TRAINED_STEPS, TRAINED_RATE = 3, 40, 0.01
OPEN_PROMPTS = PROMPTS[:6]
TOKENS = 30


@dataclass(frozen=True)
class Data:
    """A behaviour's items: to learn from, to choose a layer on, and to test on.

    `shared` items were left out of learning because the test contains them; `excluded` ones were left out of the test
    because their answers aren't A and B.
    """

    learn: list[ABItem]
    held_out: list[ABItem]
    test: list[ABItem]
    shared: int
    excluded: int

    def in_both_orders(self) -> Data:
        """Each question with its answers swapped, too."""
        learn, held_out, test = map(in_both_orders, (self.learn, self.held_out, self.test))
        return replace(self, learn=learn, held_out=held_out, test=test)

    @property
    def questions(self) -> int:
        """The number of questions in the test, in one order or both."""
        return len({item.group or item.item for item in self.test})


@dataclass(frozen=True)
class Curve:
    """The test of one behaviour: p(matching) and the letters' mass by strength, and each arm's change from unsteered.

    `change` and `random` (one per control, random or orthogonal) are for the strongest push in each direction; the
    interval of `change` is paired too.
    """

    layers: tuple[int, ...]
    scores: Mapping[float, Interval]
    mass: Mapping[float, float]
    dose: float
    systems: Mapping[str, Interval]
    change: Mapping[float, Interval]
    random: Mapping[float, tuple[Interval, ...]]

    @property
    def monotone(self) -> bool:
        means = [self.scores[strength].estimate for strength in sorted(self.scores)]
        return all(a < b for a, b in pairwise(means))

    @property
    def where(self) -> str:
        """The blocks, in words."""
        first, *more = self.layers
        return f"layers {first} to {more[-1]}" if more else f"layer {first}"

    def band(self, strength: float) -> tuple[float, float]:
        """The lowest and the highest end of the intervals of the change by random and orthogonal directions."""
        return min(each.low for each in self.random[strength]), max(each.high for each in self.random[strength])

    @property
    def beyond(self) -> bool:
        """Whether the vector changes the score beyond the band, in both directions."""
        down, up = min(STRENGTHS), max(STRENGTHS)
        return self.change[down].estimate < self.band(down)[0] and self.change[up].estimate > self.band(up)[1]


def run(
    model: str | None,
    data: Path,
    folder: Path,
    limit: int | None,
    pairs: int,
    held_out: int,
    seeds: int,
    questions: int,
    dose: float | None = None,
    only: Sequence[str] = (),
    learner: str = "caa",
    both_orders: bool = False,
    dtype: str = "float32",
) -> Report:
    """Learn, choose, test, and write the tables (`tables.md`) and figures into the folder, for some behaviours or all.

    With a `dose`, strength 1 is a push of that share of the pairs' activations; without it, it is the mean norm of the
    behaviours' own vectors. Trained vectors keep their learned norm.
    """
    lm = LM.load(model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in SYSTEM if (data / "caa" / name).is_dir() and (not only or name in only)]
    parts = {name: read(data / "caa" / name, limit, pairs, held_out) for name in names}
    if both_orders:
        parts = {name: part.in_both_orders() for name, part in parts.items()}
    if learner == "caa":
        layers = sorted({round(depth * lm.layout.layers) for depth in DEPTHS})
        vectors = learn(lm, {name: part.learn for name, part in parts.items()}, layers, folder, dose)
    else:
        vectors = {name: trained(lm, name, part.learn, folder) for name, part in parts.items()}
    chosen, curves = {}, {}
    for name, part in parts.items():
        at = choose(lm, name, part.held_out, vectors[name], folder) if learner == "caa" else None
        chosen[name] = vectors[name] if at is None else vectors[name].only([at])
        curves[name] = test(lm, name, part, chosen[name], seeds, folder)
    steered = {BASELINE: None} | {
        f"{name} {strength:+g}": strength * chosen[name] for name in names for strength in STRENGTHS
    }
    known = capability(lm, read_ab(data / CAPABILITY, limit=questions)[0], steered, folder)
    fluent = fluency(lm, steered, folder)
    about = {name: polarity(data / "caa" / name / "test_dataset_ab.json") for name in names}
    (folder / "tables.md").write_text(tables(parts, about, curves, known, fluent))
    lines = tuple(results(parts, curves, known, fluent))
    return Report("behaviours", machine(), {**versions(), "model": lm.name}, lines, spread=BOOTSTRAP)


# ---- data --------------------------------------------------------------------------------------------------


def read(folder: Path, limit: int | None, pairs: int, held_out: int) -> Data:
    """A behaviour's data: pairs sampled with a seed from the generate set, half with (A) matching and half with (B)."""
    test, excluded = read_ab(folder / "test_dataset_ab.json", exclude=True)
    generate, _ = read_ab(folder / "generate_dataset.json", exclude=True)
    stems = {stem(item.question) for item in test}
    free = [item for item in generate if stem(item.question) not in stems]
    random.Random(0).shuffle(free)
    sides = [[item for item in free if item.matching == letter] for letter in "AB"]
    drawn = [item for both in zip(*sides, strict=False) for item in both]
    tested = test if limit is None else read_ab(folder / "test_dataset_ab.json", exclude=True, limit=limit)[0]
    rest = drawn[held_out : held_out + pairs]
    return Data(rest, drawn[:held_out], tested, len(generate) - len(free), len(excluded))


def learn(
    lm: LM, items: Mapping[str, Sequence[ABItem]], layers: Sequence[int], folder: Path, dose: float | None
) -> dict[str, Steering]:
    """The behaviours' vectors at all layers, with equal norms at each (the paper's normalization), or with a dose."""
    norm: Norm = "raw" if dose is None else "relative"
    pairs = {
        name: [Pair(f"({i.matching})", f"({i.other})", i.question, "letters") for i in of] for name, of in items.items()
    }
    learned = {}
    for name in pairs:
        path = folder / f"{name}.safetensors"
        kept = load_steering(path) if path.is_file() else None
        wanted = (digest(pairs[name]), list(layers), norm)
        if kept is not None and (kept.card.data, list(kept.layers), kept.card.options["norm"]) == wanted:
            lm.check(kept)
            learned[name] = kept
    if missing := {name: of for name, of in pairs.items() if name not in learned}:
        new = learn_behaviours(lm, missing, layers, norm=norm, progress=say("learning"))
        for name, vector in new.items():
            save_steering(vector, folder / f"{name}.safetensors")
        learned |= new
    if dose is not None:
        return {name: dose * learned[name] for name in pairs}
    return equalised({name: learned[name] for name in pairs})


def trained(lm: LM, name: str, items: Sequence[ABItem], folder: Path) -> Steering:
    """BiPO's vector at every third block, learned from the same questions and letters."""
    path = folder / f"{name}-bipo.safetensors"
    pairs = [Pair(f"({i.matching})", f"({i.other})", i.question, "answers") for i in items]
    if not path.is_file():
        layers = list(range(0, lm.layout.layers, TRAINED_EVERY))
        save_steering(
            learn_bipo(lm, pairs, layers, steps=TRAINED_STEPS, rate=TRAINED_RATE, progress=say(f"{name}, bipo")), path
        )
    vector = load_steering(path)
    lm.check(vector)
    return vector


# ---- choosing and testing ----------------------------------------------------------------------------------


def choose(lm: LM, name: str, items: Sequence[ABItem], vector: Steering, folder: Path) -> int:
    """The layer at which p(matching) rises most with the strength, on held-out pairs."""
    at = {(layer, s): s * vector.only([layer]) for layer in vector.layers for s in STRENGTHS}
    arms = {BASELINE: None} | {f"layer {layer} {s:+g}": steering for (layer, s), steering in at.items()}
    records = scored(lm, f"{name}-layers", items, arms, {}, folder)
    score = {key: interval(records[f"layer {key[0]} {key[1]:+g}"]) for key in at}
    base = interval(records[BASELINE])
    slopes = {layer: slope({s: score[layer, s].estimate for s in STRENGTHS}) for layer in vector.layers}
    best = max(slopes, key=lambda layer: slopes[layer])
    cells = [Cell(layer, strength, estimate) for (layer, strength), estimate in score.items()]
    title = f"{name}: {len(items)} held-out pairs of the generate set, {lm.name}"
    (folder / f"{name}-layers.png").write_bytes(draw_sweep(cells, base, title, SCORE))
    return best


def slope(means: Mapping[float, float]) -> float:
    """The slope of the least-squares line through the means, by strength; the strengths are symmetric around 0."""
    return sum(strength * value for strength, value in means.items()) / sum(strength**2 for strength in means)


def test(lm: LM, name: str, data: Data, vector: Steering, seeds: int, folder: Path) -> Curve:
    """The vector, random directions of the same norm, and system messages, on the test set."""
    systems = dict(zip(("for", "against"), SYSTEM[name], strict=True)) if has_template(lm.tokenizer) else {}
    controls = [random_like(vector, seed) for seed in range(1, seeds + 1)]
    controls += [orthogonal_like(vector, seed) for seed in range(1, seeds + 1)]
    arms = {BASELINE: None} | {f"steered {s:+g}": s * vector for s in STRENGTHS} | dict.fromkeys(systems)
    arms |= {f"random {n} {s:+g}": s * control for n, control in enumerate(controls, 1) for s in STRENGTHS}
    records = scored(lm, f"{name}-test", data.test, arms, systems, folder)
    base = records[BASELINE]
    strengths = {0.0: base} | {s: records[f"steered {s:+g}"] for s in STRENGTHS}
    ends = (min(STRENGTHS), max(STRENGTHS))
    curve = Curve(
        layers=vector.layers,
        scores={s: interval(of) for s, of in strengths.items()},
        mass={s: mean(record.scores["mass"] for record in of.values()) for s, of in strengths.items()},
        dose=mean(record.dose for record in records["steered +1"].values()),
        systems={system: interval(records[system]) for system in systems},
        change={s: interval(records[f"steered {s:+g}"], base) for s in ends},
        random={
            s: tuple(interval(records[f"random {n} {s:+g}"], base) for n in range(1, len(controls) + 1)) for s in ends
        },
    )
    cells = [Cell(curve.layers[0], s, curve.scores[s]) for s in STRENGTHS]
    cells += [
        Cell(curve.layers[0], s, interval(records[f"random {n} {s:+g}"]), random=True)
        for n in range(1, len(controls) + 1)
        for s in STRENGTHS
    ]
    title = f"{name}: {data.questions} test questions, {lm.name}"
    (folder / f"{name}-test.png").write_bytes(draw_sweep(cells, curve.scores[0.0], title, SCORE))
    return curve


def scored(
    lm: LM,
    run: str,
    items: Sequence[ABItem],
    arms: Mapping[str, Steering | None],
    systems: Mapping[str, str],
    folder: Path,
) -> dict[str, dict[str, Record]]:
    """The records of every item in every arm, by arm and item."""
    requests = ab_requests(lm, items, arms, systems)
    out = folder / f"{run}.jsonl"
    records = score_ab(lm, requests, items, out=out, batch_size=BATCH, progress=say(run), about={"run": run})
    return by_arm(records)


def by_arm(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    records_by_arm: dict[str, dict[str, Record]] = {}
    for record in records:
        records_by_arm.setdefault(record.arm, {})[record.item] = record
    return records_by_arm


def interval(records: Mapping[str, Record], before: Mapping[str, Record] | None = None) -> Interval:
    """The mean of p(matching), or of its change from `before`, item by item."""
    names = sorted(records)
    after = [records[item].scores["matching"] for item in names]
    groups = [records[item].group or item for item in names]
    if before is None:
        return paired_bootstrap(after, groups=groups)
    return paired_bootstrap([before[item].scores["matching"] for item in names], after, groups=groups)


# ---- costs -------------------------------------------------------------------------------------------------


def capability(
    lm: LM, items: Sequence[ABItem], arms: Mapping[str, Steering | None], folder: Path
) -> dict[str, Interval]:
    """The correct letter's share on MMLU's two-option questions, in every arm."""
    return {arm: interval(of) for arm, of in scored(lm, "mmlu", items, arms, {}, folder).items()}


def fluency(lm: LM, arms: Mapping[str, Steering | None], folder: Path) -> dict[str, tuple[float, float]]:
    """The fluency of each arm's answers to a few open prompts.

    The median perplexity under the unsteered model, and the mean share of distinct word pairs.
    """
    requests = [
        ArmPrompt(arm, str(n), prompt, steering)
        for n, prompt in enumerate(OPEN_PROMPTS)
        for arm, steering in arms.items()
    ]
    records = answer(
        lm,
        requests,
        score=lambda _, generation: {
            "distinct": distinct_n(generation.text),
            "repeated": repeated_share(generation.text),
        },
        max_new_tokens=TOKENS,
        out=folder / "fluency.jsonl",
        progress=say("fluency"),
    )
    kept = [record for record in records if record.answer.strip()]
    values = perplexities_of(lm, [str(record.prompt) for record in kept], [record.answer for record in kept])
    collected: dict[str, list[float]] = {arm: [] for arm in arms}
    for record, value in zip(kept, values, strict=True):
        collected[record.arm].append(value)
    distinct = {arm: mean(r.scores["distinct"] for r in records if r.arm == arm) for arm in arms}
    return {arm: (median(of) if of else float("inf"), distinct[arm]) for arm, of in collected.items()}


# ---- results -----------------------------------------------------------------------------------------------


def results(
    parts: Mapping[str, Data],
    curves: Mapping[str, Curve],
    known: Mapping[str, Interval],
    fluent: Mapping[str, tuple[float, float]],
) -> list[Result]:
    """All numbers, as one result each."""
    lines = []
    for name, curve in curves.items():
        case = f"{name}, {curve.where}, {parts[name].questions} questions"
        for strength in sorted(curve.scores):
            estimate = curve.scores[strength]
            lines.append(
                Result(case, f"p(matching) at {strength:+g}", estimate.estimate, "", estimate.low, estimate.high)
            )
            lines.append(Result(case, f"mass at {strength:+g}", curve.mass[strength], ""))
        for system, estimate in curve.systems.items():
            lines.append(
                Result(case, f"p(matching), system {system}", estimate.estimate, "", estimate.low, estimate.high)
            )
        for strength, change in curve.change.items():
            lines.append(Result(case, f"change at {strength:+g}", change.estimate, "", change.low, change.high))
            low, high = curve.band(strength)
            middle = mean(each.estimate for each in curve.random[strength])
            lines.append(Result(case, f"change at {strength:+g}, random", middle, "", low, high))
        lines.append(Result(case, "mean dose at +1", curve.dose, ""))
        lines.append(Result(case, "monotone", float(curve.monotone), ""))
        lines.append(Result(case, "beyond random", float(curve.beyond), ""))
    both = sum(curve.monotone and curve.beyond for curve in curves.values())
    lines.append(Result("all", "behaviours monotone and beyond random", float(both), "", target=Target(3)))
    for arm, share in known.items():
        lines.append(Result(arm, "mmlu, correct letter's share", share.estimate, "", share.low, share.high))
        lines.append(Result(arm, "median perplexity", fluent[arm][0], ""))
        lines.append(Result(arm, "distinct word pairs", fluent[arm][1], ""))
    return lines


def tables(
    parts: Mapping[str, Data],
    about: Mapping[str, str],
    curves: Mapping[str, Curve],
    known: Mapping[str, Interval],
    fluent: Mapping[str, tuple[float, float]],
) -> str:
    """The tables in Markdown: the changes in score, the controls, and the costs."""
    strengths = sorted((0.0, *STRENGTHS))
    heads = [f"{s:+g}" if s else "0" for s in strengths]
    down, up = min(STRENGTHS), max(STRENGTHS)
    moved = [
        [
            f"{name} ({about[name]})",
            curve.where.partition(" ")[2],
            f"{curve.dose:.2f}",
            *(shown(curve.scores[s]) for s in strengths),
            *(shown(curve.systems[system]) if system in curve.systems else "" for system in ("for", "against")),
        ]
        for name, curve in curves.items()
    ]
    against = [
        [
            name,
            *(cell for s in (down, up) for cell in (shown(curve.change[s], "+.3f"), between(curve.band(s)))),
            "yes" if curve.monotone else "no",
            "yes" if curve.beyond else "no",
        ]
        for name, curve in curves.items()
    ]
    mass = [[name, *(f"{curve.mass[s]:.3f}" for s in strengths)] for name, curve in curves.items()]
    cost = []
    for name in curves:
        arms = [f"{name} {s:+g}" if s else BASELINE for s in strengths]
        cost.append([name, "MMLU", *(shown(known[arm]) for arm in arms)])
        cost.append(["", "perplexity", *(f"{fluent[arm][0]:.1f}" for arm in arms)])
        cost.append(["", "distinct word pairs", *(f"{fluent[arm][1]:.2f}" for arm in arms)])
    used = [
        [name, *map(str, (len(d.learn), len(d.held_out), len(d.test), d.excluded, d.shared))]
        for name, d in parts.items()
    ]
    return "\n\n".join(
        (
            "p(matching) on the test set by strength, beside system messages for and against the behaviour:",
            table(["behaviour", "layer", "dose at 1", *heads, "system for", "system against"], moved),
            "Change of p(matching) from unsteered, and the band of random and orthogonal directions of the same norm:",
            table(["behaviour", f"{down:+g}", "random", f"{up:+g}", "random", "monotone", "beyond random"], against),
            "Mass of both letters:",
            table(["behaviour", *heads], mass),
            "What it costs:",
            table(["behaviour", "score", *heads], cost),
            "Questions:",
            table(
                ["behaviour", "learned from", "layer chosen on", "tested on", "not A or B", "asked in the test"], used
            ),
        )
    )


def shown(estimate: Interval, form: str = ".2f") -> str:
    return f"{estimate.estimate:{form}} {between((estimate.low, estimate.high), form)}"


def between(ends: tuple[float, float], form: str = "+.3f") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
