"""Does emphasis make a model follow instructions, and what does rejection add? Uses IFEval's prompts with their
instructions emphasized: the text that a prompt has and its version without instructions doesn't.

DIRECTER (2603.06745), PASTA (2311.02262), SpotLight (2505.12025) and InstABoost (2506.13734), with and without
rejection, and on request SEKA (2603.01281), which is learned first, are compared with the unsteered model, a random
span of the same length, and a change of wording alone: the instruction said twice. Intermediate results are stored in a
folder, so that a run can be resumed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.choosing import say
from benchmarks.directer import PROMPTS, WITHOUT
from benchmarks.harness import BOOTSTRAP, Report, Result
from benchmarks.machine import machine, versions
from benchmarks.measuring import perplexities_of
from trimtab.decoding.rejection import Rejection
from trimtab.evaluate import controls
from trimtab.evaluate.answers import run as run_batches
from trimtab.evaluate.ifeval import IFEvalItem, by_instruction, read_ifeval, scorer
from trimtab.evaluate.intervals import mcnemar, paired_bootstrap
from trimtab.evaluate.records import ArmPrompt, Record
from trimtab.lm import LM
from trimtab.methods.directer import ALPHA, REJECTION, directer
from trimtab.methods.instaboost import instaboost
from trimtab.methods.pasta import pasta
from trimtab.methods.seka import Highlight, learn_seka, seka
from trimtab.methods.spotlight import spotlight
from trimtab.steering import ScaleScores, Steering, emphasis
from trimtab.text.spans import Phrase

BATCH = 16
UNSTEERED = "unsteered"
WORD = re.compile(r"\S+")
LEAST_WORDS = 3
LOST = 0.1
"""The share of the bare query's words that may be missing from the prompt; above, the prompt was rewritten."""

Phrases = Sequence[Phrase]


@dataclass(frozen=True)
class Arm:
    """How an arm emphasizes the phrases of a prompt, the rejection, and whether the instruction is said twice."""

    steer: Callable[[LM, str, Phrases], Steering] | None = None
    rejection: Rejection | None = None
    twice: bool = False


def instructions_of(prompt: str, without: str) -> list[str]:
    """The pieces of three words or more that the prompt has and the bare query doesn't; empty if that isn't clear."""
    here = list(WORD.finditer(prompt))
    there = [_bare(word) for word in WORD.findall(without)]
    pieces, lost = [], 0
    match = difflib.SequenceMatcher(None, [_bare(word.group()) for word in here], there, autojunk=False)
    for change, start, stop, low, high in match.get_opcodes():
        lost += high - low if change in ("replace", "insert") else 0
        if change in ("delete", "replace") and stop - start >= LEAST_WORDS:
            pieces.append(prompt[here[start].start() : here[stop - 1].end()])
    clear = lost <= LOST * len(there) and all(prompt.count(piece) == 1 for piece in pieces)
    return pieces if clear else []


def _bare(word: str) -> str:
    return re.sub(r"\W+", "", word.lower()) or word


def random_span(lm: LM, prompt: str, phrases: Phrases) -> Steering:
    """DIRECTER at a span of the same length elsewhere in the prompt."""
    span = controls.random_span(lm, prompt, phrases)
    return emphasis(ScaleScores(ALPHA), [span], range(lm.layout.layers), "random span")


ARMS: Mapping[str, Arm] = {
    UNSTEERED: Arm(),
    "instruction said twice": Arm(twice=True),
    "DIRECTER": Arm(directer, REJECTION),
    "DIRECTER without rejection": Arm(directer),
    "PASTA": Arm(pasta),
    "PASTA with rejection": Arm(pasta, REJECTION),
    "SpotLight": Arm(spotlight),
    "SpotLight with rejection": Arm(spotlight, REJECTION),
    "InstABoost": Arm(instaboost),
    "InstABoost with rejection": Arm(instaboost, REJECTION),
    "random span, with rejection": Arm(random_span, REJECTION),
}


def seka_arm(lm: LM, examples: Sequence[Highlight] | None = None) -> Arm:
    """SEKA, learned here from synthetic examples, independent of the prompts."""
    learned = learn_seka(lm, examples)
    return Arm(lambda lm, prompt, phrases: seka(lm, prompt, phrases, learned))


def run(model: str | None, data: Path, folder: Path, limit: int | None, tokens: int, with_seka: bool = False) -> Report:
    """Answer `limit` of the prompts, evenly spaced, in every arm."""
    lm = LM.load(model, dtype="float32")
    folder.mkdir(parents=True, exist_ok=True)
    every = read_ifeval(data / PROMPTS)
    lines = (data / WITHOUT).read_text().splitlines()
    bare = {str(row["key"]): str(row["prompt_without_instruction"] or "") for row in map(json.loads, lines)}
    pieces = {item.item: instructions_of(item.prompt, bare.get(str(item.key), "")) for item in every}
    clear = [item for item in every if pieces[item.item]]
    count = min(limit or len(clear), len(clear))
    items = [clear[i * len(clear) // count] for i in range(count)]
    records: dict[str, list[Record]] = {}
    arms = {**ARMS, "SEKA": seka_arm(lm)} if with_seka else ARMS
    for name, arm in arms.items():
        file = folder / f"{name.replace(' ', '-').replace(',', '')}.jsonl"
        records[name] = _answers(lm, name, arm, items, pieces, file, tokens)
    return _report(lm, items, records, len(clear), len(every), tokens)


def _answers(
    lm: LM,
    name: str,
    arm: Arm,
    items: Sequence[IFEvalItem],
    pieces: Mapping[str, Sequence[str]],
    out: Path,
    tokens: int,
) -> list[Record]:
    requests = []
    for item in items:
        mine = pieces[item.item]
        prompt = f"{item.prompt}\n\n{' '.join(mine)}" if arm.twice else item.prompt
        steering = None if arm.steer is None else arm.steer(lm, prompt, [Phrase(piece) for piece in mine])
        requests.append(ArmPrompt(name, item.item, prompt, steering, item.key))
    requests.sort(key=lambda request: -len(lm.encode(request.prompt)))
    judge = scorer(items)

    def make(_: int, batch: Sequence[ArmPrompt], digests: Mapping[int, str]) -> list[Record]:
        answers = lm.generate(
            [request.prompt for request in batch],
            [request.steering for request in batch],
            max_new_tokens=tokens,
            batch_size=BATCH,
            rejection=arm.rejection,
        )
        done = []
        for request, answer in zip(batch, answers, strict=True):
            seen = {"open": answer.trace.open_share, "changed": answer.trace.changed_share} if answer.trace else {}
            done.append(
                Record(
                    arm=name,
                    item=request.item,
                    prompt=request.prompt,
                    answer=answer.text,
                    tokens=len(answer.token_ids),
                    finish=answer.finish_reason,
                    steering=digests.get(id(request.steering)),
                    edits=(),
                    dose=answer.applied.dose,
                    seed=None,
                    scores={**judge(request, answer), **seen},
                    group=request.group,
                )
            )
        return done

    batches = [requests[at : at + BATCH] for at in range(0, len(requests), BATCH)]
    settings = {"max_new_tokens": tokens, "batch_size": BATCH, "rejection": repr(arm.rejection)}
    return run_batches(lm, requests, batches, make, settings=settings, out=out, progress=say(name))


def _report(
    lm: LM, items: Sequence[IFEvalItem], records: Mapping[str, Sequence[Record]], count: int, of: int, tokens: int
) -> Report:
    prompts = {item.item: item.prompt for item in items}
    plain = sorted(records[UNSTEERED], key=lambda record: record.item)
    results = [Result("IFEval", f"prompts whose instruction is found, of {of}", count, "prompts")]
    results.append(Result("IFEval", f"of these, answered here with up to {tokens} tokens", len(items), "prompts"))
    for name, listed in records.items():
        mine = sorted(listed, key=lambda record: record.item)
        for what, shape in (("prompt", list), ("instruction", by_instruction)):
            before, after = shape(plain), shape(mine)
            groups = [record.group for record in after]
            for score in ("strict", "loose"):
                here = [record.scores[score] for record in after]
                results.append(_interval(name, f"{what}-level {score}", paired_bootstrap(here, groups=groups)))
                if name != UNSTEERED:
                    there = [record.scores[score] for record in before]
                    gain = paired_bootstrap(there, here, groups=groups)
                    results.append(_interval(name, f"{what}-level {score}, minus unsteered", gain))
                    if (what, score) == ("prompt", "loose"):
                        results.append(Result(name, "McNemar p", mcnemar(there, here), ""))
        said = [record for record in mine if record.answer.strip()]
        results.append(Result(name, "empty answers", 1 - len(said) / len(mine), "share"))
        if said:
            read = perplexities_of(lm, [prompts[r.item] for r in said], [r.answer for r in said])
            results.append(Result(name, "median perplexity of the others, unsteered model", median(read), ""))
        results.append(Result(name, "tokens an answer", mean(r.tokens for r in mine), "tokens"))
        for score, title in (("open", "gate open"), ("changed", "tokens changed")):
            if all(score in r.scores for r in mine):
                total = sum(r.tokens for r in mine)
                share = sum(r.scores[score] * r.tokens for r in mine) / max(1, total)
                results.append(Result(name, title, share, "share"))
    return Report("emphasis", machine(), {**versions(), "model": lm.name}, tuple(results), spread=BOOTSTRAP)


def _interval(case: str, metric: str, interval: Any) -> Result:
    return Result(case, metric, interval.estimate, "", interval.low, interval.high)
