"""What `trimtab tune` prints of its search: the table, the verdict, and both as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from trimtab.commands.terminal import note, show
from trimtab.commands.tune_task import Task

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.tune import Tuned
    from trimtab.tune.tune import Tried

SHOWN = 12
"""So many candidates have a line in the table."""


def print_search(lm: LM, task: Task, found: Tuned, named: str, out: Path, figure: Path | None) -> None:
    """Say what was searched, the table, and what came of it."""
    head = (
        f"{task.what} on {lm.name}: learned from {len(task.pairs)} pairs, searched on {len(found.split.search)}"
        f" prompts, confirmed on {len(found.split.held_out)} others"
    )
    show(head, _table(found), *_beyond(found))
    if found.interrupted:
        show("interrupted: this is the best so far")
    elif found.exhausted:
        show("the budget is spent: this is the best so far")
    if found.held_out is not None:
        difference = found.held_out.difference
        show(
            f"held out: {found.held_out.steered:.2f} steered, {found.held_out.unsteered:.2f} unsteered, difference"
            f" {difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
        )
    show(verdict(found))
    if found.setting is None:
        show("nothing is written")
    else:
        show(f"saved {out}")
        note(f'try: trimtab generate {named}--steer {out} --prompt "…" --compare', quiet=False)
    if figure is not None:
        show(f"figure {figure}")


def verdict(found: Tuned) -> str:
    """Whether to steer, how, and why."""
    return f"don't steer: {found.reason}" if found.setting is None else f"steer: {found.setting}: {found.reason}"


def _table(found: Tuned) -> Table:
    """The candidates that came furthest, the best first, below not steering."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # as narrow as it gets: 80 columns hold it
    for name in ("", "block", "strength", "n", "score", "gain", "dose", "ppl", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.header_style = "dim"
    base, rest = found.table[:1], list(found.table[1:])
    rest.sort(key=lambda row: (-row.items, bool(row.broken), -row.score, row.dose))
    for row in [*base, *rest[:SHOWN]]:
        table.add_row(*_cells(row, found), style="bold" if _is_chosen(row, found) else None)
    return table


def _cells(row: Tried, found: Tuned) -> list[str]:
    one = row.setting
    perplexity = "" if row.perplexity is None else f"{row.perplexity:.3g}"
    if one is None:
        return ["don't steer", "", "", str(row.items), f"{row.score:.2f}", "", "", perplexity, ""]
    return [
        f"{one.operation} {one.positions}",
        str(one.layer),
        f"{one.strength:g}",
        str(row.items),
        f"{row.score:.2f}",
        f"{row.score - row.unsteered:+.2f}",
        f"{row.dose:.2f}",
        perplexity,
        "chosen" if _is_chosen(row, found) else "✗ guard" if row.broken else "",
    ]


def _beyond(found: Tuned) -> list[str]:
    """What the table leaves out: how many rows, and which of the guard's limits were broken."""
    hidden = len(found.table) - 1 - SHOWN
    limits = Counter(reason.split(":")[0] for row in found.table for reason in row.broken)
    broken = sum(bool(row.broken) for row in found.table)
    lines = [f"… and {hidden} more, eliminated on fewer prompts or worse"] if hidden > 0 else []
    if broken:
        named = ", ".join(f"{limit} ({count})" for limit, count in limits.most_common())
        lines.append(f"the guard forbade {broken} of {len(found.table) - 1}: {named}")
    return lines


def _is_chosen(row: Tried, found: Tuned) -> bool:
    return row.setting is not None and row.setting == found.setting


def document(lm: LM, task: Task, found: Tuned, out: Path, digest: str | None, figure: Path | None) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "model": lm.name,
        "task": task.what,
        "pairs": len(task.pairs),
        "steer": found.setting is not None,
        "setting": None if found.setting is None else asdict(found.setting),
        "reason": found.reason,
        "file": None if digest is None else str(out),
        "digest": digest,
        "figure": None if figure is None else str(figure),
        "held_out": None if found.held_out is None else asdict(found.held_out),
        "interrupted": found.interrupted,
        "exhausted": found.exhausted,
        "searched_on": len(found.split.search),
        "confirmed_on": len(found.split.held_out),
        "answers": found.answers,
        "tokens": found.tokens,
        "table": [asdict(row) for row in found.table],
    }
