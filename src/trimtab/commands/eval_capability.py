"""`trimtab eval capability`: what does a steering cost? MMLU, TruthfulQA and GSM8K."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.commands.arms import LayersOption, Plan, RandomOption, SteerOption, StrengthOption, SystemOption
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import (
    LimitOption,
    OutOption,
    TransferOption,
    check_targets,
    document_of,
    find_data,
    resumable,
    scores_table,
    shorten,
)
from trimtab.commands.model import JsonOption, ModelOptions
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, progress_bar, show, write_json
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
            help="A folder with mmlu/, truthfulqa/ and gsm8k/, or a file: .json of two options, .jsonl of sums.",
            show_default=False,
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Which of the folder's: mmlu, truthfulqa (both without generating), gsm8k. Without it: the first two.",
            show_default=False,
        ),
    ] = None,
    steer: SteerOption = None,
    strength: StrengthOption = None,
    layers: LayersOption = None,
    random: RandomOption = 0,
    system_prompt: SystemOption = None,
    limit: LimitOption = None,
    transfer: TransferOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For gsm8k: tokens at most, in every arm.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time, of all arms together.")] = 32,
    out: OutOption = None,
    loader: ModelOptions,
    json: JsonOption = False,
) -> None:
    """Capability: what is lost of what the model knew?

    [bold]  trimtab eval capability --data data/ --steer s.safetensors --strength -1,1
      trimtab eval capability --data data/ --task gsm8k --limit 100 --out sums.jsonl[/bold]

    MMLU and TruthfulQA come with two options and are scored by the correct letter's
    share of both letters' probability, without generating; "macro" is the mean of the
    categories' means. GSM8K is generated, greedily: the number after the last ####, or
    else the last number of the answer, must be the right one.

    With --out and several tasks, the task's name is put into each file's name.
    """
    plan = Plan.of(steer, strength, layers, random, system_prompt)
    check_targets(out, None)
    tasks = _tasks(data, task)

    from trimtab.evaluate.ab import SCORES, category_of, read_ab, score_ab
    from trimtab.evaluate.ab import requests_of as letters_of
    from trimtab.evaluate.answers import answer
    from trimtab.evaluate.capability import MATH_SCORES, macro, math_requests, math_scorer, read_gsm8k

    sums = {name: read_gsm8k(path, limit) for name, path in tasks.items() if path.suffix == ".jsonl"}
    options = {name: read_ab(path, limit=limit)[0] for name, path in tasks.items() if name not in sums}
    arms = plan.arms()
    lm = loader.load(quiet=json)
    questions = [item.question for of in options.values() for item in of]
    questions += [item.question for of in sums.values() for item in of]
    arms |= plan.controls(lm, arms, questions[:64], transfer=transfer)
    steerings = {name: arm.steering for name, arm in arms.items()}
    systems = {name: arm.system for name, arm in arms.items() if arm.system is not None}
    documents: dict[str, dict[str, Any]] = {}
    for name, path in tasks.items():
        target = None if out is None else out if len(tasks) == 1 else out.with_stem(f"{out.stem}-{name}")
        common: dict[str, Any] = {"out": target, "batch_size": batch_size, "transfer": transfer}
        common["about"] = {"evaluation": "capability", "task": name}
        with resumable(target, quiet=json), progress_bar(name, quiet=json) as progress:
            if name in sums:
                requests = math_requests(sums[name], steerings, systems)
                scorer = math_scorer(sums[name])
                common |= {"score": scorer, "max_new_tokens": max_new_tokens}
                records = answer(lm, requests, progress=progress, **common)
                found = {"items": len(sums[name]), **document_of(records, arms, MATH_SCORES, None)}
            else:
                requests = letters_of(lm, options[name], steerings, systems)
                records = score_ab(lm, requests, options[name], progress=progress, **common)
                found = {"items": len(options[name]), **document_of(records, arms, SCORES, category_of)}
                found["macro"] = macro(records, "matching")
        documents[name] = {"data": str(path), **found, **({"records": str(target)} if target else {})}
    if json:
        write_json({"evaluation": "capability", "model": lm.name, "tasks": documents})
        return
    show(f"Capability of {lm.name}", "")
    for name, document in documents.items():
        show(f"{name}, {document['items']} items", scores_table(document, MATH if name in sums else COLUMNS))
        if "macro" in document:
            show("macro p(correct): " + ", ".join(f"{shorten(arm)} {x:.3f}" for arm, x in document["macro"].items()))
        show("")
        if "records" in document:
            note(f"wrote {document['records']}", quiet=False)


def _tasks(data: Path, wanted: list[str] | None) -> dict[str, Path]:
    """The files by task. Raises `TrimtabError` for an unknown task, or one whose file isn't there."""
    if data.is_file():
        if wanted:
            raise TrimtabError(f"--task chooses among a folder's tasks, and {data} is one file; leave it out")
        return {data.stem: data}
    names = wanted or ["mmlu", "truthfulqa"]
    if unknown := [name for name in names if name not in FILES]:
        raise TrimtabError(f"there is no task {unknown[0]!r}; tasks: {', '.join(FILES)}")
    return {name: find_data(data, [FILES[name]], name)[0] for name in dict.fromkeys(names)}
