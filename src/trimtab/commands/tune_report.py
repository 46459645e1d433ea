"""The output of `trimtab tune`: the table, the verdict, and both as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.table import Table

from trimtab.commands.terminal import note, show
from trimtab.commands.tune_task import Task

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.tune import Tuned
    from trimtab.tune.tune import CandidateResult

SHOWN = 12
"""The maximum number of candidates in the table."""


def print_search(lm: LM, task: Task, result: Tuned, model_argument: str, out: Path, figure: Path | None) -> None:
    """Print what was searched, the table, and the result."""
    head = (
        f"{task.title} on {lm.name}: learned from {len(task.pairs)} pairs, searched on {len(result.split.search)}"
        f" prompts, confirmed on {len(result.split.held_out)} others"
    )
    show(head, _table(result), *_omitted_lines(result))
    if result.interrupted:
        show("interrupted: this is the best so far")
    elif result.exhausted:
        show("the budget is spent: this is the best so far")
    if result.held_out is not None:
        difference = result.held_out.difference
        show(
            f"held out: {result.held_out.steered:.2f} steered, {result.held_out.unsteered:.2f} unsteered, difference"
            f" {difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
        )
    show(verdict(result))
    if result.setting is None:
        show("nothing is written")
    else:
        show(f"saved {out}")
        note(f'try: trimtab generate {model_argument}--steer {quote(str(out))} --prompt "…" --compare', quiet=False)
    if figure is not None:
        show(f"figure {figure}")


def verdict(result: Tuned) -> str:
    """Whether to steer, how, and why; "not confirmed" for a setting that wasn't tested any more."""
    if result.setting is None:
        return f"don't steer: {result.reason}"
    return f"{'steer' if result.confirmed else 'not confirmed'}: {result.setting}: {result.reason}"


def _table(result: Tuned) -> Table:
    """The candidates that survived longest, best first, below the row for not steering."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # compact, to fit into 80 columns
    for name in ("", "block", "strength", "n", "score", "gain", "dose", "ppl", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.header_style = "dim"
    base, rest = result.table[:1], list(result.table[1:])
    rest.sort(key=lambda row: (-row.items, bool(row.broken), -row.score, row.dose))
    for row in [*base, *rest[:SHOWN]]:
        table.add_row(*_cells(row, result), style="bold" if _is_chosen(row, result) else None)
    return table


def _cells(row: CandidateResult, result: Tuned) -> list[str]:
    setting = row.setting
    perplexity = "" if row.perplexity is None else f"{row.perplexity:.3g}"
    if setting is None:
        return ["don't steer", "", "", str(row.items), f"{row.score:.2f}", "", "", perplexity, ""]
    return [
        f"{setting.operation} {setting.positions}",
        str(setting.layer),
        f"{setting.strength:g}",
        str(row.items),
        f"{row.score:.2f}",
        f"{row.score - row.unsteered:+.2f}",
        f"{row.dose:.2f}",
        perplexity,
        "chosen" if _is_chosen(row, result) else "✗ guard" if row.broken else "",
    ]


def _omitted_lines(result: Tuned) -> list[str]:
    """What the table leaves out: the number of other rows, and which limits of the guard were broken."""
    hidden = len(result.table) - 1 - SHOWN
    limits = Counter(reason.split(":")[0] for row in result.table for reason in row.broken)
    broken = sum(bool(row.broken) for row in result.table)
    lines = [f"… and {hidden} more, eliminated on fewer prompts or worse"] if hidden > 0 else []
    if broken:
        named = ", ".join(f"{limit} ({count})" for limit, count in limits.most_common())
        lines.append(f"the guard forbade {broken} of {len(result.table) - 1}: {named}")
    return lines


def _is_chosen(row: CandidateResult, result: Tuned) -> bool:
    return row.setting is not None and row.setting == result.setting


def document(lm: LM, task: Task, result: Tuned, out: Path, digest: str | None, figure: Path | None) -> dict[str, Any]:
    """The result as a JSON document."""
    return {
        "model": lm.name,
        "task": task.title,
        "pairs": len(task.pairs),
        "steer": result.confirmed,
        "setting": None if result.setting is None else asdict(result.setting),
        "reason": result.reason,
        "file": None if digest is None else str(out),
        "digest": digest,
        "figure": None if figure is None else str(figure),
        "held_out": None if result.held_out is None else asdict(result.held_out),
        "interrupted": result.interrupted,
        "exhausted": result.exhausted,
        "searched_on": len(result.split.search),
        "confirmed_on": len(result.split.held_out),
        "answers": result.answers,
        "tokens": result.tokens,
        "table": [asdict(row) for row in result.table],
    }
