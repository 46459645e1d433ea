"""Suggestions for what to try next if `trimtab tune` found nothing worth steering with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.tune import Tuned
    from trimtab.tune.tune import HeldOut

HIGH_BASELINE = 0.9
"""At or above this score, unsteered answers leave little to gain."""


def advice(result: Tuned, *, blocks: int, instruction: str | None, instructed: bool) -> tuple[str, ...]:
    """Lines that each name something to change, based on the search; the most likely to help come first.

    Args:
        result: A search that ended in "don't steer".
        blocks: The number of blocks of the model.
        instruction: The instruction, if the task was a sentence.
        instructed: Whether the prompts in the search contained an instruction.
    """
    base, rows = result.table[:1], result.table[1:]
    lines = []
    if result.exhausted or not rows:
        lines.append("the search was cut short: give a larger --budget-tokens or --budget-minutes, or fewer --layers")
    baseline_scores = [base[0].score] if base else []
    baseline_scores += [] if result.held_out is None else [result.held_out.unsteered]
    if max(baseline_scores, default=0.0) >= HIGH_BASELINE:
        tail = "; search --without-instruction, or on harder prompts" if instructed else "; search on harder prompts"
        lines.append(f"without steering {max(baseline_scores):.0%} comply already, which leaves little to gain{tail}")
    used = sorted({abs(row.setting.strength) for row in rows if row.setting})
    broken = [row for row in rows if row.broken]
    better = [row for row in rows if row.score > row.unsteered]
    if used and better and all(row.broken for row in better):
        lines.append(f"what complied broke the text: try smaller --strengths, such as {_list(used[:1], 0.25, 0.5)}")
    elif used and not broken:
        lines.append(f"no setting broke the text: try larger --strengths, such as {_list(used[-1:], 1.5, 2, 3)}")
    if result.held_out is not None and not result.held_out.broken:
        lines.append(_on_test(result.held_out))
    if rows and (layer_count := len({row.setting.layer for row in rows if row.setting})) < blocks:
        lines.append(f"{layer_count} of {blocks} blocks were tried: --layers all")
    if instruction is not None:
        lines.append(f'train a steering instead: trimtab learn distill --instruction "{instruction}" --out FILE')
    else:
        lines.append("learn it with another method: trimtab methods lists those that your pairs can be used for")
    return tuple(lines)


def _on_test(held_out: HeldOut) -> str:
    """What to change so that the final test ends otherwise: the margin if only that failed, else the prompts."""
    from trimtab.evaluate.decision import WORSE

    decision = held_out.decision
    if decision is not None and decision.better:
        return (
            f"on {held_out.items} held-out prompts the best gains {decision.difference.estimate:+.2f}, which is more"
            " than chance but not above --margin: a smaller --margin accepts it"
        )
    failed = "was worse than not steering" if decision is not None and decision.verdict == WORSE else "may be luck"
    return (
        f"on {held_out.items} held-out prompts the best {failed}, whatever the --margin: give more prompts, or a larger"
        " --limit"
    )


def _list(strengths: list[float], *factors: float) -> str:
    return ",".join(f"{strength * factor:g}" for strength in strengths for factor in factors)
