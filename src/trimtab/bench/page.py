"""Writes a run as one self-contained HTML page: the verdict in words, which method wins where, and the costs."""

from __future__ import annotations

from html import escape
from pathlib import Path

from trimtab.bench.learning import CONTROL
from trimtab.bench.results import NO_BETTER, UNCONTROLLED, Cell, Results, Row, TaskResults
from trimtab.bench.tasks import PROMPT, TWICE
from trimtab.evaluate.decision import BETTER, WORSE
from trimtab.evaluate.intervals import Interval
from trimtab.files.atomic_write import write_atomically

MARKS = {BETTER: "▲", WORSE: "▼", NO_BETTER: "≈", UNCONTROLLED: "△"}
STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #dfe4e8; --paper: #fff; --well: #f4f6f8;
  --good: #0b6e4f; --bad: #a3341f; --goodback: #d9f0e6; --badback: #f8ded8; --flatback: #eceff2 }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --soft: #9aa6b1; --line: #35404a; --paper: #14191e;
  --well: #1c232a; --good: #6fd3ab; --bad: #f0917c; --goodback: #173d30; --badback: #4a231b; --flatback: #252d35 } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p, li { max-width: 62rem } .soft { color: var(--soft); font-size: .92rem }
.verdict { background: var(--well); border-left: 4px solid var(--good); padding: .7rem 1rem; margin: 1rem 0 }
.verdict li { margin: .2rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0 }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap }
th.t { vertical-align: bottom; max-width: 7.5rem; overflow-wrap: anywhere; font-weight: 500 }
td.good { background: var(--goodback); color: var(--good) } td.bad { background: var(--badback); color: var(--bad) }
td.flat { background: var(--flatback) } td.v { min-width: 12rem }
tr.control td { color: var(--soft) } tr.told td { font-weight: 600 }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem }
summary { cursor: pointer; font-weight: 600 }
"""


def write_page(path: Path, results: Results) -> None:
    """Write the page, atomically. It has no scripts and no external resources, and all text is escaped.

    Raises `TrimtabError` if it can't be written.
    """
    model = results.about["model"]
    title = f"{_short(model)}: methods at equal divergence"
    settings = results.about["settings"]
    nats = ", ".join(f"{level:g}" for level in sorted(settings["nats"]))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>{escape(_facts(results))}. Every method is scaled until the 95th percentile of its divergence"
        f" from the unsteered model is {escape(nats)} nat{'s' * (nats != '1')} on prompts of the task, and then"
        " compared.</p>",
        "<div class=verdict><ul>" + "".join(f"<li>{escape(line)}" for line in results.words()) + "</ul></div>",
        "<h2>Which is better where</h2>",
        "<p class=soft>The gain over the unsteered model, at each method's best divergence (in brackets, nats). ▲"
        " better than unsteered and than its controls, △ better than unsteered but there is no control, ▼ worse,"
        " ≈ no better than a control; without a mark it can't be told from luck. † the text is broken there."
        " · it can't act on the task: see below.</p>",
        _overview(results),
        "<h2>The methods over all tasks</h2>",
        _standings(results),
        "<h2>Task by task</h2>",
        *(_task(task) for task in results.tasks),
        *_left_out(results),
        "<h2>How to read this</h2>",
        "<p>A row's verdict is an exact paired test (signs flipped, one-sided) over the task's items, corrected for the"
        " number of divergences tried; a gain counts as better only if random directions at the same divergence,"
        " directions orthogonal to the method's own, or, for an emphasis, a random span of the prompt don't have it"
        " too. Intervals are 95 % paired bootstrap intervals."
        " A place of 1 means first at every task and divergence, 0 last. Side effects are measured where something is"
        " gained.</p>",
    ]
    head = "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    page = f"{head}<title>{escape(title)}</title><style>{STYLE}</style>\n<main>\n" + "\n".join(parts) + "\n</main>\n"
    write_atomically(path, page.encode("utf-8", "backslashreplace"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _facts(results: Results) -> str:
    about, settings = results.about, results.about["settings"]
    return (
        f"{_count(len(results.tasks), 'task')}, {_count(len(results.methods), 'method')}, up to"
        f" {settings['items']} items per task,"
        f" {about['model'].get('dtype', '')}, seed {settings['seed']}, trimtab {about['versions'].get('trimtab', '')}"
        f" (code {', '.join(about.get('code', ())) or 'unknown'})"
    )


def _overview(results: Results) -> str:
    heads = "".join(f"<th class=t>{escape(task.name).replace('_', '_<wbr>')}" for task in results.tasks)
    lines = [f"<tr><th>method{heads}"]
    base = "".join(f"<td class=n>{task.unsteered:.2f}" for task in results.tasks)
    lines.append(f"<tr class=control><td>unsteered score{base}")
    for arm in (PROMPT, TWICE):
        cells = "".join(
            f"<td class=n>{task.prompted[arm].difference.estimate:+.2f}" if arm in task.prompted else "<td class=n>·"
            for task in results.tasks
        )
        lines.append(f"<tr class=told><td>{arm}{cells}")
    for standing in results.methods:
        cells = "".join(_overview_cell(task, standing.method) for task in results.tasks)
        kind = " class=control" if standing.method == CONTROL else ""
        lines.append(f"<tr{kind}><td>{escape(standing.method)}{cells}")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _overview_cell(task: TaskResults, method: str) -> str:
    row = next((row for row in task.rows if row.method == method), None)
    if row is None:
        return f'<td class=n title="{escape(task.left_out.get(method, ""), quote=True)}">·'
    cell = row.cell
    kind = {BETTER: "good", WORSE: "bad", NO_BETTER: "flat"}.get(cell.verdict, "")
    nats = "" if cell.nats is None else f" <small>({cell.nats:g})</small>"
    mark = MARKS.get(cell.verdict, "") + ("†" if cell.broken else "")
    return f'<td class="n {kind}">{cell.decision.difference.estimate:+.2f}{mark}{nats}'


def _standings(results: Results) -> str:
    titles = results.about["titles"]
    lines = [
        "<tr><th>method<th>what it is<th class=n>tasks<th class=n>better<th class=n>no control"
        "<th class=n>worse<th class=n>text broken"
        "<th class=n>place<th class=n>share of the prompt's effect"
    ]
    for standing in results.methods:
        share = "" if standing.share is None else f"{standing.share:.0%}"
        kind = " class=control" if standing.method == CONTROL else ""
        lines.append(
            f"<tr{kind}><td>{escape(standing.method)}<td>{escape(titles.get(standing.method, ''))}<td"
            f" class=n>{standing.tasks}<td class=n>{standing.better}<td class=n>{standing.uncontrolled}<td"
            f" class=n>{standing.worse}<td"
            f" class=n>{standing.broken}<td class=n>{standing.place:.2f}<td class=n>{share}"
        )
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _task(task: TaskResults) -> str:
    sides = list(dict.fromkeys(side for row in task.rows for cell in row.cells for side in cell.sides))
    beside = list(dict.fromkeys(name for row in task.rows for cell in row.cells for name in cell.beside))
    heads = "".join(f"<th class=n>{escape(name)}" for name in (*beside, *sides))
    lines = [
        "<tr><th>method<th class=n>nats<th class=n>score<th class=n>gain<th class=n>won : lost<th class=n>p<th class=n>"
        f"p, random<th class=n>p, orthogonal<th class=n>p, random span{heads}<th>verdict"
    ]
    rest = "<td>" * (len(beside) + len(sides) + 7)
    lines.append(f"<tr class=control><td>unsteered<td><td class=n>{task.unsteered:.2f}{rest}")
    for arm, decision in task.prompted.items():
        lines.append(
            f"<tr class=told><td>{escape(arm)}<td><td class=n>{decision.after:.2f}<td"
            f" class=n>{_interval(decision.difference)}<td class=n>{decision.won} : {decision.lost}<td"
            f" class=n>{decision.p:.2g}<td><td><td>{'<td>' * len((*beside, *sides))}<td>{escape(decision.verdict)}"
        )
    for row in task.rows:
        lines += [_line(row, cell, n == row.best, beside, sides) for n, cell in enumerate(row.cells)]
    notes = [f"<li>{escape(row.method)}: {escape(note)}" for row in task.rows for note in row.notes]
    notes += [f"<li>{escape(name)} can't act here: {escape(why)}" for name, why in task.left_out.items()]
    return (
        f"<details><summary>{escape(task.name)} <span class=soft>({task.items} items)</span></summary>"
        f"<p class=soft>{escape(task.about)}; in {escape(task.unit)}.</p>"
        f"<div class=wide><table>{''.join(lines)}</table></div><ul class=soft>{''.join(notes)}</ul></details>"
    )


def _line(row: Row, cell: Cell, best: bool, beside: list[str], sides: list[str]) -> str:
    decision = cell.decision
    kind = " class=control" if row.method == CONTROL else ""
    name = f"<b>{escape(row.method)}</b>" if best else escape(row.method)
    more = "".join(_number(cell.beside.get(side), side) for side in beside)
    more += "".join(
        f"<td class=n>{_interval(cell.sides[side])}" if side in cell.sides else "<td class=n>" for side in sides
    )
    tone = {BETTER: "good", WORSE: "bad", NO_BETTER: "flat"}.get(cell.verdict, "")
    words = cell.verdict + (f"; {', '.join(cell.broken)}" if cell.broken else "")
    return (
        f"<tr{kind}><td>{name}<td class=n>{'' if cell.nats is None else f'{cell.nats:g}'}<td"
        f" class=n>{decision.after:.2f}<td class=n>{_interval(decision.difference)}<td class=n>{decision.won} :"
        f" {decision.lost}<td class=n>{decision.corrected_p:.2g}<td class=n>{_p(cell.random)}<td"
        f" class=n>{_p(cell.orthogonal)}<td class=n>{_p(cell.span)}{more}"
        f'<td class="v {tone}">{escape(words)}'
    )


def _left_out(results: Results) -> list[str]:
    if not results.left_out:
        return []
    lines = "".join(f"<li>{escape(name)}: {escape(why)}" for name, why in results.left_out.items())
    return ["<h2>Tasks that were left out</h2>", f"<ul>{lines}</ul>"]


def _interval(interval: Interval) -> str:
    return f"{interval.estimate:+.2f} <small>[{interval.low:+.2f}, {interval.high:+.2f}]</small>"


def _number(value: float | None, name: str) -> str:
    if value is None:
        return "<td class=n>"
    return f"<td class=n>×{value:.2f}" if name == "perplexity" else f"<td class=n>{value:+.2f}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _short(model: dict) -> str:
    return str(model.get("name") or "model").rstrip("/").rpartition("/")[2]
