"""`trimtab demo`: instructions made to hold, learned and measured in front of the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimtab.commands.model import JsonOption, ModelOption, load_model
from trimtab.commands.terminal import progress_bar, show, write_json

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation
    from trimtab.evaluate import Interval
    from trimtab.lm import LM
    from trimtab.steering import Steering

MAX_NEW_TOKENS = 48
BATCH_SIZE = 32
TUNED_FOR = "SmolLM2-135M-Instruct"
TUNED_BLOCKS = 30


@dataclass(frozen=True)
class Setting:
    """An instruction and how it is steered: at which block of the default model, and how strongly."""

    name: str
    shown: str
    layer: int
    strength: float

    def layer_of(self, blocks: int) -> int:
        """The block at the same share of the depth in a model of `blocks` blocks."""
        return min(round(self.layer / TUNED_BLOCKS * blocks), blocks - 1)


SETTINGS = (
    Setting("json", "answer in JSON", 18, 0.6),
    Setting("title", "a title in <<double angular brackets>>", 24, 0.45),
    Setting("bullets", "a list of bullet points", 9, 1.2),
    Setting("sentence", "one sentence", 18, 0.6),
)
"""Found on 16 of the package's `tune` queries, which are neither learned from nor tested on: of the blocks 9, 12, …,
24, each at one to three strengths, the one after which most answers had the form and did not go in circles; among
equals, the one that left most on topic. The phrasings are some that the unsteered model often ignores there.
"""

# Measured on 16 `tune` queries. Without the instruction: JSON at block 18 x 0.8, the title at 24 x 0.6, bullets and
# sentence at 15 x 1.0. Capital letters: at 18 x 0.6 and at 24 x 0.6.
LIMITS = """\
What such steering does not do on a model this small, measured on 16 other queries: without the instruction in the
prompt, JSON, the title and the bullets came in 0 of 16 answers each, one sentence in 5. Capital letters, with the
instruction in the prompt, held in 0 of 16 unsteered and in 1 of 16 steered. And the form is all that is steered:
what the answers say stays as good or bad as the model, and "on topic" tells where it got worse."""
UNTUNED = "If little holds here, look for a better block and strength: --json tells what was tried."


@dataclass(frozen=True)
class Answer:
    """One answer, and what code can tell of it. It holds when it has the form and doesn't go in circles."""

    text: str
    has_form: bool
    repeated: float
    on_topic: bool
    holds: bool


@dataclass(frozen=True)
class Result:
    """What one instruction came to on held-out prompts, unsteered and steered."""

    setting: Setting
    layer: int
    dose: float
    prompts: tuple[str, ...]
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    difference: Interval
    seconds: float


def demo(
    model: ModelOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Learn from and test on at most this many queries. Below 24, don't believe the counts."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """See steering work, in under three minutes on two CPU cores.

    A small model often ignores the form it is asked for. For a few such instructions, this learns a steering from
    queries with and without the instruction, then answers queries it has not seen, unsteered and steered, the
    instruction in the prompt both times. The forms are checked by code and the counts come with an interval.

    [bold]  trimtab demo
      trimtab demo --model Qwen/Qwen2.5-0.5B-Instruct
      trimtab demo --json > demo.json[/bold]
    """
    from trimtab.data import instructions, queries

    started, worked = time.perf_counter(), time.process_time()
    dtype = "float32" if model is None else "auto"
    lm = load_model(model, device=None, dtype=dtype, revision=None, layers_path=None, quiet=json)
    learn, test = queries("learn")[:limit], queries("test")[:limit]
    if not json:
        show(_opening(lm, len(learn), len(test)))
    results = []
    for setting in SETTINGS:
        with progress_bar(setting.shown, quiet=json) as progress:
            results.append(try_setting(lm, setting, learn, test, progress))
        if not json:
            show(_shown(results[-1], instructions()[setting.name].test[0]))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    if json:
        write_json(_document(lm, results, len(learn), seconds, cpu_seconds))
    else:
        show(_summary(results), _closing(lm, seconds, cpu_seconds))


def try_setting(
    lm: LM,
    setting: Setting,
    learn: Sequence[str],
    test: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Learn one instruction from the queries `learn`, and answer the queries `test` without and with its steering.

    `progress(done, total)` counts one for each text read, and one for each token that may be written.
    """
    from trimtab.data import instruction_pairs, instructions, prompts
    from trimtab.evaluate import paired_bootstrap
    from trimtab.methods.instruct import learn_instruct

    started = time.perf_counter()
    instruction = instructions()[setting.name]
    layer = setting.layer_of(lm.layout.layers)
    pairs = instruction_pairs(learn, instruction.learn)
    asked = prompts(test, instruction.test)
    steps = _Steps(progress, [2 * len(pairs), MAX_NEW_TOKENS * len(asked), MAX_NEW_TOKENS * len(asked)])
    steering = learn_instruct(lm, pairs, layers=[layer], operation="add", progress=steps.part(0)) * setting.strength
    unsteered = _answers(lm, asked, None, steps.part(1))
    steered = _answers(lm, asked, steering, steps.part(2))
    before = tuple(_judged(setting.name, query, answer) for query, answer in zip(test, unsteered, strict=True))
    after = tuple(_judged(setting.name, query, answer) for query, answer in zip(test, steered, strict=True))
    return Result(
        setting=setting,
        layer=layer,
        dose=sum(answer.applied.dose for answer in steered) / len(steered),
        prompts=tuple(asked),
        before=before,
        after=after,
        difference=paired_bootstrap([answer.holds for answer in before], [answer.holds for answer in after]),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Steps:
    """Several counts of work that follow each other, shown as one."""

    progress: Callable[[int, int], None] | None
    sizes: Sequence[int]

    def part(self, index: int) -> Callable[[int, int], None] | None:
        if self.progress is None:
            return None
        report, before, size = self.progress, sum(self.sizes[:index]), self.sizes[index]
        return lambda done, total: report(before + size * done // total, sum(self.sizes))


def _answers(
    lm: LM, prompts: Sequence[str], steering: Steering | None, progress: Callable[[int, int], None] | None
) -> list[Generation]:
    return lm.generate(prompts, steering, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE, progress=progress)


def _judged(name: str, query: str, answer: Generation) -> Answer:
    from trimtab.evaluate import CONSTRAINTS, on_topic, repeated_share
    from trimtab.text.repetition import REPEATED_LIMIT

    has_form = CONSTRAINTS[name](answer.text, cut=answer.finish_reason == "length")
    repeated = repeated_share(answer.text)
    holds = has_form and repeated <= REPEATED_LIMIT
    return Answer(answer.text, has_form, repeated, on_topic(query, answer.text), holds)


# ---- what the user sees ------------------------------------------------------------------------------------


def _opening(lm: LM, learned: int, tested: int) -> str:
    lines = [
        f"{lm.name}, {_dtype(lm)} on {lm.model.device.type}, greedy, {MAX_NEW_TOKENS} tokens.",
        f"Each steering is learned now, from {learned} queries with and without an instruction, and tried on {tested}"
        " others.",
        "The instruction stands in every prompt; the steering is to make it hold.",
    ]
    if lm.name != TUNED_FOR:
        lines.append(f"Blocks and strengths were tuned for {TUNED_FOR}: on this model they are untuned guesses.")
    if tested < 24:
        lines.append("So few queries prove nothing.")
    return "\n".join(lines)


def _dtype(lm: LM) -> str:
    return str(lm.model.dtype).removeprefix("torch.")


def _shown(result: Result, phrasing: str) -> RenderableType:
    """One instruction: the counts, then one or two prompts with both answers side by side."""
    head = Text.assemble(
        ("\n" + result.setting.shown, "bold"),
        (f'  "{phrasing}"', "italic"),
        (f"  block {result.layer}, strength {result.setting.strength:g}, dose {result.dose:.0%}", "dim"),
    )
    return Group(head, _counts(result), *(_side_by_side(result, row) for row in telling(result)))


def _counts(result: Result) -> Text:
    count = len(result.prompts)
    return Text.assemble(
        "holds in ",
        (f"{_held(result.before)} of {count}", "bold red"),
        " unsteered, ",
        (f"{_held(result.after)} of {count}", "bold green"),
        f" steered: {_points(result.difference)}",
        (f"   {result.seconds:.0f} s", "dim"),
    )


def telling(result: Result) -> list[int]:
    """The rows worth showing: the first that the steering turned, and the first that it lost or left wrong."""
    pairs = list(zip(result.before, result.after, strict=True))
    turned = next((row for row, (before, after) in enumerate(pairs) if after.holds and not before.holds), None)
    wrong = next((row for row, (_, after) in enumerate(pairs) if not after.holds), None)
    return [row for row in (turned, wrong) if row is not None] or [0]


def _side_by_side(result: Result, row: int) -> Table:
    before, after = result.before[row], result.after[row]
    table = Table(title=Text(result.prompts[row], style="dim"), title_justify="left", expand=True, show_lines=False)
    for name, answer in (("unsteered", before), ("steered", after)):
        table.add_column(Text.assemble(f"{name}  ", _verdict(answer)), ratio=1, overflow="fold")
    table.add_row(Text(before.text.strip()), Text(after.text.strip()))
    return table


def _verdict(answer: Answer) -> Text:
    if answer.holds:
        return Text("✓ holds", style="green")
    return Text("✗ goes in circles" if answer.has_form else "✗ does not hold", style="red")


def _summary(results: Sequence[Result]) -> Table:
    table = Table("instruction", "unsteered", "steered", "difference in points, 95 %", "on topic", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    table.title, table.title_justify, table.header_style = Text("\nAnswers that hold"), "left", "dim"
    for result in results:
        count = len(result.prompts)
        table.add_row(
            result.setting.shown,
            f"{_held(result.before)}/{count}",
            f"{_held(result.after)}/{count}",
            _points(result.difference),
            f"{_on_topic(result.before)} → {_on_topic(result.after)}",
        )
    return table


def _closing(lm: LM, seconds: float, cpu_seconds: float) -> str:
    note = LIMITS if lm.name == TUNED_FOR else UNTUNED
    return f"\n{note}\n{seconds:.0f} s in all, {cpu_seconds:.0f} s of processor time."


def _points(interval: Interval) -> str:
    estimate, low, high = (f"{100 * value:+.0f}" for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]"


def _held(answers: Sequence[Answer]) -> int:
    return sum(answer.holds for answer in answers)


def _on_topic(answers: Sequence[Answer]) -> int:
    return sum(answer.on_topic for answer in answers)


def _repeated(answers: Sequence[Answer]) -> float:
    return sum(answer.repeated for answer in answers) / len(answers)


# ---- for programs ------------------------------------------------------------------------------------------


def _document(lm: LM, results: Sequence[Result], learned: int, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    import torch

    return {
        "model": lm.name,
        "tuned": lm.name == TUNED_FOR,
        "dtype": _dtype(lm),
        "device": lm.model.device.type,
        "threads": torch.get_num_threads(),
        "learned_from": learned,
        "max_new_tokens": MAX_NEW_TOKENS,
        "instructions": [_record(result) for result in results],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def _record(result: Result) -> dict[str, Any]:
    return {
        "name": result.setting.name,
        "shown": result.setting.shown,
        "layer": result.layer,
        "strength": result.setting.strength,
        "dose": result.dose,
        "unsteered": _side(result.before),
        "steered": _side(result.after),
        "difference": asdict(result.difference),
        "seconds": round(result.seconds, 1),
        "answers": [
            {"prompt": prompt, "unsteered": asdict(before), "steered": asdict(after)}
            for prompt, before, after in zip(result.prompts, result.before, result.after, strict=True)
        ],
    }


def _side(answers: Sequence[Answer]) -> dict[str, Any]:
    from trimtab.evaluate import paired_bootstrap

    return {
        "holds": _held(answers),
        "has_form": sum(answer.has_form for answer in answers),
        "on_topic": _on_topic(answers),
        "of": len(answers),
        "share": asdict(paired_bootstrap([answer.holds for answer in answers])),
        "repeated": _repeated(answers),
    }
