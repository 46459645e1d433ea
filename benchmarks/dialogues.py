"""Steered dialogues of many turns: trait and perplexity from turn to turn, with and without a clean cache.

A persona's direction is learned from the model's own answers with and without it. All arms have the same divergence
from the unsteered model (95th percentile), measured on other queries. Each then answers the same queries turn by turn,
with its own answers in its prompt. The unsteered model scores the answers: how likely an answer is (perplexity), and
the projection of its activations on the direction, minus that of the unsteered dialogue. Intervals are 95 % over
dialogues, each paired with the unsteered one of the same queries. Drift is the change from the first measured turn to
the last. Without rounds, the cost per token isn't measured.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.choosing import say
from benchmarks.harness import BOOTSTRAP, Report, Result, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from trimtab.data import queries
from trimtab.evaluate.divergence import Divergence, Reference, _kl, divergence, reference
from trimtab.evaluate.intervals import Interval, paired_bootstrap
from trimtab.lm import LM, DoseWarning
from trimtab.methods.caa import PairsWarning, learn_caa
from trimtab.steering import Positions, Steering
from trimtab.text.pairs import Pair

PERSONA = "You are a pirate of the high seas. Talk like a pirate in every sentence."
LEARN, BASE = 24, 8
"""The numbers of queries for learning the direction, and for finding strengths."""
MEASURED = (1, 4, 7, 10)
"""The turns that are measured."""
PERPLEXITY = "Perplexity of the answers"
RATIO = "Perplexity, as a ratio to that of the unsteered dialogue"
PROJECTION = "Projection on the direction, less that of the unsteered dialogue"
UNSTEERED, ALL, GENERATED, CLEAN = "unsteered", "all tokens", "generated tokens", "clean cache"


Reading = tuple[float, float]
"""An answer's mean negative log-likelihood in nats per token, and its mean projection."""


@dataclass(frozen=True)
class Arm:
    """How one dialogue is steered."""

    steering: Steering | None
    clean: bool = False


def run(
    model: str | None, dialogues: int, turns: int, tokens: int, nats: float, layer: int | None, rounds: int
) -> Report:
    """All arms over the same queries, and the cost per token."""
    lm = LM.load(model, dtype="float32")
    layer = lm.layout.layers // 2 if layer is None else layer
    questions = queries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        warnings.simplefilter("ignore", PairsWarning)
        learned = learn(lm, questions[:LEARN], layer, tokens)
        talk = questions[LEARN + BASE :]
        costing = costs(lm, learned, talk[:8], tokens, rounds) if rounds else []
        base = reference(lm, questions[LEARN : LEARN + BASE], tokens=12)
        arms = {UNSTEERED: Arm(None)} | arms_at(lm, learned, base, nats)
        plan = [[talk[(d * turns + t) % len(talk)] for t in range(turns)] for d in range(dialogues)]
        along = learned.edits[0].operation.direction.double()
        along /= along.norm()
        read = {name: held(lm, name, arm, plan, tokens, layer, along) for name, arm in arms.items()}
        results = [result for name in arms for result in lines(name, read, arms, learned)]
    about = {**versions(), "model": lm.name, "dtype": "float32"}
    return Report("dialogues", machine(), about, (*results, *costing), spread=BOOTSTRAP, grid=not costing)


def learn(lm: LM, questions: Sequence[str], layer: int, tokens: int) -> Steering:
    """The persona's direction, from answers with it and without."""
    with_it = lm.generate(questions, system=PERSONA, max_new_tokens=tokens, progress=say("persona"))
    without = lm.generate(questions, max_new_tokens=tokens)
    pairs = [
        Pair(in_persona.text or " ", other.text or " ", query)
        for in_persona, other, query in zip(with_it, without, questions, strict=True)
    ]
    return learn_caa(lm, pairs, layer, read_at="answer")


def arms_at(lm: LM, learned: Steering, base: Reference, nats: float) -> dict[str, Arm]:
    """Each way to steer, at the strength that has this divergence."""
    arms = {}
    for name, rule in ((ALL, Positions.all()), (GENERATED, Positions.from_last_prompt_token())):
        steering = learned.at(rule)

        def far(factor: float, steering: Steering = steering) -> float:
            return divergence(lm, factor * steering, base).p95

        arms[name] = Arm(strength_of(far, nats) * steering)
    steering = learned.at(Positions.all())
    factor = strength_of(lambda factor: clean_divergence(lm, factor * steering, base).p95, nats)
    arms[CLEAN] = Arm(factor * steering, clean=True)
    return arms


def strength_of(far: Callable[[float], float], nats: float) -> float:
    """The weakest factor that reaches a divergence: found by doubling, and then by bisection."""
    high = 1 / 8
    while far(high) < nats:
        high *= 2
        if high > 1024:
            raise ValueError(f"{nats} nats can't be reached")
    low = high / 2
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if far(middle) < nats else (low, middle)
    return high


def clean_divergence(lm: LM, steering: Steering, base: Reference) -> Divergence:
    """`divergence` with a clean cache: each token is steered on top of unsteered ones, all of them in one forward pass.

    The text is in it twice. A token of the second, steered copy attends to the tokens of the first copy before it, and
    to itself.
    """
    (edit,) = steering.edits
    vector = edit.strength * edit.operation.direction
    by_text = []
    for text, unsteered in zip(base.texts, base.logits, strict=True):
        ids = [*text.prompt, *text.answer[:-1]]
        count = len(ids)
        before = torch.ones(count, count).tril(-1)
        own, none = torch.eye(count), torch.zeros(count, count)
        seen = torch.cat([torch.cat([before + own, none], 1), torch.cat([before, own], 1)]).bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

        def push(_module: object, _args: object, output: Tensor | tuple[Tensor, ...], count: int = count) -> None:
            x = output if isinstance(output, Tensor) else output[0]
            x[:, count:] += vector.to(x)

        hook = lm.layout.blocks[edit.site.layer].register_forward_hook(push)
        try:
            with torch.no_grad():
                logits = lm.model(
                    input_ids=torch.tensor([[*ids, *ids]]),
                    attention_mask=mask[None, None],
                    position_ids=torch.tensor([[*range(count), *range(count)]]),
                    use_cache=False,
                ).logits[0, count + len(text.prompt) - 1 :]
        finally:
            hook.remove()
        by_text.append(tuple(_kl(unsteered, logits)))
    return Divergence(tuple(by_text))


def held(
    lm: LM, name: str, arm: Arm, plan: Sequence[Sequence[str]], tokens: int, layer: int, direction: Tensor
) -> dict[int, dict[int, Reading]]:
    """By turn and dialogue, the unsteered model's reading of the answer; an empty answer has none."""
    talks: list[list[dict[str, str]]] = [[] for _ in plan]
    by_turn: dict[int, dict[int, Reading]] = {}
    count = len(plan[0])
    for turn in range(count):
        for talk, questions in zip(talks, plan, strict=True):
            talk.append({"role": "user", "content": questions[turn]})
        answers = lm.generate(talks, arm.steering, clean_cache=arm.clean, max_new_tokens=tokens)
        if turn + 1 in MEASURED:
            by_turn[turn + 1] = {
                i: read_unsteered(lm, lm.encode(talk), answer.token_ids, layer, direction)
                for i, (talk, answer) in enumerate(zip(talks, answers, strict=True))
                if answer.token_ids
            }
        for talk, answer in zip(talks, answers, strict=True):
            talk.append({"role": "assistant", "content": answer.text})
        say(name)(turn + 1, count)
    return by_turn


def read_unsteered(lm: LM, prompt: Sequence[int], answer: Sequence[int], layer: int, direction: Tensor) -> Reading:
    """An answer's negative log-likelihood and its projection on a direction, in one unsteered forward pass."""
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append((output if isinstance(output, Tensor) else output[0])[0, len(prompt) :])

    hook = lm.layout.blocks[layer].register_forward_hook(keep)
    try:
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
    finally:
        hook.remove()
    logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    likely = logprobs.gather(-1, torch.tensor(answer)[:, None]).mean()
    return -float(likely), float((kept[0].double() @ direction).mean())


def lines(
    name: str, read: Mapping[str, Mapping[int, Mapping[int, Reading]]], arms: Mapping[str, Arm], learned: Steering
) -> list[Result]:
    """The results of one arm.

    For each turn: its perplexity, the ratio to that of the unsteered dialogues of the same queries, and the difference
    in projection. Also how much both change from the first turn to the last.
    """
    turns = list(read[name])
    results = []
    for turn in turns:
        likely = paired_bootstrap([nats for nats, _ in read[name][turn].values()])
        results.append(_with(name, f"{PERPLEXITY}: turn {turn}", likely, math.exp))
    steering = arms[name].steering
    if steering is None:
        return results
    results.insert(
        0, Result(name, f"{PERPLEXITY}: strength", steering.edits[0].strength / learned.edits[0].strength, "x")
    )
    beyond = {turn: _beyond(read[name][turn], read[UNSTEERED][turn]) for turn in turns}
    for turn, pairs in beyond.items():
        nats, projection = (paired_bootstrap([pair[i] for pair in pairs.values()]) for i in (0, 1))
        results.append(_with(name, f"{RATIO}: turn {turn}", nats, math.exp, "x"))
        results.append(_with(name, f"{PROJECTION}: turn {turn}", projection))
    first, last = beyond[turns[0]], beyond[turns[-1]]
    both = sorted(first.keys() & last.keys())
    for i, title, shown in ((0, RATIO, math.exp), (1, PROJECTION, None)):
        drift = paired_bootstrap([first[d][i] for d in both], [last[d][i] for d in both])
        results.append(_with(name, f"{title}: drift, {turns[0]} to {turns[-1]}", drift, shown, "x" if shown else ""))
    return results


def _beyond(steered: Mapping[int, Reading], plain: Mapping[int, Reading]) -> dict[int, Reading]:
    """The steered reading minus the unsteered one, for each dialogue that has both."""
    return {i: (steered[i][0] - plain[i][0], steered[i][1] - plain[i][1]) for i in steered if i in plain}


def _with(
    name: str, metric: str, interval: Interval, shown: Callable[[float], float] | None = None, unit: str = ""
) -> Result:
    value, low, high = (shown(x) if shown else x for x in (interval.estimate, interval.low, interval.high))
    return Result(name, metric, value, unit, low, high)


def costs(lm: LM, learned: Steering, questions: Sequence[str], tokens: int, rounds: int) -> list[Result]:
    """Tokens per second, as ratios to unsteered ones, for one prompt and for all."""
    timed = {UNSTEERED: Arm(None), ALL: Arm(learned), CLEAN: Arm(learned, clean=True)}
    results = []
    for count in (1, len(questions)):

        def rate(arm: Arm, count: int = count) -> float:
            start = time.perf_counter()
            lm.generate(
                questions[:count], arm.steering, clean_cache=arm.clean, max_new_tokens=tokens, min_new_tokens=tokens
            )
            return count * tokens / (time.perf_counter() - start)

        runs = {name: partial(rate, arm) for name, arm in timed.items()}
        values = interleave(runs, rounds, case=f"{count} rows")
        for name in (ALL, CLEAN):
            ratio = ratios(values[name], values[UNSTEERED])
            results.append(summarized(f"{name}, {count} rows", "throughput", "x unsteered", ratio))
    return results
