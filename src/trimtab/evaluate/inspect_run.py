"""Run one Inspect task in one arm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.evaluate.divergence import measure_divergences

if TYPE_CHECKING:
    from inspect_ai.log import EvalSample

    from trimtab.evaluate.inspect_provider import SteeredModel


def run_task(
    task: Any,
    model: str,
    steer: str | None = None,
    *,
    limit: int | None = None,
    task_args: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    log_dir: str | Path = "logs",
    transfer: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run a task through `inspect_ai.eval`, on a trimtab model.

    Args:
        task: Anything that `inspect_ai.eval` takes: a file, a registered name, or a `Task`.
        model: A Hub id, a folder or a file; `default` for the default model.
        steer: `FILE[@LAYERS][:STRENGTH]`; `None` for the unsteered model.
        limit: The maximum number of samples.
        task_args: Arguments of the task.
        max_tokens: The maximum number of tokens of an answer, overriding the task's; `None` leaves it to the task.
        batch_size: The maximum number of samples that are answered together.
        log_dir: The folder for Inspect's log.
        transfer: Allow a steering learned on another model of the same width.
        options: `engine`, `dtype`, `device`, `revision`, `layers`, as `LM.load` takes them.

    Returns:
        `metrics` by scorer and name, `samples` (their number), `log` (its file), and `answers` and `scores` by sample
        id. Under a steering also `nats`, if they can be measured: the `mean` and `p95` of the divergence from the
        unsteered model, on prompts of the task.

    Raises:
        TrimtabError: Inspect isn't installed, there is no such task, or a sample failed; the message says why.
    """
    if isinstance(task, str) and (file := task.partition("@")[0]).endswith(".py") and not Path(file).is_file():
        raise TrimtabError(f"there is no file {file}; name a task's file, or an installed task")
    if isinstance(task, str) and task.endswith(".py") and Path(task).is_absolute():
        task = os.path.relpath(task)  # Inspect takes a file for a pattern, which has to be relative
    from trimtab.evaluate import inspect_registry  # noqa: F401 (it registers the provider, and says what to install)
    from trimtab.evaluate.inspect_provider import SteeredModel

    kwargs = {"steer": steer, "transfer": transfer, "batch_size": batch_size, **options}
    # loaded here, so that an error in a steering or model is raised as it is, not written into a log
    steered = SteeredModel(model, **kwargs)
    from inspect_ai import eval as run
    from inspect_ai.model import get_model

    made = get_model(f"trimtab/{model}", memoize=False, **kwargs)
    try:
        (log,) = run(
            task,
            made,
            task_args=dict(task_args or {}),
            limit=limit,
            log_dir=str(log_dir),
            display="none",
            max_connections=batch_size,
            max_tokens=max_tokens,
        )
    except (FileNotFoundError, LookupError) as error:
        raise TrimtabError(f"Inspect can't run {task!r}: {error}") from None
    if log.status != "success" or log.results is None:
        why = log.error.message if log.error else f"its status is {log.status}"
        raise TrimtabError(f"Inspect's task {log.eval.task} failed: {why}; its log is {log.location}")
    metrics = {
        (name if score.name == "" else f"{score.name}/{name}"): float(metric.value)
        for score in log.results.scores
        for name, metric in score.metrics.items()
    }
    samples = log.samples or []
    nats = _nats(steered, samples)
    return {
        **({} if nats is None else {"nats": nats}),
        "metrics": metrics,
        "samples": len(samples),
        "log": str(log.location),
        "answers": {str(sample.id): sample.output.completion for sample in samples},
        "scores": {
            str(sample.id): {name: score.value for name, score in (sample.scores or {}).items()} for sample in samples
        },
    }


def _nats(steered: SteeredModel, samples: Sequence[EvalSample]) -> dict[str, float] | None:
    """The divergence of a model from the unsteered one on the first messages of some samples.

    `None` for the unsteered model, and if nothing can be measured on these prompts.
    """
    prompts = [prompt for sample in samples if (prompt := _prompt(sample))]
    if steered.steering is None:
        return None
    measured = measure_divergences(steered.lm, {"steered": steered.steering}, prompts, transfer=steered.transfer)
    return measured.get("steered")


def _prompt(sample: EvalSample) -> list[dict[str, str]]:
    """A sample's messages up to the first answer; empty if they aren't text only."""
    prompt = []
    for message in sample.messages:
        if message.role == "assistant":
            break
        if not isinstance(message.content, str):
            return []
        prompt.append({"role": message.role, "content": message.content})
    return prompt
