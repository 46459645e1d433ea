"""`trimtab demo`: how often instructions are followed, with and without them in the prompt, measured live."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimtab.commands.model import JsonOption, ModelOption, TemplateOption, load_model
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
LIVE = "title"
"""The instruction that is learned during the demo; the others are included, or three minutes wouldn't be enough."""
LEARN_QUERIES = 32
"""The instruction that is learned live uses fewer queries than `trimtab learn distill` would."""
REGIMES = ("without", "with")


@dataclass(frozen=True)
class Setting:
    """An instruction, and the steering to fall back on: the mean difference at a block of the default model."""

    name: str
    shown: str
    layer: int
    strength: float

    def layer_of(self, blocks: int) -> int:
        """The block at the same relative depth in a model of `blocks` blocks."""
        return min(round(self.layer / TUNED_BLOCKS * blocks), blocks - 1)


SETTINGS = (
    Setting("title", "a title in <<double angular brackets>>", 24, 0.45),
    Setting("json", "answer in JSON", 18, 0.6),
    Setting("bullets", "a list of bullet points", 9, 1.2),
    Setting("sentence", "one sentence", 18, 0.6),
)
"""The blocks and strengths were chosen on the package's `tune` queries (`benchmarks demo-settings`)."""

LIMITS = """\
Only the form is steered: the content of the answers stays as good or bad as the model, and "on topic" counts the
answers that repeat a word of their prompt. benchmarks/RESULTS.md has the measurements, and where they fall short."""
UNTUNED = "On another model, better settings may exist: trimtab learn distill --help has them."


@dataclass(frozen=True)
class Answer:
    """One answer, and what code can measure about it. It holds if it has the form and isn't repetitive."""

    text: str
    has_form: bool
    repeated: float
    on_topic: bool
    holds: bool


@dataclass(frozen=True)
class Regime:
    """Prompts without or with the instruction in them, and the answers, unsteered and steered."""

    prompts: tuple[str, ...]
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    difference: Interval


@dataclass(frozen=True)
class Result:
    """The results of one instruction on held-out queries; `learned` says where its steering comes from."""

    setting: Setting
    learned: str
    edits: int
    dose: float
    without: Regime
    prompted: Regime
    seconds: float


NOW, BEFORE, FALLBACK = "learned now", "learned before", "mean difference"


def demo(
    model: ModelOption = None,
    learn: Annotated[bool, typer.Option("--learn", help="Learn all four now, which takes many minutes.")] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Learn from and test on at most this many queries. Below 24 the counts are unreliable."
        ),
    ] = None,
    template: TemplateOption = None,
    json: JsonOption = False,
) -> None:
    """See steering work, in a few minutes on two CPU cores.

    A small model often ignores the form that the prompt asks for. This demo steers it towards that form: a title,
    JSON, bullet points, one sentence. It answers questions that weren't used for learning, unsteered and steered,
    first without the instruction in the prompt, then with it. Code checks the forms, and the counts have
    confidence intervals.

    One steering is learned while you watch, from the model's own answers. The others were learned earlier in the
    same way, and --learn learns them again. For another model, all are learned.

    [bold]  trimtab demo
      trimtab demo --learn
      trimtab demo --model Qwen/Qwen2.5-0.5B-Instruct
      trimtab demo --json > demo.json[/bold]
    """
    from trimtab.data import instructions, queries

    started, worked = time.perf_counter(), time.process_time()
    dtype = "float32" if model is None else "auto"
    lm = load_model(model, device=None, dtype=dtype, revision=None, layers_path=None, template=template, quiet=json)
    base, test = queries("learn", more=True)[:limit], queries("test")[:limit]
    shipped = () if learn or lm.name != TUNED_FOR else tuple(each.name for each in SETTINGS if each.name != LIVE)
    if not json:
        show(_opening(lm, len(test), shipped))
    results: list[Result] = []
    with progress_bar("the unsteered answers", quiet=json) as progress:
        baseline_answers = _answers(lm, tuple(test), None, _part(progress, 0.0, 1.0))
    for setting in SETTINGS:
        with progress_bar(setting.shown, quiet=json) as progress:
            before = setting.name in shipped
            results.append(
                try_setting(
                    lm, setting, base, test, shipped=before, baseline_answers=baseline_answers, progress=progress
                )
            )
        if not json:
            show(_result_view(results[-1], instructions()[setting.name].test[0]))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    if json:
        write_json(_document(lm, results, len(base), seconds, cpu_seconds))
    else:
        show(_summary(results), _closing(lm, seconds, cpu_seconds))


def try_setting(
    lm: LM,
    setting: Setting,
    learn: Sequence[str],
    test: Sequence[str],
    *,
    shipped: bool = False,
    baseline_answers: Sequence[Generation] | None = None,
    progress: Callable[..., None] | None = None,
) -> Result:
    """Learn one instruction from the queries `learn`, or load it, and answer the queries `test` in both regimes.

    `baseline_answers` are the unsteered answers to the test queries without an instruction, which are the same for all
    instructions. `progress(done, total)` counts in hundredths of the work.
    """
    from trimtab.data import instructions, prompts

    started = time.perf_counter()
    instruction = instructions()[setting.name]
    share = 0.0 if shipped else 0.6
    steering, learned = _steering(lm, setting, learn, shipped, _part(progress, 0.0, share))
    regimes, doses = [], []
    for i, regime in enumerate(REGIMES):
        questions = tuple(test) if regime == "without" else tuple(prompts(test, instruction.test))
        begin, size = share + i * (1 - share) / 2, (1 - share) / 4
        known = baseline_answers if regime == "without" else None
        unsteered = _answers(lm, questions, None, _part(progress, begin, begin + size)) if known is None else known
        steered = _answers(lm, questions, steering, _part(progress, begin + size, begin + 2 * size))
        regimes.append(_regime(setting.name, questions, test, unsteered, steered))
        doses += [answer.applied.dose for answer in steered]
    return Result(
        setting=setting,
        learned=learned,
        edits=len(steering.edits),
        dose=sum(doses) / len(doses),
        without=regimes[0],
        prompted=regimes[1],
        seconds=time.perf_counter() - started,
    )


def _steering(
    lm: LM,
    setting: Setting,
    learn: Sequence[str],
    shipped: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Steering, str]:
    """The steering and where it comes from; the mean difference if there are too few answers to learn from."""
    from trimtab.data import instruction_pairs, instructions
    from trimtab.data.distilled import path_of
    from trimtab.evaluate import CONSTRAINTS
    from trimtab.files.load import load
    from trimtab.learn.own_answers import MAX_PER_QUERY, MIN_ANSWERS, TooFewAnswersError
    from trimtab.methods.distill import learn_distill
    from trimtab.methods.instruct import learn_instruct

    if shipped:
        return load(path_of(setting.name)), BEFORE
    instruction = instructions()[setting.name]

    def check(_query: str, answer: str, cut: bool) -> bool:
        return CONSTRAINTS[setting.name](answer, cut=cut)

    try:
        if MAX_PER_QUERY * len(learn) < MIN_ANSWERS:
            raise TooFewAnswersError("there are too few queries")
        steering = learn_distill(
            lm,
            instruction=instruction.learn,
            queries=learn[:LEARN_QUERIES],
            check=check,
            progress=progress,
        )
        return steering, NOW
    except TooFewAnswersError:
        pairs = instruction_pairs(learn, instruction.learn)
        layer = setting.layer_of(lm.layout.layers)
        return learn_instruct(lm, pairs, layers=[layer], operation="add") * setting.strength, FALLBACK


def _part(progress: Callable[..., None] | None, start: float, stop: float) -> Callable[[int, int], None] | None:
    """The progress of a part of the work, scaled to hundredths of all of it."""
    if progress is None:
        return None
    return lambda done, total: progress(round(100 * (start + (stop - start) * done / max(total, 1))), 100)


def _regime(
    name: str,
    questions: tuple[str, ...],
    queries: Sequence[str],
    unsteered: Sequence[Generation],
    steered: Sequence[Generation],
) -> Regime:
    from trimtab.evaluate import paired_bootstrap

    before = tuple(_judge_answer(name, query, answer) for query, answer in zip(queries, unsteered, strict=True))
    after = tuple(_judge_answer(name, query, answer) for query, answer in zip(queries, steered, strict=True))
    difference = paired_bootstrap([answer.holds for answer in before], [answer.holds for answer in after])
    return Regime(questions, before, after, difference)


def _answers(
    lm: LM, prompts: Sequence[str], steering: Steering | None, progress: Callable[[int, int], None] | None
) -> list[Generation]:
    return lm.generate(prompts, steering, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE, progress=progress)


def _judge_answer(name: str, query: str, answer: Generation) -> Answer:
    from trimtab.evaluate import CONSTRAINTS, on_topic, repeated_share
    from trimtab.text.repetition import REPEATED_LIMIT

    has_form = CONSTRAINTS[name](answer.text, cut=answer.finish_reason == "length")
    repeated = repeated_share(answer.text)
    holds = has_form and repeated <= REPEATED_LIMIT
    return Answer(answer.text, has_form, repeated, on_topic(query, answer.text), holds)


# ---- output ------------------------------------------------------------------------------------------------


def _opening(lm: LM, tested: int, shipped: Sequence[str]) -> str:
    lines = [
        f"{lm.name}, {_dtype(lm)} on {lm.model.device.type}, greedy, {MAX_NEW_TOKENS} tokens.",
        f"Each instruction is tried on {tested} queries that nothing was learned from: first without the instruction in"
        " the prompt,",
        "so that only the steering can bring it about, then with it.",
    ]
    if shipped:
        lines.append(
            f"The steering for the first one is learned now. Those for {', '.join(shipped)} come with the package,"
            " learned the same way from more answers; --learn learns them now."
        )
    if tested < 24:
        lines.append("So few queries prove nothing.")
    return "\n".join(lines)


def _dtype(lm: LM) -> str:
    return str(lm.model.dtype).removeprefix("torch.")


def _result_view(result: Result, phrasing: str) -> RenderableType:
    """One instruction: the counts, then one or two prompts with both answers side by side."""
    head = Text.assemble(
        ("\n" + result.setting.shown, "bold"),
        (f'  "{phrasing}"', "italic"),
        (f"  {result.learned}, {result.edits} blocks, dose {result.dose:.1%}, {result.seconds:.0f} s", "dim"),
    )
    rows = rows_to_show(result.without)
    return Group(
        head,
        _counts("without it in the prompt", result.without),
        _counts("with it in the prompt", result.prompted),
        *(_side_by_side(result.without, row) for row in rows),
    )


def _counts(where: str, regime: Regime) -> Text:
    count = len(regime.prompts)
    return Text.assemble(
        f"{where}: followed in ",
        (f"{_count_holding(regime.before)} of {count}", "bold red"),
        " unsteered, ",
        (f"{_count_holding(regime.after)} of {count}", "bold green"),
        f" steered ({_points(regime.difference)} points)",
    )


def rows_to_show(regime: Regime) -> list[int]:
    """The rows worth showing: the first that steering fixed, and the first that it broke or left wrong."""
    pairs = list(zip(regime.before, regime.after, strict=True))
    fixed_row = next((row for row, (before, after) in enumerate(pairs) if after.holds and not before.holds), None)
    failed_row = next((row for row, (_, after) in enumerate(pairs) if not after.holds), None)
    return [row for row in (fixed_row, failed_row) if row is not None] or [0]


def _side_by_side(regime: Regime, row: int) -> Table:
    before, after = regime.before[row], regime.after[row]
    table = Table(title=Text(regime.prompts[row], style="dim"), title_justify="left", expand=True, show_lines=False)
    for name, answer in (("unsteered", before), ("steered", after)):
        table.add_column(Text.assemble(f"{name}  ", _verdict(answer)), ratio=1, overflow="fold")
    table.add_row(Text(before.text.strip()), Text(after.text.strip()))
    return table


def _verdict(answer: Answer) -> Text:
    if answer.holds:
        return Text("✓ follows", style="green")
    return Text("✗ repeats itself" if answer.has_form else "✗ doesn't follow", style="red")


def _summary(results: Sequence[Result]) -> Table:
    table = Table(
        "instruction",
        "without it, unsteered",
        "steered",
        "on topic",
        "with it, unsteered",
        "steered",
        "on topic",
        box=None,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.title, table.title_justify, table.header_style = Text("\nAnswers that follow the instruction"), "left", "dim"
    for result in results:
        row = [result.setting.shown]
        for regime in (result.without, result.prompted):
            count = len(regime.prompts)
            row += [f"{_count_holding(regime.before)}/{count}", f"{_count_holding(regime.after)}/{count}"]
            row.append(f"{_on_topic(regime.before)} → {_on_topic(regime.after)}")
        table.add_row(*row)
    return table


def _closing(lm: LM, seconds: float, cpu_seconds: float) -> str:
    note = LIMITS if lm.name == TUNED_FOR else f"{LIMITS}\n{UNTUNED}"
    return f"\n{note}\n{seconds:.0f} s in all, {cpu_seconds:.0f} s of processor time."


def _points(interval: Interval) -> str:
    estimate, low, high = (f"{100 * value:+.0f}" for value in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]"


def _count_holding(answers: Sequence[Answer]) -> int:
    return sum(answer.holds for answer in answers)


def _on_topic(answers: Sequence[Answer]) -> int:
    return sum(answer.on_topic for answer in answers)


def _repeated(answers: Sequence[Answer]) -> float:
    return sum(answer.repeated for answer in answers) / len(answers)


# ---- JSON --------------------------------------------------------------------------------------------------


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
        "learned": result.learned,
        "edits": result.edits,
        "dose": result.dose,
        "without": _regime_record(result.without),
        "with": _regime_record(result.prompted),
        "seconds": round(result.seconds, 1),
    }


def _regime_record(regime: Regime) -> dict[str, Any]:
    return {
        "unsteered": _side(regime.before),
        "steered": _side(regime.after),
        "difference": asdict(regime.difference),
        "answers": [
            {"prompt": prompt, "unsteered": asdict(before), "steered": asdict(after)}
            for prompt, before, after in zip(regime.prompts, regime.before, regime.after, strict=True)
        ],
    }


def _side(answers: Sequence[Answer]) -> dict[str, Any]:
    from trimtab.evaluate import paired_bootstrap

    return {
        "holds": _count_holding(answers),
        "has_form": sum(answer.has_form for answer in answers),
        "on_topic": _on_topic(answers),
        "of": len(answers),
        "share": asdict(paired_bootstrap([answer.holds for answer in answers])),
        "repeated": _repeated(answers),
    }
