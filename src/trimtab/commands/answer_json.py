"""The JSON document of `trimtab generate --json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.files.pick import Pick

if TYPE_CHECKING:
    from trimtab.decoding.trace import Trace
    from trimtab.engines.transformers.generate import Generation
    from trimtab.text.chat import Prompt


def answers_document(
    model: str,
    picks: Sequence[Pick],
    prompts: Sequence[Prompt],
    answers: Sequence[Generation],
    unsteered: Sequence[Generation] | None,
) -> dict[str, Any]:
    """The document that `--json` prints: the model, the steerings, and one row per prompt."""
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        rows.append(
            {
                "prompt" if isinstance(prompt, str) else "messages": prompt,
                **_answer(answer),
                "edits": list(answer.applied.edits),
                "dose": answer.applied.dose,
                "overall_dose": answer.applied.overall,
                **({} if unsteered is None else {"unsteered": _answer(unsteered[i])}),
            }
        )
    return {"model": model, "steerings": [pick.to_json() for pick in picks], "answers": rows}


def _answer(answer: Generation) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        **({} if answer.trace is None else {"trace": _trace(answer.trace)}),
    }


def _trace(trace: Trace) -> dict[str, Any]:
    return {
        "schedule": trace.schedule,
        "candidates": list(trace.candidates),
        "ranking": list(trace.order),
        "passes": trace.passes,
        "steps": [{"open": step.open, "candidate": step.candidate, "replaced": step.replaced} for step in trace.steps],
    }
