"""`trimtab audit`: the side effects of a steering."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.eval_common import table_of
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, progress_bar, say, show, write_json
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target
from trimtab.files.pick import parse_pick

if TYPE_CHECKING:
    from trimtab.evaluate.audit import Audit, Estimate
    from trimtab.evaluate.audit.checks import Measure

DATA = "TRIMTAB_DATA"


@grouped
def audit(
    *,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE[@LAYERS][:STRENGTH]", help="A steering file; @14 selects layers, :2 multiplies the strength."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            envvar=DATA,
            help="A folder with advbench/, xstest/, mmlu/ or caa/: benchmarks that replace the included items.",
        ),
    ] = None,
    behaviour: Annotated[
        list[Path] | None, typer.Option(help="A further behaviour to measure: a file of A/B questions. Repeatable.")
    ] = None,
    repair: Annotated[
        Path | None,
        typer.Option(
            help="Make the steering orthogonal to the refusal directions, audit the result as well, and write it to"
            " this .safetensors file."
        ),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="With --repair: orthogonal to this behaviour's direction, too. Repeatable.", metavar="NAME"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the steering with the audit in its card; may be FILE itself.")
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="The system message with which harmful requests are asked again, such as your own.",
            show_default="one that asks to refuse",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half as many requests, shorter answers.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The random seed of intervals and tests.")] = 0,
    transfer: Annotated[bool, typer.Option("--transfer", help="Allow another model of the same width.")] = False,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Measure the side effects of a steering.

    [bold]  trimtab audit shout.safetensors
      trimtab audit shout.safetensors:2 --quick --json
      trimtab audit shout.safetensors --data data/ --out shout.safetensors
      trimtab audit blunt.safetensors --repair blunt-repaired.safetensors
      trimtab audit blunt.safetensors --repair clean.safetensors --protect "agrees with the user"[/bold]

    The steered and the unsteered model answer the same items: harmful requests (plain,
    under a system message that asks to refuse, and in template jailbreaks), harmless
    requests that sound harmful, two-choice questions on facts and behaviours in both
    orders, long answers, scored window by window, and conversations of ten turns. Two
    refusal directions, one of requests and one of answers, are learned during the
    audit and compared with what the steering writes, layer by layer.

    A change that is significant at 5 % among all comparisons (Holm) is stated as a
    finding; one that is significant only by itself is a "perhaps". If nothing is found,
    the audit says how large a change it would have detected. The same command gives the
    same audit.

    --repair removes the components along both directions from each edit, measures
    again, and reports the cost. Nothing is written before everything is measured.
    """
    pick = parse_pick(file, "audit")
    for target in (repair, out):
        if target is not None:
            check_target(target, ".safetensors")
    if repair is not None and out is not None and repair.resolve() == out.resolve():
        raise TrimtabError("--repair and --out name the same file; give the repaired steering one of its own")
    if protect and repair is None:
        raise TrimtabError("--protect needs a repair; give --repair FILE")
    if system is not None and not system.strip():
        raise TrimtabError(
            "--system is empty; give a message, or leave it out for the default, which asks the model to refuse"
        )
    steering = pick.load()

    from trimtab.evaluate.audit import FULL, QUICK, check_protected, read_items
    from trimtab.evaluate.audit import audit as measure
    from trimtab.evaluate.audit.checks import DEFAULT_SYSTEM_MESSAGE
    from trimtab.files.steering_file import save_steering

    size = QUICK if quick else FULL
    items = read_items(data, behaviour or (), size)
    check_protected(protect or (), items)
    lm = loader.load(quiet=json)
    seen: list[Measure] = []

    def report_estimate(estimate: Estimate) -> None:
        note(f"this takes about {_time(estimate.seconds)}", quiet=json)

    try:
        with progress_bar("auditing", quiet=json) as progress:
            result = measure(
                lm,
                steering,
                items=items,
                size=size,
                system=system or DEFAULT_SYSTEM_MESSAGE,
                repair=repair is not None,
                protect=tuple(protect or ()),
                seed=seed,
                transfer=transfer,
                progress=progress,
                estimate=report_estimate,
                on_measure=seen.append,
            )
    except KeyboardInterrupt:
        if seen and not json:
            say(f"interrupted after {len(seen)} of the comparisons; nothing was written")
        raise
    document: dict[str, Any] = {"file": str(pick.path), **result.to_json()}
    if result.repaired is not None and repair is not None:
        save_steering(result.repaired.steering, repair)
        document["repaired"] = {"file": str(repair), **result.repaired.to_json()}
    if out is not None:
        save_steering(result.steering, out)
        document["out"] = str(out)
    if json:
        write_json(document)
        return
    show(f"{pick} on {lm.name}, {size.name} audit", *_verdict_lines(result), "")
    show(comparison_table(result), "", *_facts(result))
    if result.repaired is not None:
        kept = (
            ""
            if result.repaired.kept is None
            else f"; it keeps {result.repaired.kept:.0%} of what the steering changes"
        )
        show(
            "",
            f"repaired: {_remaining_norm(result.repaired)}{kept}",
            *_verdict_lines(result.repaired),
            *_facts(result.repaired),
        )
    for name in (repair, out):
        if name is not None:
            note(f"wrote {name}", quiet=False)


def comparison_table(result: Audit) -> Table:
    """One row per comparison, differences first, with a column for the repaired steering if there is one."""
    mended = {comparison.name: comparison for comparison in result.repaired.comparisons} if result.repaired else {}
    names = ("unsteered", "steered", *(("repaired",) if mended else ()), "change", "p")
    table = table_of("", *names)
    for comparison in sorted(result.comparisons, key=lambda comparison: KINDS.index(comparison.kind)):
        values = [comparison.before, comparison.after, *([mended[comparison.name].after] if mended else [])]
        low, high = comparison.change.low, comparison.change.high
        table.add_row(
            f"{MARKS[comparison.kind]} {comparison.name}{' (nats)' * (comparison.unit == 'nats')}",
            *(f"{value:.0f}/{comparison.items}" if comparison.unit == "count" else f"{value:.2f}" for value in values),
            f"{comparison.change.estimate:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{comparison.p:.2g}" if comparison.p >= 0.001 else "<0.001",
        )
    return table


KINDS = ("harm", "change", "hint", "nothing")
MARKS = {"harm": "!", "change": "*", "hint": "?", "nothing": " "}


def _verdict_lines(result: Audit) -> list[str]:
    return [f"- {line}" for line in result.verdict]


def _facts(result: Audit) -> list[str]:
    nats = f"{result.nats['mean']:.3g} nats per token on average, {result.nats['p95']:.3g} at the 95th percentile"
    lines = [f"divergence from the unsteered model: {nats}; dose {result.dose:.2f}"]
    for name, by_arm in result.series.items():
        for arm, values in by_arm.items():
            if isinstance(values, dict):
                shown = ", ".join(f"{key} {value:.0f}" for key, value in values.items())
            else:
                shown = ", ".join(f"{value:.2f}" for value in values)
            lines.append(f"{name}, {arm}: {shown}")
    return [*lines, *(f"note: {line}" for line in result.notes)]


def _remaining_norm(result: Audit) -> str:
    remaining_shares = result.left or ()
    removed = sum(share == 0 for share in remaining_shares)
    low, high = min(remaining_shares), max(remaining_shares)
    shares = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    return f"{shares} of each edit's norm remains" + (
        f", {removed} of {len(remaining_shares)} edits were removed" if removed else ""
    )


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(10, round(seconds, -1)):.0f} seconds"
