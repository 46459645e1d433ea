"""The search: candidates as rows of shared batches, successive halving, and a final test on held-out prompts.

Stolfo et al. (2410.12877, appendix) try every layer on 6 to 10 examples and take the best. So few examples favour lucky
candidates. Here the chosen setting must beat no steering once more, on base queries that the search hasn't used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.evaluate.decision import Decision, decide, describe_decision
from trimtab.evaluate.fluency import fluencies
from trimtab.evaluate.intervals import Interval
from trimtab.keywords import caller_stacklevel
from trimtab.lm import DoseWarning
from trimtab.steering import Steering
from trimtab.text.chat import Prompt
from trimtab.tune.candidates import Candidate, Setting
from trimtab.tune.feasibility import BudgetWarning, check_token_budget, time_warning
from trimtab.tune.guard import STANDARD, Guard, median_perplexity
from trimtab.tune.halving import BASELINE, HalvingResult, Rung, Standing, count_answers, halve, ladder
from trimtab.tune.meter import Meter, Outcome, Progress, Trial
from trimtab.tune.split import Split, digest_of, split_by_query

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

MARGIN = 0.1
"""How much better than no steering a setting must be on held-out prompts to be worth it. Whether that is more than luck
is decided by a test (`trimtab.evaluate.decision`).
"""

HELD_OUT = 0.4
BATCH_SIZE = 64
COLUMNS = ("operation", "positions", "layer", "strength", "items", "score", "unsteered", "dose", "perplexity", "broken")

Check = Callable[[int, str, bool], "bool | float"]


@dataclass(frozen=True)
class CandidateResult:
    """One candidate in the search. `setting` is `None` for "don't steer".

    `score` and `unsteered` are means over the same `items`, `dose` is the mean of `‖edit‖ / ‖activation‖`, `perplexity`
    a median; `broken` names the guard's limits that the answers exceed.
    """

    setting: Setting | None
    items: int
    score: float
    unsteered: float
    dose: float
    perplexity: float | None
    broken: tuple[str, ...]


@dataclass(frozen=True)
class HeldOut:
    """The chosen setting on held-out prompts; `difference` is paired, steered minus unsteered.

    `decision` is the exact paired test of it. Only one setting is tested, so there is no correction.
    """

    items: int
    steered: float
    unsteered: float
    difference: Interval
    broken: tuple[str, ...]
    decision: Decision | None = None


@dataclass(frozen=True)
class Round:
    """A finished round of the search: `candidates` besides "don't steer", each evaluated on `items` prompts.

    `best` is the leading setting (`None`: not to steer), `score` its score, `unsteered` that of no steering.
    """

    number: int
    of: int
    candidates: int
    items: int
    best: Setting | None
    score: float
    unsteered: float

    def __str__(self) -> str:
        plain = f"unsteered {self.unsteered:.2f}"
        standing = f"none beats {plain}" if self.best is None else f"best so far {self.score:.2f}, {plain}: {self.best}"
        return f"round {self.number} of {self.of}: {self.candidates} candidates on {self.items} prompts; {standing}"


OnRound = Callable[[Round], None]


@dataclass(frozen=True)
class Tuned:
    """The result of a search. `steering` and `setting` are `None` for "don't steer", and `reason` says why in a
    sentence.

    `table` has a row for each candidate that was tried, "don't steer" first. `held_out` is `None` if there was nothing
    to confirm, or it couldn't be confirmed. `interrupted` and `exhausted` (the budget) say that the search was cut
    short; then the result is the best so far. `answers` and `tokens` are what the search cost.

    `confirmed` says that `setting` passed the test. The best so far of a search that was interrupted before the test
    isn't confirmed. `warnings` are the reasons why the search could hardly end in a verdict.
    """

    steering: Steering | None
    setting: Setting | None
    reason: str
    table: tuple[CandidateResult, ...]
    held_out: HeldOut | None
    split: Split
    interrupted: bool
    exhausted: bool
    answers: int
    tokens: int
    confirmed: bool = False
    warnings: tuple[str, ...] = ()


def tune(
    lm: LM,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    check: Check,
    *,
    groups: Sequence[Hashable] | None = None,
    contexts: Sequence[Prompt] | None = None,
    guard: Guard | None = STANDARD,
    max_new_tokens: int = 64,
    batch_size: int = BATCH_SIZE,
    rungs: Sequence[Rung] | None = None,
    held_out: float = HELD_OUT,
    margin: float = MARGIN,
    seed: int = 0,
    budget_tokens: int | None = None,
    budget_seconds: float | None = None,
    progress: Progress | None = None,
    on_round: OnRound | None = None,
    transfer: bool = False,
    **options: Any,
) -> Tuned:
    """Choose among candidates, including not to steer, by the scores that `check` gives the answers to `prompts`.

    `check(i, answer, cut)` scores the answer to prompt i, as a boolean or a number (higher is better); `cut` says that
    `max_new_tokens` ended it. Candidates and prompts run together as rows of batches of `batch_size`. The number of
    candidates is halved as that of prompts doubles (`rungs`, see `ladder`). A share `held_out` of the base queries
    (`groups[i]` names prompt i's; without it each prompt is its own) is kept for the final test. There the best setting
    must beat no steering by more than chance (an exact paired test, `decide`: at most 5 % of settings without an effect
    pass it) and by more than `margin`, and exceed none of `guard`'s limits; otherwise the result is not to steer. If
    nothing is held out, the test uses the prompts searched on, corrected for the number of candidates. Ties go to no
    steering, then to the smaller dose, then to the lower layer.

    Perplexities are conditioned on the prompts, or on `contexts[i]` instead. If the prompts leave an instruction out,
    pass prompts with it as `contexts`, since an answer that follows it is unlikely without it. Both are rendered with
    the `system`, `chat` and `template` in `options`.

    `budget_tokens` limits the generated tokens, including the final test; `budget_seconds` limits the time before the
    final test. A KeyboardInterrupt ends the search and isn't raised again: the best so far is returned, and isn't
    `confirmed` if the final test is missing. `progress` counts answers, `on_round` is called with a `Round` after each.
    `options` are passed to `lm.generate`. The result's card holds the table, the split and the setting.

    Raises `TrimtabError` for no candidates or prompts, lists of different lengths, a budget that pays for nothing, and
    anything that `lm.generate` rejects. Warns with `BudgetWarning`, after the first answers, if `budget_seconds` is too
    short for the first round.
    """
    prompts = list(prompts)
    context_list = prompts if contexts is None else list(contexts)
    if len(context_list) != len(prompts):
        raise TrimtabError(f"{len(context_list)} contexts for {len(prompts)} prompts; give one for each")
    rendering = {name: options[name] for name in ("system", "chat", "template") if name in options}

    def trial(steerings: Sequence[Steering | None], items: Sequence[int], progress: Progress) -> list[Outcome]:
        with warnings.catch_warnings():
            # trying strengths that are too strong is the point of a search
            warnings.simplefilter("ignore", DoseWarning)
            answers = lm.generate(
                [prompts[i] for i in items],
                list(steerings),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=progress,
                transfer=transfer,
                **options,
            )
        contexts = [context_list[i] for i in items]
        fluency_list = fluencies(lm, contexts, answers, **rendering) if guard else [None] * len(answers)
        return [
            Outcome(
                score=float(check(i, answer.text, answer.finish_reason == "length")),
                dose=answer.applied.dose_if_measured,
                tokens=len(answer.token_ids),
                fluency=fluency,
            )
            for i, answer, fluency in zip(items, answers, fluency_list, strict=True)
        ]

    names = [str(prompt) for prompt in prompts] if groups is None else list(groups)
    if len(names) != len(prompts):
        raise TrimtabError(f"{len(names)} groups for {len(prompts)} prompts; give one for each")
    return search(
        candidates,
        names,
        trial,
        guard=guard,
        rows=batch_size,
        rungs=rungs,
        held_out=held_out,
        margin=margin,
        seed=seed,
        tokens_each=max_new_tokens,
        budget_tokens=budget_tokens,
        budget_seconds=budget_seconds,
        progress=progress,
        on_round=on_round,
    )


def search(
    candidates: Sequence[Candidate],
    groups: Sequence[Hashable],
    trial: Trial,
    *,
    guard: Guard | None,
    rows: int = BATCH_SIZE,
    rungs: Sequence[Rung] | None = None,
    held_out: float = HELD_OUT,
    margin: float = MARGIN,
    seed: int = 0,
    tokens_each: int = 1,
    budget_tokens: int | None = None,
    budget_seconds: float | None = None,
    progress: Progress | None = None,
    on_round: OnRound | None = None,
) -> Tuned:
    """`tune` with any kind of trial: `trial` returns the outcomes, `tokens_each` is the maximum cost of one."""
    if not candidates:
        raise TrimtabError("there are no candidates to choose from")
    split = split_by_query(groups, held_out=held_out, seed=seed)
    steps = list(rungs) if rungs is not None else ladder(len(candidates), len(split.search))
    if steps[-1].items > len(split.search):
        raise TrimtabError(
            f"the last round needs {steps[-1].items} prompts, but only {len(split.search)} are available for the search"
        )
    steerings = [None, *(candidate.steering for candidate in candidates)]
    confirmation_rows = 2 * len(split.held_out)
    check_token_budget(len(candidates), len(split.held_out), tokens_each, budget_tokens)
    meter = Meter(
        trial,
        tokens_each,
        budget_tokens,
        budget_seconds,
        count_answers(len(candidates), steps) + confirmation_rows,
        progress,
    )
    meter.reserve(confirmation_rows)
    doubts: list[str] = []

    def evaluate(chosen: list[int], items: list[int]) -> list[list[Outcome]]:
        pairs = [(c, split.search[i]) for c in chosen for i in items]
        first = not meter.answers
        outcomes = meter.run([steerings[c] for c, _ in pairs], [item for _, item in pairs])
        unfinished = first and len(items) < steps[0].items
        if unfinished and (doubt := time_warning(len(candidates), steps, meter.seconds_each, budget_seconds)):
            doubts.append(doubt)
            warnings.warn(doubt, BudgetWarning, stacklevel=caller_stacklevel())
        return [outcomes[n * len(items) : (n + 1) * len(items)] for n in range(len(chosen))]

    all_outcomes: list[list[Outcome]] = [[] for _ in steerings]  # for the report of a round

    def evaluate_and_record(chosen: list[int], items: list[int]) -> list[list[Outcome]]:
        evaluated = evaluate(chosen, items)
        for c, outcomes in zip(chosen, evaluated, strict=True):
            all_outcomes[c] += outcomes
        return evaluated

    def report_round(rung: int, alive: int, best: int) -> None:
        if on_round is not None:
            means = [mean(outcome.score for outcome in all_outcomes[c]) for c in (best, BASELINE)]
            setting = None if best == BASELINE else candidates[best - 1].setting
            on_round(Round(rung + 1, len(steps), alive, steps[rung].items, setting, *means))

    halved = halve(
        len(candidates),
        steps,
        evaluate_and_record,
        lambda steered, unsteered: _standing(guard, steered, unsteered),
        ties=[0, *(candidate.setting.layer for candidate in candidates)],
        rows=rows,
        afford=meter.afford,
        on_rung=report_round,
    )
    chosen = None if halved.best == BASELINE else candidates[halved.best - 1]
    confirmed, interrupted = None, halved.interrupted
    if chosen is not None and split.held_out and not interrupted:
        try:
            confirmed = _confirm(meter, chosen.steering, split.held_out, groups, guard)
        except KeyboardInterrupt:
            interrupted = True
    steer, reason = _verdict(halved, chosen, confirmed, interrupted, margin, [groups[i] for i in split.search])
    tested = confirmed is not None
    table = _table(candidates, halved)
    if chosen is None or not steer:
        steering = setting = None
    else:
        setting = chosen.setting
        note = {
            "chosen": asdict(setting),
            "columns": list(COLUMNS),
            "table": [_compact(row) for row in table],
            "held_out": None if confirmed is None else _json_value(asdict(confirmed)),
            "split": {
                "seed": seed,
                "search": digest_of(groups, split.search),
                "held_out": digest_of(groups, split.held_out),
            },
            "guard": None if guard is None else asdict(guard),
            "margin": margin,
            "confirmed": tested,
            "cut_short": interrupted or halved.exhausted,
        }
        card = chosen.steering.card
        steering = replace(chosen.steering, card=replace(card, measured={**card.measured, "tuning": note}))
    return Tuned(
        steering,
        setting,
        reason,
        table,
        confirmed,
        split,
        interrupted,
        halved.exhausted,
        meter.answers,
        meter.tokens,
        confirmed=steering is not None and tested,
        warnings=tuple(doubts),
    )


def _standing(guard: Guard | None, steered: Sequence[Outcome], unsteered: Sequence[Outcome]) -> Standing:
    return Standing(
        score=mean(outcome.score for outcome in steered),
        dose=mean(outcome.dose for outcome in steered),
        broken=_broken(guard, steered, unsteered),
    )


def _broken(guard: Guard | None, steered: Sequence[Outcome], unsteered: Sequence[Outcome]) -> tuple[str, ...]:
    steered_fluency, unsteered_fluency = (
        [outcome.fluency for outcome in side if outcome.fluency is not None] for side in (steered, unsteered)
    )
    return guard.broken(steered_fluency, unsteered_fluency) if guard is not None and steered_fluency else ()


def _confirm(
    meter: Meter, steering: Steering, items: Sequence[int], groups: Sequence[Hashable], guard: Guard | None
) -> HeldOut:
    outcomes = meter.run([None] * len(items) + [steering] * len(items), [*items, *items])
    unsteered, steered = outcomes[: len(items)], outcomes[len(items) :]
    before, after = ([outcome.score for outcome in side] for side in (unsteered, steered))
    broken = _broken(guard, steered, unsteered)
    decision = decide(before, after, groups=[groups[i] for i in items])
    return HeldOut(len(items), decision.after, decision.before, decision.difference, broken, decision)


def _verdict(
    halved: HalvingResult[Outcome],
    chosen: Candidate | None,
    confirmed: HeldOut | None,
    interrupted: bool,
    margin: float,
    groups: Sequence[Hashable],
) -> tuple[bool, str]:
    """Whether there is a setting to keep, and why (not). One that couldn't be tested any more is kept."""
    base = halved.standings[BASELINE]
    if base is None:
        return (
            False,
            f"nothing was tried: {'interrupted' if interrupted else 'the budget is spent'} before the first prompt",
        )
    if chosen is None:
        forbidden = sum(standing is not None and not standing.admissible for standing in halved.standings[1:])
        tail = f"; {forbidden} of {len(halved.standings) - 1} candidates broke the guard" if forbidden else ""
        return False, f"no candidate scored above not steering ({base.score:.2f}){tail}"
    if confirmed is not None:
        if confirmed.broken:
            return False, f"{chosen.setting} broke the guard on held-out prompts: {'; '.join(confirmed.broken)}"
        assert confirmed.decision is not None
        decision, where = confirmed.decision, "held-out prompts"
    else:
        decision, where = _decide_on_search(halved, groups), "prompts searched on"
    summary = describe_decision(decision, where) + (
        "" if confirmed is not None or interrupted else "; nothing was held out"
    )
    if interrupted and confirmed is None:
        return (
            True,
            f"{decision.after:.2f} instead of {decision.before:.2f}; interrupted before it was confirmed ({summary})",
        )
    if not decision.better:
        return False, f"{chosen.setting}: {summary}"
    if not decision.difference.estimate > margin:
        return (
            False,
            f"{chosen.setting}: {summary}, but a gain of {decision.difference.estimate:+.2f} is not above {margin:g}",
        )
    return True, summary


def _decide_on_search(halved: HalvingResult[Outcome], groups: Sequence[Hashable]) -> Decision:
    """The test on the same prompts that the setting was chosen on, corrected for the number of settings tried."""
    mine = halved.results[halved.best]
    before = [outcome.score for outcome in halved.results[BASELINE][: len(mine)]]
    tried = sum(standing is not None for standing in halved.standings[1:])
    return decide(before, [outcome.score for outcome in mine], groups=groups[: len(mine)], candidates=max(1, tried))


def _table(candidates: Sequence[Candidate], halved: HalvingResult[Outcome]) -> tuple[CandidateResult, ...]:
    base = halved.results[BASELINE]
    rows = []
    for c, (results, standing) in enumerate(zip(halved.results, halved.standings, strict=True)):
        if standing is None:
            continue
        fluency_list = [outcome.fluency for outcome in results if outcome.fluency is not None]
        rows.append(
            CandidateResult(
                setting=None if c == BASELINE else candidates[c - 1].setting,
                items=len(results),
                score=standing.score,
                unsteered=mean(outcome.score for outcome in base[: len(results)]),
                dose=standing.dose,
                perplexity=median_perplexity(fluency_list),
                broken=standing.broken,
            )
        )
    return tuple(rows)


def _compact(row: CandidateResult) -> list[Any]:
    """A row in the order of `COLUMNS`, with values that JSON can hold."""
    setting = row.setting
    where = (
        [None, None, None, None]
        if setting is None
        else [setting.operation, setting.positions, setting.layer, setting.strength]
    )
    return _json_value([*where, row.items, row.score, row.unsteered, row.dose, row.perplexity, list(row.broken)])


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value
