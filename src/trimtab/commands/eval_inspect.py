"""`trimtab eval inspect`: an Inspect task, unsteered and steered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.commands.arms import ArmOptions
from trimtab.commands.eval import evaluations
from trimtab.commands.eval_common import table_of
from trimtab.commands.model import (
    EngineModelOptions,
    JsonOption,
    check_device,
    check_replicas,
    silence,
    suppress_progress_bars,
)
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, show, write_json
from trimtab.errors import TrimtabError


@evaluations.command()
@grouped
def inspect(
    *,
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="FILE.py, FILE.py@NAME, or an installed task (inspect_evals/…).")
    ],
    arms: ArmOptions,
    limit: Annotated[int | None, typer.Option(min=1, help="The maximum number of samples.")] = None,
    task_arg: Annotated[
        list[str] | None, typer.Option("-T", metavar="NAME=VALUE", help="An argument of the task. Repeatable.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per answer, whatever the task says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 32,
    log_dir: Annotated[Path, typer.Option(help="Where Inspect's logs go; `inspect view` shows them.")] = Path("logs"),
    transfer: Annotated[bool, typer.Option("--transfer", help="Allow another model of the same width.")] = False,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Run an Inspect (inspect_ai) task in every arm. Needs the extra inspect.

    [bold]  trimtab eval inspect task.py --steer shout.safetensors --strength 0.5,1 --limit 50
      trimtab eval inspect inspect_evals/ifeval --steer json.safetensors --engine vllm
      inspect eval task.py --model trimtab/default -M steer=shout.safetensors:2[/bold]

    The task runs unchanged, with its own scorers, once for the unsteered model and once
    for each arm; answers are greedy unless it sets a temperature. The model is loaded
    once. Each arm has an ordinary Inspect log. Tasks with tools are refused, since the
    models can't call tools here.

    The last example steers in Inspect's own program, which finds the provider
    trimtab/MODEL once trimtab is installed.
    """
    plan = arms.plan()
    if plan.random or plan.systems:
        raise TrimtabError("--random and --system-prompt don't apply to Inspect tasks; use --steer and --strength")
    steerings = {name: _steer_argument(arm.about) for name, arm in plan.arms().items()}
    arguments = _arguments(task_arg or [])
    check_replicas(loader.replicas, loader.engine)
    quiet = suppress_progress_bars(json)
    if loader.engine == "transformers":
        check_device(loader.device)
    silence(quiet)
    os.environ.setdefault("INSPECT_LOG_LEVEL", "warning")
    from trimtab.evaluate.inspect_run import run_task

    options: dict[str, Any] = {"engine": loader.engine, "dtype": loader.dtype, "device": loader.device}
    options |= {"revision": loader.revision, "layers": loader.layers_path, "replicas": loader.replicas}
    if loader.template:
        raise TrimtabError("--template isn't passed on to Inspect's models; leave it out")
    document: dict[str, Any] = {"evaluation": "inspect", "task": task, "model": loader.model or "default", "arms": {}}
    for name, steer in steerings.items():
        note(f"{name} …", quiet=json)
        document["arms"][name] = run_task(
            task,
            loader.model or "default",
            steer,
            limit=limit,
            task_args=arguments,
            max_tokens=max_tokens,
            batch_size=batch_size,
            log_dir=log_dir,
            transfer=transfer,
            **{key: value for key, value in options.items() if value is not None},
        )
    if json:
        write_json(document)
        return
    metrics = list(dict.fromkeys(metric for arm in document["arms"].values() for metric in arm["metrics"]))
    nats = any("nats" in arm for arm in document["arms"].values())
    table = table_of("arm", *metrics, *(["nats"] * nats), "samples")
    for name, arm in document["arms"].items():
        shown = (f"{arm['metrics'][metric]:.3f}" if metric in arm["metrics"] else "" for metric in metrics)
        divergence = [f"{arm['nats']['p95']:.2g}" if "nats" in arm else ""] * nats
        table.add_row(name, *shown, *divergence, str(arm["samples"]))
    show(f"{task} on {document['model']}", table)
    note(f"logs are in {log_dir}; inspect view --log-dir {log_dir} shows them", quiet=False)


def _steer_argument(about: Any) -> str | None:
    """The arm in the syntax of the provider's `steer` argument."""
    if about["kind"] == "baseline":
        return None
    from trimtab.files.pick import format_layers

    return f"{about['file']}@{format_layers(about['layers'])}:{about['strength']:g}"


def _arguments(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if odd := [text for text, (_, sign, _) in zip(texts, pairs, strict=True) if not sign]:
        raise TrimtabError(f"-T {odd[0]!r} isn't NAME=VALUE")
    return {name: value for name, _, value in pairs}
