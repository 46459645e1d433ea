"""Does a steering learned from the model's own answers follow an instruction, with and without it in the prompt?

Learned on the `learn` queries of the package's instructions, answered on the `test` queries, which aren't used for
learning. The other arms are the unsteered model, the instruction said once and twice, the mean difference as in the
demo, random and orthogonal directions of the same norm, and a LoRA trained on the same answers for the same number of
steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from benchmarks.harness import BOOTSTRAP, Report, Result, Target
from benchmarks.machine import machine, versions
from benchmarks.measuring import perplexities_of
from trimtab.data import instruction_pairs, instructions, prompts, queries
from trimtab.engines.transformers.generate import Generation
from trimtab.evaluate import CONSTRAINTS, on_topic, paired_bootstrap, repeated_share
from trimtab.evaluate.controls import random_like
from trimtab.evaluate.lora import Lora, finetuned
from trimtab.files.load import load
from trimtab.learn.own_answers import generate_own_answers
from trimtab.learn.teachers import Teacher
from trimtab.lm import LM
from trimtab.methods.distill import learn_distill
from trimtab.methods.instruct import learn_instruct
from trimtab.steering import Add, Steering
from trimtab.text.pairs import Pair
from trimtab.text.repetition import REPEATED_LIMIT

TOKENS = 48
LEARN_TOKENS = 64
HOLDS = Target(20 / 32)
HOLDS_WITH = Target(28 / 32)
ON_TOPIC = Target(24 / 32)
MINUTES = Target(5, at_least=False)
MEAN_DIFFERENCE = {"json": (0.6, 0.6), "title": (0.8, 0.45), "bullets": (0.3, 1.2), "sentence": (0.6, 0.6)}
"""Depth and strength, found by `benchmarks demo-settings` on the default model."""
REGIMES = {"without": False, "with": True}


@dataclass(frozen=True)
class Judged:
    """The results of the automatic checks of one answer."""

    holds: bool
    on_topic: bool
    text: str
    tokens: int


def run(
    model: str | None,
    names: Sequence[str],
    seeds: int,
    fits: Sequence[str],
    folder: Path,
    *,
    lora: bool,
    limit: int | None,
    rank: int | None = None,
    dtype: str = "float32",
) -> Report:
    """Learn each instruction with each seed and fit, and answer the test queries in all arms."""
    lm = LM.load(model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for name in names:
        results += _instruction(lm, name, seeds, fits, folder, lora=lora, limit=limit, rank=rank)
    return Report("distill", machine(), {**versions(), "model": lm.name}, tuple(results), spread=BOOTSTRAP)


def _instruction(
    lm: LM,
    name: str,
    seeds: int,
    fits: Sequence[str],
    folder: Path,
    *,
    lora: bool,
    limit: int | None,
    rank: int | None,
) -> list[Result]:
    instruction = instructions()[name]
    questions = list(queries("test"))[:limit]

    def check(query: str, answer: str, cut: bool) -> bool:
        return CONSTRAINTS[name](answer, cut=cut)

    results = []
    steerings: dict[str, Steering] = {}
    for fit in fits:
        for seed in range(1 if fit == "closed" else seeds):  # a closed form involves no randomness
            path = folder / f"{name}-{fit}{f'-{rank}' if rank else ''}-{seed}.safetensors"
            arm = f"distill {fit}, seed {seed}"
            if not path.is_file():
                started = time.perf_counter()
                learned = learn_distill(
                    lm,
                    instruction=instruction.learn,
                    check=check,
                    fit=fit,
                    rank=rank if fit == "gradient" else None,
                    tokens=LEARN_TOKENS,
                    seed=seed,
                    say=print,
                )
                seconds = time.perf_counter() - started
                learned.save(path)
                results.append(Result(f"{name}: {arm}", "learning", seconds / 60, "min", target=MINUTES))
            steerings[arm] = load(path)
    depth, strength = MEAN_DIFFERENCE[name]
    layer = min(round(depth * lm.layout.layers), lm.layout.layers - 1)
    pairs = instruction_pairs(queries("learn"), instruction.learn)
    first = steerings[f"distill {fits[0]}, seed 0"]
    arms: dict[str, Steering | None] = {
        "unsteered": None,
        **steerings,
        "mean difference": strength * learn_instruct(lm, pairs, layers=[layer], operation="add"),
        "random": random_like(first, 0),
    }
    if all(isinstance(edit.operation, Add) for edit in first.edits):
        arms["orthogonal"] = orthogonal_like(first, 0)
    answers: dict[tuple[str, str], list[Judged]] = {}
    for regime, with_it in REGIMES.items():
        wanted = prompts(questions, instruction.test) if with_it else questions
        for arm, steering in arms.items():
            answers[regime, arm] = _answers(lm, name, questions, wanted, steering)
    twice = [f"{prompt} {instruction.test[0]}" for prompt in prompts(questions, instruction.test)]
    answers["with", "said twice"] = _answers(lm, name, questions, twice, None)
    if lora:
        results += _lora(lm, name, check, questions, answers)
    instructed = dict(zip(questions, prompts(questions, instruction.test), strict=True))
    for regime in REGIMES:
        for arm in dict.fromkeys(arm for at, arm in answers if at == regime):
            results += _rows(lm, name, regime, arm, answers, instructed, questions)
    return results


def _answers(
    lm: LM, name: str, questions: Sequence[str], wanted: Sequence[str], steering: Steering | None
) -> list[Judged]:
    answers = lm.generate(list(wanted), steering, max_new_tokens=TOKENS, batch_size=32)
    return [_judged(name, query, answer) for query, answer in zip(questions, answers, strict=True)]


def _judged(name: str, query: str, answer: Generation) -> Judged:
    form = CONSTRAINTS[name](answer.text, cut=answer.finish_reason == "length")
    holds = form and repeated_share(answer.text) <= REPEATED_LIMIT
    return Judged(holds, on_topic(query, answer.text), answer.text, len(answer.token_ids))


def _rows(
    lm: LM,
    name: str,
    regime: str,
    arm: str,
    answers: Mapping[tuple[str, str], Sequence[Judged]],
    prompted: Mapping[str, str],
    questions: Sequence[str],
) -> list[Result]:
    """Shares with intervals, the paired difference from the instruction said once, topic, perplexity and length."""
    case = f"{name}, {regime} the instruction: {arm}"
    mine, once = answers[regime, arm], answers["with", "unsteered"]
    share = paired_bootstrap([answer.holds for answer in mine])
    ours = arm.startswith("distill")
    goal = (HOLDS_WITH if regime == "with" else HOLDS) if ours else None
    results = [Result(case, "holds", share.estimate, "", share.low, share.high, goal)]
    if (regime, arm) != ("with", "unsteered"):
        gain = paired_bootstrap([answer.holds for answer in once], [answer.holds for answer in mine])
        results.append(Result(case, "holds, less said once", gain.estimate, "", gain.low, gain.high))
    topic = mean(answer.on_topic for answer in mine)
    wanted = ON_TOPIC if ours and regime == "without" else None
    if ours and regime == "with":
        wanted = Target(mean(answer.on_topic for answer in once) - 3 / len(questions))
    results.append(Result(case, "on topic", topic, "", target=wanted))
    perplexity = perplexities_of(lm, [prompted[query] for query in questions], [answer.text for answer in mine])
    if perplexity:
        results.append(Result(case, "median perplexity, told and unsteered", median(perplexity), ""))
    results.append(Result(case, "tokens an answer", mean(answer.tokens for answer in mine), "tokens"))
    return results


def _lora(
    lm: LM,
    name: str,
    check: Callable[[str, str, bool], bool],
    questions: Sequence[str],
    answers_by_arm: dict[tuple[str, str], list[Judged]],
) -> list[Result]:
    """A LoRA on the same answers, with as many steps and the same batch size, without the prompt."""
    instruction = instructions()[name]
    started = time.perf_counter()
    answers = generate_own_answers(
        lm,
        Teacher(instruction=instruction.learn),
        queries("learn", more=True),
        check=check,
        tokens=LEARN_TOKENS,
    )
    making = time.perf_counter() - started
    pairs = [Pair(lesson.text, f"{lesson.text}.", lesson.query, "answers") for lesson in answers.lessons]
    settings = Lora(epochs=max(1, round(40 * 8 / len(pairs))), learning_rate=1e-3)
    started = time.perf_counter()
    with finetuned(lm, pairs, "positive", settings) as tuned:
        training = time.perf_counter() - started
        for regime, with_it in REGIMES.items():
            wanted = prompts(questions, instruction.test) if with_it else list(questions)
            answers_by_arm[regime, "LoRA"] = _answers(tuned, name, questions, wanted, None)
    return [
        Result(f"{name}: LoRA", "learning", (making + training) / 60, "min"),
        Result(f"{name}: LoRA", "training alone", training / 60, "min"),
    ]


def orthogonal_like(steering: Steering, seed: int) -> Steering:
    """The same additions along random directions of the same norm that are orthogonal to the learned ones."""
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for edit in steering.edits:
        own: Tensor = edit.operation.direction.double()
        drawn = torch.randn(len(own), generator=generator, dtype=torch.float64)
        if not own.any():  # a zero vector has no orthogonal part to scale
            edits.append(edit)
            continue
        unit = own / own.norm()
        drawn = drawn - (drawn @ unit) * unit
        edits.append(replace(edit, operation=Add((drawn * own.norm() / drawn.norm()).float())))
    return Steering(tuple(edits), steering.card)
