"""The verdict of an evaluation in words: whether each arm differs from the unsteered one by more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.commands.arms import BASELINE
from trimtab.evaluate.decision import BETTER, LEVEL, LUCK, WORSE, Decision, decide, min_items_for_verdict

if TYPE_CHECKING:
    from trimtab.evaluate.records import Record

NEUTRAL = {BETTER: "higher", WORSE: "lower"}
"""The words for a score of which neither end is better as such."""


def verdict_lines(
    records: Sequence[Record],
    arms: Mapping[str, Mapping[str, Any]],
    score: str,
    name: str,
    *,
    items: str = "items",
    part_of: Callable[[Record], str] | None = None,
    higher_is_better: Mapping[str, bool] | None = None,
) -> list[str]:
    """One sentence for each arm that isn't random (and each part), and one for all random arms together.

    Args:
        records: The answers of all arms, scored. Those whose score isn't a number are left out.
        arms: The facts on each arm, by name, as in an evaluation's document.
        score: The score to compare.
        name: What the page calls that score.
        items: What the items are called.
        part_of: The part that a record belongs to; default: all items are compared together.
        higher_is_better: For each part, whether a higher score is better; default: neither end is better as such, and
            the verdict is "higher" or "lower".
    """
    words = {BETTER: BETTER, WORSE: WORSE} if higher_is_better is not None else NEUTRAL
    parts: Sequence[str | None] = [None] if higher_is_better is None else list(higher_is_better)
    compared = [arm for arm, facts in arms.items() if facts["kind"] not in ("baseline", "random")]
    random = [arm for arm, facts in arms.items() if facts["kind"] == "random"]
    if not arms:
        return [f"the {BASELINE} arm has no score, so there is no verdict"]
    if not compared:
        return [f"only the {BASELINE} arm was run, so there is nothing to compare"]
    candidates = len(compared) * len(parts)
    scores: dict[tuple[str, str | None], dict[str, Record]] = {}
    for record in records:
        if not math.isnan(record.scores[score]):
            part = None if part_of is None else part_of(record)
            scores.setdefault((record.arm, part), {})[record.item] = record

    def compare(arm: str, part: str | None) -> tuple[Decision, int] | None:
        before, after = scores.get((BASELINE, part), {}), scores.get((arm, part), {})
        both = [item for item in before if item in after]
        if not both:
            return None
        sign = 1 if higher_is_better is None or part is None or higher_is_better[part] else -1
        values = ([sign * side[item].scores[score] for item in both] for side in (before, after))
        groups = [item if (group := before[item].group) is None else group for item in both]
        return decide(*values, groups=groups, candidates=candidates), sign

    lines, sizes = [], []
    for arm in compared:
        for part in parts:
            where = arm if part is None else f"{arm}, {part}"
            result = compare(arm, part)
            if result is None:
                lines.append(f"{where}: no verdict, as none of the {items} has a score in both arms")
                continue
            lines.append(f"{where}: {_sentence(*result, name, items, words)}")
            sizes.append(result[0].items)
    if sizes and max(sizes) < (needed := min_items_for_verdict(candidates)):
        lines.append(f"these are too few {items} for any other verdict: it takes at least {needed}")
    controls = [result[0].verdict for arm in random for part in parts if (result := compare(arm, part)) is not None]
    if controls:
        counts = ", ".join(
            f"{controls.count(verdict)} {words.get(verdict, verdict)}" for verdict in (BETTER, WORSE, LUCK)
        )
        what = "random directions" if part_of is None else "comparisons with random directions"
        lines.append(f"for comparison, {len(controls)} {what} by the same test: {counts}")
    return lines


def describe_test(arms: Mapping[str, Mapping[str, Any]], parts: int = 1) -> str:
    """How a verdict is reached, for a page's legend; `parts` is the number of sets that each arm is compared on."""
    number = parts * sum(facts["kind"] not in ("baseline", "random") for facts in arms.values())
    corrected = f", multiplied by the number of comparisons ({number})" if number > 1 else ""
    return (
        "Each arm against the unsteered one, item by item. p is how often chance alone does as well: the one-sided"
        f" p-value of an exact paired test that flips the signs of the differences{corrected}. At p above {LEVEL:g} the"
        f" verdict is “{LUCK}”. In parentheses: on how many items the score changed which way."
    )


def _sentence(decision: Decision, sign: int, name: str, items: str, words: Mapping[str, str]) -> str:
    verdict = words.get(decision.verdict, decision.verdict)
    p = decision.p_worse if decision.verdict == WORSE else decision.p
    if decision.verdict == LUCK:
        p = min(decision.p, decision.p_worse)
    p = min(1.0, p * decision.candidates)
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    after, before = (sign * value + 0.0 for value in (decision.after, decision.before))  # + 0.0: no "-0.00"
    return (
        f"{verdict}: {name} {after:.2f} instead of {before:.2f} on {decision.items}"
        f" {items} ({decision.won} {words[BETTER]}, {decision.lost} {words[WORSE]}; {chance})"
    )
