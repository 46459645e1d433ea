"""`trimtab eval judge`: open-ended answers, scored by another language model."""

from __future__ import annotations

import json as json_lines
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.arms import BASELINE, Arm, ArmOptions
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import (
    LimitOption,
    ReportOption,
    Run,
    RunOptions,
    check_targets,
    facts_of,
    find,
    finish,
    interval,
    resume_hint,
    shorten,
    table_of,
)
from trimtab.commands.eval_report import sweep_page
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.commands.prompts import ColumnOption, gather_prompts
from trimtab.commands.terminal import progress_bar
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.evaluate.judge import Judge, Rubric, Tally, Verdict
    from trimtab.evaluate.records import Record

PANEL = "Judge"
COLUMNS = {"judge": "score"}


@evaluations.command()
@grouped
def judge(
    *,
    prompts: Annotated[
        str,
        typer.Option(
            help="A file of prompts: one per line; or .jsonl, .json, .csv, .tsv or .parquet. -: standard input.",
            metavar="FILE",
        ),
    ],
    criterion: Annotated[
        str, typer.Option(help="The criterion for the judge, in a sentence.", metavar="TEXT", rich_help_panel=PANEL)
    ],
    scale: Annotated[
        str, typer.Option(help="The lowest and the highest score.", metavar="LOW,HIGH", rich_help_panel=PANEL)
    ] = "0,10",
    ends: Annotated[
        str, typer.Option(help="What the two ends of the scale mean.", metavar="LOW,HIGH", rich_help_panel=PANEL)
    ] = "not at all,entirely",
    local: Annotated[
        bool,
        typer.Option(
            "--local",
            help="Use the model itself, unsteered, as the judge: a weak judge, labelled as such.",
            rich_help_panel=PANEL,
        ),
    ] = False,
    column: ColumnOption = None,
    arms: ArmOptions,
    limit: LimitOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer, in every arm.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch, over all arms.")] = 64,
    options: RunOptions,
    report: ReportOption = None,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Open-ended answers, scored by another language model with a rubric.

    [bold]  export TRIMTAB_JUDGE_URL=http://localhost:8000/v1 TRIMTAB_JUDGE_MODEL=big
      trimtab eval judge --prompts asked.txt --criterion "How polite is the answer?" \\
        --steer polite.safetensors --strength -1,1 --out polite.jsonl
      trimtab eval judge --prompts asked.txt --criterion "…" --scale 1,5 --local[/bold]

    Each prompt is answered greedily in every arm. The judge is any server with OpenAI's
    chat completions API, given by TRIMTAB_JUDGE_URL, TRIMTAB_JUDGE_MODEL and, if it
    needs one, TRIMTAB_JUDGE_KEY. It sees the question and the answer, not the arm.
    Replies without a score on the scale, and failed requests, are reported next to the
    mean and excluded from it; differences are over the prompts with a score in both
    arms.

    With --out r.jsonl, answers are written there as they are generated, the judge's
    replies to the folder r-replies, and both together to r-judged.jsonl at the end. The
    same command resumes a run that was stopped, and retries failed requests.
    """
    plan, out = arms.plan(), options.out
    check_targets(out, report)
    rubric = _rubric(criterion, scale, ends)
    all_prompts = gather_prompts([], prompts, column)

    from trimtab.evaluate.ab import evenly_spaced
    from trimtab.evaluate.judge import Endpoint, LocalJudge, judge_records, tally
    from trimtab.evaluate.records import ArmPrompt, with_system

    endpoint = None if local else _endpoint(Endpoint)
    chosen = evenly_spaced(list(enumerate(all_prompts, 1)), limit)
    if plan.systems:
        _check_systems([prompt for _, prompt in chosen])
    run = Run.start(plan, loader, options, [prompt for _, prompt in chosen], batch_size=batch_size, quiet=json)
    requests = [
        ArmPrompt(name, str(number), with_system(prompt, arm.system), arm.steering)
        for number, prompt in chosen
        for name, arm in run.arms.items()
    ]
    records = run.answer_requests(
        requests,
        lambda _request, answer: {"empty": float(not answer.text.strip())},
        {"evaluation": "judge"},
        max_new_tokens=max_new_tokens,
    )
    selected_judge: Judge = LocalJudge(run.lm) if endpoint is None else endpoint
    cache = None if out is None else out.with_name(f"{out.stem}-replies")
    with resume_hint(out, quiet=json), progress_bar("judging", quiet=json) as progress:
        questions = {str(number): prompt for number, prompt in chosen}
        question_records = [_with_question(record, questions) for record in records]
        scored, verdicts = judge_records(selected_judge, rubric, question_records, cache=cache, progress=progress)
    tallies = {
        name: tally(selected_judge, [v for record, v in zip(scored, verdicts, strict=True) if record.arm == name])
        for name in run.arms
    }
    document: dict[str, Any] = {
        "evaluation": "judge",
        "model": run.lm.name,
        "data": prompts,
        "items": len(chosen),
        "max_new_tokens": max_new_tokens,
        "judge": {**selected_judge.identity, "weak": selected_judge.weak},
        "rubric": asdict(rubric),
        **_document(scored, run.arms, tallies),
    }
    if out is not None:
        judged = out.with_name(f"{out.stem}-judged.jsonl")
        _write(judged, scored, verdicts)
        document["judged"] = str(judged)
    if report is not None:
        label = " (weak judge)" if selected_judge.weak else ""
        title = f"{criterion.strip()} {run.lm.name}, {len(chosen)} prompts{label}"
        legend = {
            "score": f"the judge's score for “{criterion.strip()}”, from {rubric.low:g} ({rubric.lowest}) to"
            f" {rubric.high:g} ({rubric.highest})"
        }
        sweep_page(report, _drawable(document), scored, title, COLUMNS, legend, items="prompts")
        document["report"] = str(report)
    who = f"{run.lm.name} itself, a weak judge" if selected_judge.weak else f"{document['judge']['model']}"
    finish(
        document,
        f"{criterion.strip()} Answers of {run.lm.name} to {len(chosen)} prompts, judged by {who}",
        f"scores from {rubric.low:g} ({rubric.lowest}) to {rubric.high:g} ({rubric.highest})",
        "",
        _table(document),
        *(
            f"{shorten(arm)}: {facts['unreadable']} replies unreadable, {facts['failed']} requests failed"
            for arm, facts in document["arms"].items()
            if facts["unreadable"] or facts["failed"]
        ),
        out=out,
        json=json,
    )


def _rubric(criterion: str, scale: str, ends: str) -> Rubric:
    from trimtab.evaluate.judge import Rubric

    try:
        low, high = (float(part) for part in scale.split(","))
    except ValueError:
        raise TrimtabError(f"--scale {scale!r} isn't a pair of numbers; write 0,10") from None
    words = [word.strip() for word in ends.split(",")]
    if len(words) != 2 or not all(words):
        raise TrimtabError(f"--ends {ends!r} isn't a pair of words; write 'not at all,entirely'")
    return Rubric(criterion, low, high, *words)


def _endpoint(kind: Any) -> Judge:
    """The server that the environment names, checked before a model is loaded."""
    try:
        endpoint = kind.from_environment()
    except TrimtabError as error:
        raise TrimtabError(f"{error}; --local uses the model itself, a weak judge") from None
    endpoint.check()
    return endpoint


def _check_systems(prompts: Sequence[Any]) -> None:
    for prompt in prompts:
        if not isinstance(prompt, str) and prompt[0]["role"] == "system":
            raise TrimtabError("a prompt of the file has a system message already; leave out --system-prompt")


def _with_question(record: Record, questions: Mapping[str, Any]) -> Record:
    """The record with the original prompt, so that the judge doesn't see the arm's system message."""
    from dataclasses import replace

    return replace(record, prompt=questions[record.item])


def _document(records: Sequence[Record], arms: Mapping[str, Arm], tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """The document as in other evaluations, over scored items; differences are over items scored in both arms."""
    return {
        "baseline": BASELINE,
        "arms": {
            name: {**arm.about, **_facts([r for r in records if r.arm == name], tallies[name])}
            for name, arm in arms.items()
        },
        "scores": [line for name in arms if (line := _line(records, name, tallies[name])) is not None],
        "by_part": [],
    }


def _facts(records: Sequence[Record], tally: Tally) -> dict[str, Any]:
    return {
        **facts_of(records),
        "scored": tally.scored,
        "unreadable": tally.unreadable,
        "failed": tally.failed,
        "empty": sum(record.scores["empty"] for record in records),
    }


def _line(records: Sequence[Record], arm: str, tally: Tally) -> dict[str, Any] | None:
    """The arm's mean and its difference from the baseline, as from `summarize`; `None` if nothing has a score."""
    from math import isnan

    from trimtab.evaluate.summary import summarize

    if tally.mean is None:
        return None
    scored_records = {
        name: {r.item: r for r in records if r.arm == name and not isnan(r.scores["judge"])} for name in (BASELINE, arm)
    }
    both = scored_records[BASELINE].keys() & scored_records[arm].keys()
    difference, pairs = None, None
    if arm != BASELINE and both:
        shared_records = [r for of in scored_records.values() for item, r in of.items() if item in both]
        line = next(line for line in summarize(shared_records, ["judge"], baseline=BASELINE) if line.arm == arm)
        difference, pairs = line.to_json()["difference"], line.n
    return {
        "arm": arm,
        "score": "judge",
        "key": None,
        "n": tally.scored,
        "mean": asdict(tally.mean),
        "difference": difference,
        "pairs": pairs,
    }


def _drawable(document: dict[str, Any]) -> dict[str, Any]:
    """The document with only the arms that have a score; with none if the baseline has no score."""
    scored_arms = {line["arm"] for line in document["scores"]}
    arms = {name: facts for name, facts in document["arms"].items() if name in scored_arms and BASELINE in scored_arms}
    return {**document, "arms": arms}


def _write(path: Path, records: Sequence[Record], verdicts: Sequence[Verdict]) -> None:
    """Write one line per answer: the record with its score, and the judge's reply or the problem."""
    from trimtab.files.atomic_write import write_atomically

    lines = [
        {**json_lines.loads(record.to_json()), "reply": verdict.reply, "problem": verdict.problem}
        for record, verdict in zip(records, verdicts, strict=True)
    ]
    text = "".join(json_lines.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _table(document: Mapping[str, Any]) -> Table:
    table = table_of("arm", "score", f"minus {BASELINE}", "scored")
    for arm, facts in document["arms"].items():
        line = find(document, arm, "judge")
        change = None if line is None else line["difference"]
        table.add_row(
            shorten(arm),
            "none" if line is None else interval(line["mean"]),
            "" if change is None else interval(change["mean"], sign=True),
            f"{facts['scored']} of {facts['items']}",
        )
    return table
