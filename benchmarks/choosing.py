"""Chooses a layer, an operation and a strength for a benchmark in which each prompt has its own direction."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.bench.doses import TOKENS, Doses
from trimtab.engines.transformers.generate import Generation
from trimtab.errors import TrimtabError
from trimtab.evaluate.divergence import reference
from trimtab.evaluate.fluency import Fluency, distinct_n, fluencies
from trimtab.learn.moments import PairMoments
from trimtab.lm import LM, DoseWarning
from trimtab.methods.instruct import steering_from
from trimtab.steering import Positions, Steering
from trimtab.text.repetition import repeated_share
from trimtab.tune.candidates import Candidate, Setting
from trimtab.tune.guard import STANDARD
from trimtab.tune.halving import Rung
from trimtab.tune.meter import Outcome
from trimtab.tune.split import split_by_query
from trimtab.tune.tune import Tuned, search

SEARCH_QUERIES = 12
HELD_OUT_QUERIES = 8
RUNGS = (Rung(2, 6), Rung(6, 3), Rung(SEARCH_QUERIES, 1))
DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
BATCH = 96

Form = tuple[str, float, Positions | None]
"""An operation, a strength, and its positions (`None`: the operation's default)."""

Progress = Callable[[int, int], None]
Moments = Mapping[int, PairMoments]


@dataclass(frozen=True)
class Choice:
    """The search's choice: a setting, or `None` for not steering, and the reason; its cost, and its held-out score."""

    setting: Setting | None
    reason: str
    answers: int
    tokens: int
    score: float = 0.0


@dataclass(frozen=True)
class Task:
    """Prompts to search on, `SEARCH_QUERIES + HELD_OUT_QUERIES` of them, each with the moments of its own instruction.

    `instructed` are the prompts with the instruction, which perplexities are conditioned on; `complies(i, answer, cut)`
    judges an answer.
    """

    name: str
    prompts: Sequence[str]
    instructed: Sequence[str]
    moments: Sequence[Moments]
    complies: Callable[[int, str, bool], bool]


def layers_of(lm: LM) -> list[int]:
    """The layers that are tried."""
    return sorted({round(depth * lm.layout.layers) for depth in DEPTHS})


def steering_of(moments: Moments, setting: Setting | None) -> Steering | None:
    """The steering with this setting, from these moments."""
    if setting is None:
        return None
    where = Positions.parse(setting.positions)
    return setting.strength * steering_from(moments, setting.layer, operation=setting.operation, positions=where)


def choose(lm: LM, task: Task, grid: Sequence[Form], tokens: int) -> Choice:
    """Search all layers with each form of the grid."""
    candidates, settings = [], {}
    for operation, strength, where in grid:
        for layer in layers_of(lm):
            steering = strength * steering_from(task.moments[0], layer, operation=operation, positions=where)
            setting = Setting(layer, strength, str(steering.edits[0].positions), operation)
            candidates.append(Candidate(setting, steering))
            settings[steering] = setting

    def trial(steerings: Sequence[Steering | None], rows: Sequence[int], progress: Progress) -> list[Outcome]:
        own = [
            None if choice is None else steering_of(task.moments[i], settings[choice])
            for choice, i in zip(steerings, rows, strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DoseWarning)
            answers = lm.generate(
                [task.prompts[i] for i in rows],
                own,
                max_new_tokens=tokens,
                batch_size=BATCH,
                progress=progress,
            )
        read = _read(lm, [task.instructed[i] for i in rows], answers, confirm=set(rows) <= held_out)
        return [
            Outcome(
                float(task.complies(i, answer.text, answer.finish_reason == "length")),
                answer.applied.dose,
                len(answer.token_ids),
                fluency,
            )
            for i, answer, fluency in zip(rows, answers, read, strict=True)
        ]

    names = [f"{i} {prompt}" for i, prompt in enumerate(task.prompts)]
    share = HELD_OUT_QUERIES / len(names)
    held_out = set(split_by_query(names, held_out=share, seed=0).held_out)

    def attempt(some: Sequence[Candidate], rungs: Sequence[Rung]) -> Tuned:
        return search(
            some,
            names,
            trial,
            guard=STANDARD,
            rows=BATCH,
            rungs=rungs,
            held_out=share,
            tokens_each=tokens,
            progress=say(task.name),
        )

    tuned = attempt(candidates, RUNGS)
    if tuned.held_out is not None and tuned.held_out.broken:
        # perplexities are measured only in the confirmation: if a choice fails there, the next best is tried
        last = [row for row in tuned.table if row.setting is not None and row.items == SEARCH_QUERIES]
        last.sort(key=lambda row: (-row.score, row.dose))
        beaten = [row.setting for row in last[1:] if row.score > row.unsteered]
        if beaten:
            print(f"{task.name}: {tuned.reason}", flush=True)
            tuned = attempt([choice for choice in candidates if choice.setting in beaten], RUNGS[-1:])
    print(f"{task.name}: {tuned.setting}: {tuned.reason}", flush=True)
    score = 0.0 if tuned.held_out is None else tuned.held_out.steered
    return Choice(tuned.setting, tuned.reason, tuned.answers, tuned.tokens, score)


def by_nats(lm: LM, task: Task, nats: float) -> Choice:
    """The strength at which the mean difference, added at 0.6 of the depth, has this divergence from the unsteered
    model.

    Nothing is generated under a steering, and no answer is judged. `tokens` are those that are read and generated.
    """
    layer = round(0.6 * lm.layout.layers)
    steerings = [steering_from(moments, layer, operation="add") for moments in task.moments[:SEARCH_QUERIES]]
    base = reference(lm, list(task.prompts[:SEARCH_QUERIES]), tokens=TOKENS)
    prompts, answers = (sum(len(getattr(text, part)) for text in base.texts) for part in ("prompt", "answer"))
    doses = Doses(lm, base, steerings)
    try:
        with lm._caching_prefixes():
            dose = doses.at(nats)
    except TrimtabError as error:
        return Choice(None, str(error), len(base.texts), prompts + (1 + doses.measured) * answers)
    setting = Setting(layer, dose.factor, str(steerings[0].edits[0].positions), "add")
    reason = f"{dose.reached:.2f} nats (95th percentile), {dose.mean:.2f} on average"
    print(f"{task.name}: {setting}: {reason}", flush=True)
    return Choice(setting, reason, len(base.texts), prompts + (1 + doses.measured) * answers)


def better(choices: Sequence[Choice]) -> Choice:
    """The choice that steers with the best score on held-out queries, the first of ties; else the first."""
    return max(choices, key=lambda choice: (choice.setting is not None, choice.score if choice.setting else 0.0))


def _read(lm: LM, prompts: Sequence[str], answers: Sequence[Generation], *, confirm: bool) -> list[Fluency]:
    """The answers' fluency. Perplexities cost as much as the answers, so they are measured only if `confirm` is set."""
    if confirm:
        return fluencies(lm, prompts, answers)
    return [
        Fluency(
            perplexity=math.e,
            distinct=distinct_n(answer.text),
            repeated=repeated_share(answer.text),
            tokens=len(answer.token_ids),
            empty=not answer.text.strip(),
            cut=answer.finish_reason == "length",
        )
        for answer in answers
    ]


def keep(path: Path, make: Callable[[], Choice]) -> Choice:
    """The choice in a file; if there is none yet, it is made and written."""
    if not path.is_file():
        choice = make()
        path.write_text(json.dumps(asdict(choice), indent=2) + "\n")
    return kept(path)


def kept(path: Path) -> Choice:
    """The choice in a file."""
    stored = json.loads(path.read_text())
    setting = None if stored["setting"] is None else Setting(**stored["setting"])
    return Choice(**{**stored, "setting": setting})


def say(what: str) -> Progress:
    """A callback that prints the progress on one line."""
    return lambda done, total: print(f"\r{what}: {done}/{total}   ", end="", flush=True)
