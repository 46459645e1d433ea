"""Plans a run: what it consists of, and how long it will take, before it starts."""

from __future__ import annotations

import fnmatch
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.bench import behaviours, instructions, refusals, traits
from trimtab.bench.doses import TOKENS
from trimtab.bench.emphasizing import EMPHASIS
from trimtab.bench.learning import CONTROL, UNDIRECTED
from trimtab.bench.store import code_digest
from trimtab.bench.tasks import Cost, Outline
from trimtab.data import queries
from trimtab.errors import TrimtabError
from trimtab.learn.contrast import versions
from trimtab.methods.recipe import Recipe, recipes

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel
    from trimtab.lm import LM

NATS = (0.25, 1.0, 4.0)
ITEMS = (64, 48, 32, 24, 16, 12, 8)
"""The numbers of items that a budget chooses from."""
ENOUGH = 12
"""With a budget, whole tasks are left out before a task has fewer items than this."""
OVER = "it was left out so that the rest fits the budget"
DOSES = 14
"""The approximate number of divergences that are measured to find the strengths of one method."""
PROMPTS_PER_DOSE = 6
"""The number of prompts that each divergence is measured on."""
ON_PROMPTS = 0.45
"""The approximate share of methods that act on prompts, which are therefore prefilled again for each strength."""
TRAINING = 40 * 8 * 3.0
"""How often a method that learns with gradients reads the answers of a pair: 40 steps of 8, forward and backward."""
WON = 0.25
"""The approximate share of runs that controls and side effects are measured for."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        methods: Names, or patterns such as `re*`; empty: all methods, including the emphasizing ones. A name or pattern
            that begins with `!` is excluded.
        tasks: Likewise, with kinds (`instructions`, `behaviours`, `refusal`, `traits`, and those that don't run by
            default, `more-instructions` and `more-traits`) and names of tasks.
        nats: The divergences.
        items: The maximum number of items of a task.
        pairs: The maximum number of pairs to learn from.
        tokens: The maximum length of an answer, in tokens.
        seed: The seed of everything random.
        data: A folder with external data: CAA's sets, IFEval, MMLU, XSTest, harmful requests.
        lora: Whether to finetune a LoRA for each task, too.
        thorough: Measure controls and side effects at every strength, not only where there is a gain.
    """

    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    nats: tuple[float, ...] = NATS
    items: int = 24
    pairs: int = 24
    tokens: int = 48
    seed: int = 0
    data: Path | None = None
    lora: bool = False
    thorough: bool = False

    def __post_init__(self) -> None:
        if not self.nats or not all(0 < level < 100 for level in self.nats):
            shown = ", ".join(f"{level:g}" for level in self.nats)
            raise TrimtabError(f"divergences are numbers of nats above 0, such as 0.25,1,4, got {shown or 'none'}")
        for name, least in (("items", 4), ("pairs", 8), ("tokens", 4)):
            if getattr(self, name) < least:
                raise TrimtabError(f"{name} are at least {least}, got {getattr(self, name)}")
        if self.data is not None and not self.data.is_dir():
            raise TrimtabError(f"there is no folder {self.data}; --data names one with caa, ifeval, mmlu …")


@dataclass(frozen=True)
class Plan:
    """A run: its tasks, the rows of each, and the tasks that are left out, with the reasons."""

    settings: Settings
    outlines: tuple[Outline, ...]
    recipes: Mapping[str, Recipe]
    rows: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def nats(self) -> tuple[float, ...]:
        """The divergences, smallest first."""
        return tuple(sorted(set(self.settings.nats)))

    @property
    def sides(self) -> int:
        """The number of items of each side effect."""
        return max(4, self.settings.items // 2)

    @property
    def cells(self) -> int:
        """The number of cells to run."""
        return len(self.outlines) * len(self.rows)

    def head(self, lm: LM) -> dict[str, Any]:
        """Everything that the contents of the run's files depend on; not the location of its data."""
        settings = asdict(self.settings)
        folder = self.settings.data
        settings["data"] = None if folder is None else sorted(path.name for path in folder.iterdir())
        return {
            "bench": 1,
            "code": [code_digest()],
            "model": {**asdict(lm.identity), **lm.runs_in},
            "settings": settings,
            "tasks": [outline.name for outline in self.outlines],
            "rows": list(self.rows),
            "titles": {name: self.title(name) for name in self.rows},
            "left_out": [list(entry) for entry in self.left_out],
            "versions": versions(),
        }

    def title(self, name: str) -> str:
        """A short description of a row's method."""
        if name in self.recipes:
            return self.recipes[name].title
        return EMPHASIS[name].title if name in EMPHASIS else "a finetuned low-rank adapter (arXiv 2106.09685)"

    def cost(self) -> Cost:
        """The approximate number of tokens to generate and to read."""
        total = Cost()
        runs = len(self.nats)
        extra = runs * (1.0 if self.settings.thorough else WON)
        sides = Cost(2 * self.sides, 8.0 * self.sides * 150)
        for outline in self.outlines:
            items = min(self.settings.items, outline.available)
            prompts = Cost(0, outline.prompts * outline.prompt)
            total += self.settings.pairs * outline.writing_cost + 3 * items * (outline.arm + prompts)
            doses = Cost(0, DOSES * PROMPTS_PER_DOSE * (TOKENS + ON_PROMPTS * outline.prompt))
            for name in self.rows:
                if self._acts(name, outline):
                    total += Cost(0, self._learns(name, outline)) + (1 + extra / runs) * doses + extra * sides
                    total += (runs + extra) * items * (outline.arm + ON_PROMPTS * prompts)
        return total

    def _learns(self, name: str, outline: Outline) -> float:
        """The number of tokens that a method reads to learn."""
        recipe = self.recipes.get(name)
        pairs = self.settings.pairs * outline.pair
        gradients = name == "LoRA" or (recipe is not None and ("gradient" in recipe.reads or name == "distill"))
        return pairs + TRAINING * outline.answers if gradients else 2 * pairs

    def _acts(self, name: str, outline: Outline) -> bool:
        """Whether the method can act on the task, as far as is known in advance."""
        if name in EMPHASIS:
            return outline.instruction_in_prompt
        recipe = self.recipes.get(name)
        if recipe is None:
            return True
        conditional = any(option.kind == "texts" and option.name in ("harmless", "when") for option in recipe.options)
        return name not in UNDIRECTED and (not conditional or outline.kind == "refusal")


def plan(settings: Settings) -> Plan:
    """The plan of a run. No model is loaded for it.

    Raises:
        TrimtabError: A method or a task that doesn't exist, by name, or none that can be run.
    """
    known = recipes()
    names = [*known, *EMPHASIS]
    chosen = _chosen("method", settings.methods, {name: (name,) for name in names})
    rows = [name for name in names if name in chosen]
    if CONTROL not in rows:
        rows.append(CONTROL)  # a gain counts only if a random direction doesn't have it, too
    rows.sort(key=lambda name: (name != CONTROL, names.index(name)))
    rows += ["LoRA"] if settings.lora else []
    available, left_out = _available(settings)
    named = settings.tasks
    if all(pattern.startswith("!") for pattern in named):
        named = (*named, f"!{traits.MORE}", f"!{instructions.MORE}")
    tasks = _chosen("task", named, {outline.name: (outline.name, outline.kind) for outline in available}, left_out)
    outlines = tuple(outline for outline in available if outline.name in tasks)
    left_out = [(kind, why) for kind, why in left_out if _is_requested(named, kind)]
    return Plan(settings, outlines, {n: r for n, r in known.items() if n in rows}, tuple(rows), tuple(left_out))


def _available(settings: Settings) -> tuple[list[Outline], list[tuple[str, str]]]:
    """All tasks that are available, and the kinds that aren't, with the reason."""
    outlines: list[Outline] = []
    left_out = []
    try:
        outlines += instructions.outlines(settings.data, settings.pairs, settings.tokens, settings.seed)
    except TrimtabError as error:
        left_out += [(kind, str(error)) for kind in ("instructions", instructions.MORE)]
    for kind, made in (
        ("behaviours", behaviours.outlines(settings.data, settings.pairs, settings.seed)),
        ("refusal", refusals.outlines(settings.data, settings.pairs)),
        ("traits", traits.outlines(settings.tokens, settings.pairs)),
    ):
        outlines += made
        if not made:
            left_out.append((kind, "its data aren't there: give --data FOLDER, or set TRIMTAB_DATA"))
    return outlines, left_out


def _is_requested(patterns: Sequence[str], kind: str) -> bool:
    """Whether a kind was requested; only then does it matter that it isn't available."""
    named = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return any(fnmatch.fnmatchcase(kind, pattern) for pattern in named or ["*"]) and not any(
        fnmatch.fnmatchcase(kind, pattern) for pattern in excluded
    )


def _chosen(
    what: str, wanted: Sequence[str], known: Mapping[str, Sequence[str]], left_out: Sequence[tuple[str, str]] = ()
) -> set[str]:
    """The names selected by names, kinds and patterns; all, if only exclusions are given."""
    chosen: set[str] = set(known) if all(pattern.startswith("!") for pattern in wanted) else set()
    for pattern in wanted:
        is_exclusion = pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        mine = {name for name, called in known.items() if any(fnmatch.fnmatchcase(call, pattern) for call in called)}
        if not mine and is_exclusion and any(fnmatch.fnmatchcase(kind, pattern) for kind, _ in left_out):
            continue  # an unavailable kind needs no exclusion
        if not mine:
            why = next((f"; {reason}" for kind, reason in left_out if kind == pattern), "")
            listed = ", ".join(dict.fromkeys(call for called in known.values() for call in reversed(called)))
            raise TrimtabError(f"there is no {what} {pattern!r}{why or f'; there are {listed}'}")
        chosen = chosen - mine if is_exclusion else chosen | mine
    if not chosen:
        raise TrimtabError(f"no {what} is left of those that were named: {', '.join(wanted)}")
    return chosen


# ---- time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Tokens per second: generated, in a batch, and only read."""

    generated: float
    read: float

    def seconds(self, cost: Cost) -> float:
        """How long that takes, in seconds."""
        return cost.generated / self.generated + cost.read / self.read


def speed_of(lm: LM, answering: LanguageModel | None = None) -> Speed:
    """The speed, measured on a few queries in a few seconds; `answering` generates if it is given, else `lm`."""
    from trimtab.evaluate.divergence import reference

    questions = list(queries("tune")[:16])
    generating = answering or lm
    generating.generate(questions[:2], max_new_tokens=2)
    started = time.perf_counter()
    answers = generating.generate(questions, max_new_tokens=16)
    generated = sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)
    base = reference(lm, questions[:6], tokens=8)
    started = time.perf_counter()
    lm.answer_logits(base.texts)
    read = sum(len(text.prompt) + len(text.answer) for text in base.texts) / (time.perf_counter() - started)
    return Speed(generated, read)


def fit_to_budget(full_plan: Plan, speed: Speed, budget: float) -> Plan:
    """The plan with as many items, and then as many tasks of each kind, as fit into a budget in seconds.

    Raises:
        TrimtabError: Not even the smallest plan fits; the message says how long it takes.
    """
    counts = [full_plan.settings.items, *(count for count in ITEMS if count < full_plan.settings.items)]
    enough = [items for items in counts if items >= ENOUGH] or counts[:1]
    tasks = _fewer(full_plan.outlines)
    for names, items in [
        *((names, items) for names in tasks for items in enough),
        *((tasks[-1], items) for items in counts[len(enough) :]),
    ]:
        smaller = restrict_plan(full_plan, names, items)
        if speed.seconds(smaller.cost()) <= budget:
            return smaller
    needed = speed.seconds(smaller.cost())
    raise TrimtabError(
        f"even with {smaller.settings.items} items of {len(smaller.outlines)} tasks this takes about"
        f" {duration(needed)}, and the budget is {duration(budget)}: give more time, or fewer --methods or --tasks"
    )


def restrict_plan(full_plan: Plan, names: Collection[str], items: int) -> Plan:
    """The plan with these of its tasks and this many items; the others are listed as left out because of the budget."""
    kept = tuple(outline for outline in full_plan.outlines if outline.name in names)
    removed = tuple((outline.name, OVER) for outline in full_plan.outlines if outline.name not in names)
    settings = replace(full_plan.settings, items=items)
    return replace(full_plan, settings=settings, outlines=kept, left_out=(*full_plan.left_out, *removed))


def _fewer(outlines: Sequence[Outline]) -> list[list[str]]:
    """Ever shorter lists of tasks, from all to one of each kind; each step drops the last of the most frequent kind."""
    left = list(outlines)
    each = [[outline.name for outline in left]]
    while True:
        count = Counter(outline.kind for outline in left)
        kind, most = max(count.items(), key=lambda entry: entry[1])
        if most == 1:
            return each
        left.remove([outline for outline in left if outline.kind == kind][-1])
        each.append([outline.name for outline in left])


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
