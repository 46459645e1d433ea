"""`trimtab eval capability`: what does a steering cost? MMLU, TruthfulQA and GSM8K."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.commands.arms import ArmOptions
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import (
    LimitOption,
    Run,
    RunOptions,
    check_targets,
    document_of,
    find_data,
    scores_table,
    shorten,
)
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, show, write_json
from trimtab.errors import TrimtabError

FILES = {"mmlu": "mmlu/mmlu.json", "truthfulqa": "truthfulqa/truthful_qa_ab.json", "gsm8k": "gsm8k/test.jsonl"}
COLUMNS = {"matching": "p(correct)", "mass": "mass", "chosen": "correct"}
MATH = {"correct": "correct", "marked": "after ####"}


@evaluations.command()
@grouped
def capability(
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="A folder with mmlu/, truthfulqa/ and gsm8k/, or a file: .json of two options, .jsonl of sums."
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Which of the folder's tasks: mmlu, truthfulqa (both without generating), gsm8k. Default: the "
            "first two."
        ),
    ] = None,
    arms: ArmOptions,
    limit: LimitOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="For gsm8k: maximum tokens per answer, in every arm.")
    ] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch, over all arms.")] = 32,
    options: RunOptions,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Capability: how much knowledge does the model lose?

    [bold]  trimtab eval capability --data data/ --steer s.safetensors --strength -1,1
      trimtab eval capability --data data/ --task gsm8k --limit 100 --out sums.jsonl[/bold]

    MMLU and TruthfulQA come with two options and are scored by the correct letter's
    share of both letters' probability, without generating; "macro" is the mean of the
    categories' means. GSM8K is generated, greedily: the number after the last ####, or
    else the last number of the answer, must be the right one.

    With --out and several tasks, the task's name is put into each file's name.
    """
    plan, out = arms.plan(), options.out
    check_targets(out, None)
    tasks = _tasks(data, task)

    from trimtab.evaluate.ab import SCORES, category_of, read_ab
    from trimtab.evaluate.capability import MATH_SCORES, macro_average, math_requests, math_scorer, read_gsm8k

    math_items = {name: read_gsm8k(path, limit) for name, path in tasks.items() if path.suffix == ".jsonl"}
    letters = {name: read_ab(path, limit=limit)[0] for name, path in tasks.items() if name not in math_items}
    questions = [item.question for of in letters.values() for item in of]
    questions += [item.question for of in math_items.values() for item in of]
    run = Run.start(plan, loader, options, questions[:64], batch_size=batch_size, quiet=json)
    documents: dict[str, dict[str, Any]] = {}
    for name, path in tasks.items():
        target = None if out is None else out if len(tasks) == 1 else out.with_stem(f"{out.stem}-{name}")
        task_run, about = run.with_output(target), {"evaluation": "capability", "task": name}
        if name in math_items:
            requests, scorer = (
                math_requests(math_items[name], run.steerings, run.systems),
                math_scorer(math_items[name]),
            )
            records = task_run.answer_requests(requests, scorer, about, max_new_tokens=max_new_tokens, label=name)
            result = {"items": len(math_items[name]), **document_of(records, run.arms, MATH_SCORES, None)}
        else:
            records = task_run.score_letters(letters[name], about, label=name)
            result = {"items": len(letters[name]), **document_of(records, run.arms, SCORES, category_of)}
            result["macro"] = macro_average(records, "matching")
        documents[name] = {"data": str(path), **result, **({"records": str(target)} if target else {})}
    if json:
        write_json({"evaluation": "capability", "model": run.lm.name, "tasks": documents})
        return
    show(f"Capability of {run.lm.name}", "")
    for name, document in documents.items():
        show(f"{name}, {document['items']} items", scores_table(document, MATH if name in math_items else COLUMNS))
        if "macro" in document:
            show("macro p(correct): " + ", ".join(f"{shorten(arm)} {x:.3f}" for arm, x in document["macro"].items()))
        show("")
        if "records" in document:
            note(f"wrote {document['records']}", quiet=False)


def _tasks(data: Path, wanted: list[str] | None) -> dict[str, Path]:
    """The files by task. Raises `TrimtabError` for an unknown task, or one whose file is missing."""
    if data.is_file():
        if wanted:
            raise TrimtabError(f"--task chooses among a folder's tasks, and {data} is one file; leave it out")
        return {data.stem: data}
    names = wanted or ["mmlu", "truthfulqa"]
    if unknown := [name for name in names if name not in FILES]:
        raise TrimtabError(f"there is no task {unknown[0]!r}; tasks: {', '.join(FILES)}")
    return {name: find_data(data, [FILES[name]], name)[0] for name in dict.fromkeys(names)}
