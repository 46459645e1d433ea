"""Emphasis with rejection against unsteered generation: time per token of each schedule, and of the naive form.

Uses the IFEval prompts whose instructions are a clean suffix. The suffix is emphasized; decoding is greedy, with a
fixed number of new tokens. Targets: `auto` takes at most 1.2 times the unsteered time per token on a CPU (1.1 on a
GPU), and at most a quarter of the naive form's; memory is at most 1.1 times the unsteered.

The naive form is the algorithm as its released code runs it: the whole cache is copied once per token and once per
candidate, keys are multiplied in the copies, and each candidate and each step of the layer ranking is a separate
forward pass.
"""

from __future__ import annotations

import copy
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.memory import forget_peak, own_peak, peak_of
from trimtab.decoding.ranking import disturbance, order_layers, sensitivity
from trimtab.decoding.rejection import Rejection, halving_subsets
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.attention import attention_modules
from trimtab.errors import TrimtabError
from trimtab.lm import LM

PROMPTS = Path("ifeval") / "input_data.jsonl"
WITHOUT = Path("ifeval") / "without_instructions.jsonl"
SCHEDULES = ("optimistic", "fused", "auto")
COUNT = 24
ALPHA, BETA = 100.0, 0.5
TIME, TIME_ON_GPU = Target(1.2, at_least=False), Target(1.1, at_least=False)
NAIVE = Target(4.0)
MEMORY = Target(1.1, at_least=False)


@dataclass(frozen=True)
class EmphasizedPrompt:
    """A prompt, and the instruction at its end."""

    prompt: str
    instruction: str


@dataclass
class Seen:
    """Statistics from the traces of one schedule."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)  # seconds per token after the first, for a step of the whole batch
    passes: list[float] = field(default_factory=list)
    opened: list[bool] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)
    candidates: list[int | None] = field(default_factory=list)  # for open gates


def clean_suffixes(folder: Path) -> list[EmphasizedPrompt]:
    """The IFEval prompts that consist of a query followed by its instructions, in the file's order."""
    without = {row["key"]: row["prompt_without_instruction"] for row in _rows(folder / WITHOUT)}
    suffixes = []
    for row in _rows(folder / PROMPTS):
        query = str(without.get(row["key"], "")).strip()
        rest = _after(row["prompt"], query)
        if query and len(rest) >= 10 and row["prompt"].count(rest) == 1:
            suffixes.append(EmphasizedPrompt(row["prompt"], rest))
    return suffixes


def _after(prompt: str, query: str) -> str:
    """The text after a query that the prompt begins with, if it is separate sentences; else empty."""
    if prompt.startswith(query):
        rest = prompt[len(query) :]
        return rest.strip() if rest[:1].isspace() else ""
    bare = query.rstrip(".!?")  # it may end with another mark than in the prompt
    rest = prompt[len(bare) :] if prompt.startswith(bare) else ""
    return rest.lstrip(".!?").strip() if rest[:1] in (".", "!", "?") else ""


def run(
    folder: Path,
    rounds: int,
    tokens: int,
    batches: Sequence[int],
    naive_rounds: int,
    bench_model: str,
    default: bool = True,
    schedules: Sequence[str] = SCHEDULES,
) -> Report:
    """Speed and memory on the default model (unless turned off), and speed on the bench model (a GGUF file), if any."""
    prompts = clean_suffixes(folder)[:COUNT]
    results: list[Result] = []
    for name, path in (("default model", None), ("bench model", bench_model or None)):
        if not (default if name == "default model" else path):
            continue
        lm = LM.load(path, dtype="float32")
        for batch in batches:
            results += _speed(f"{name}, batch {batch}", lm, prompts, batch, rounds, tokens, naive_rounds, schedules)
        del lm
    for batch in batches if default else ():
        results.append(_memory(f"default model, batch {batch}", folder, batch, tokens))
    return Report("directer", machine(), versions(), tuple(results))


def bench_model(script: Path) -> str:
    """The bench model's file, fetched by this script; empty if that fails."""
    if not script.is_file():
        return ""
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else ""


def peak(folder: Path, batch: int, tokens: int, steered: bool) -> float:
    """The peak memory in MiB of generating for one batch, steered or not."""
    lm = LM.load(dtype="float32")
    chosen = clean_suffixes(folder)[:batch]
    lm.generate("Hello", max_new_tokens=2)
    forget_peak()
    _generate(lm, chosen, tokens, "auto" if steered else None)
    return own_peak()


def _speed(
    case: str,
    lm: LM,
    prompts: Sequence[EmphasizedPrompt],
    batch: int,
    rounds: int,
    tokens: int,
    naive_rounds: int,
    schedules: Sequence[str],
) -> list[Result]:
    chunks = [list(prompts[i : i + batch]) for i in range(0, len(prompts) - batch + 1, batch)]
    rounds = min(rounds, len(chunks))
    seen = {name: Seen() for name in schedules}
    unsteered = _each(chunks, lambda chunk: _seconds(lambda: _generate(lm, chunk, tokens, None)) / tokens)
    first = _each(chunks, lambda chunk: _seconds(lambda: _generate(lm, chunk, 1, None)))
    runs: dict[str, Callable[[], float]] = {"unsteered": unsteered, "first": first}
    for name in schedules:
        runs[name] = _each(chunks, lambda chunk, name=name: _traced(lm, chunk, tokens, name, seen[name]))  # type: ignore[misc]
    values = interleave(runs, rounds, case=case)
    on_gpu = lm.model.device.type == "cuda"
    results = [
        summarized(case, f"{name}, time a token", "ms", [1000 * v for v in values[name]])
        for name in ("unsteered", *schedules)
    ]
    for name in schedules:
        target = (TIME_ON_GPU if on_gpu else TIME) if name == "auto" and batch == 1 else None
        whole = ratios(values[name], values["unsteered"])
        results.append(summarized(case, f"{name} / unsteered, time a token", "ratio", whole, target))
        mine = seen[name]
        base = [(u * tokens - f) / (tokens - 1) for u, f in zip(values["unsteered"], values["first"], strict=True)]
        later = ratios(mine.later[-rounds:], base)
        results.append(summarized(case, f"{name} / unsteered, after the first token", "ratio", later))
    last = seen[schedules[-1]]
    results += [
        summarized(
            case,
            f"{schedules[-1]}, time to the first token, ranking included",
            "ms",
            [1000 * v for v in last.first[1:]],
        ),
        summarized(case, "unsteered, time to the first token", "ms", [1000 * v for v in values["first"]]),
    ]
    for name in schedules:
        results.append(summarized(case, f"{name}, passes a token", "passes", seen[name].passes))
    results += [
        Result(case, "gate open", sum(last.opened) / len(last.opened), "of tokens"),
        Result(case, "tokens changed", sum(last.changed) / len(last.changed), "of tokens"),
    ]
    for candidate in (*sorted({r for r in last.candidates if r is not None}), None):
        share = sum(r == candidate for r in last.candidates) / max(1, len(last.candidates))
        label = "all candidates rejected" if candidate is None else f"candidate {candidate} accepted"
        results.append(Result(case, label, share, "of open gates"))
    if batch == 1 and naive_rounds:
        pair = {
            "naive": _each(chunks, lambda chunk: naive(lm, chunk[0], tokens)[1] / tokens),
            "auto": _each(chunks, lambda chunk: _traced(lm, chunk, tokens, "auto", Seen())),
        }
        times = interleave(pair, naive_rounds, case=case)
        results.append(summarized(case, "naive, time a token", "ms", [1000 * v for v in times["naive"]]))
        results.append(
            summarized(case, "naive / auto, time a token", "ratio", ratios(times["naive"], times["auto"]), NAIVE)
        )
    return results


def _memory(case: str, folder: Path, batch: int, tokens: int) -> Result:
    arguments = ["directer", "--data", str(folder), "--batch", str(batch), "--tokens", str(tokens)]
    ours, plain = peak_of(*arguments, "--steered"), peak_of(*arguments)
    return Result(case, "peak memory, auto / unsteered", ours / plain, "ratio", target=MEMORY)


def _each(
    chunks: Sequence[list[EmphasizedPrompt]], work: Callable[[list[EmphasizedPrompt]], float]
) -> Callable[[], float]:
    """A run that takes the chunks in turn; all contenders start with the same one."""
    turn = cycle(chunks)
    return lambda: work(next(turn))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _generate(lm: LM, chunk: Sequence[EmphasizedPrompt], tokens: int, schedule: str | None) -> Any:
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    if schedule is not None:
        options["emphasize"] = [request.instruction for request in chunk]
        options["rejection"] = Rejection(BETA, schedule=schedule)
    return lm.generate([request.prompt for request in chunk], **options)


def _traced(lm: LM, chunk: Sequence[EmphasizedPrompt], tokens: int, schedule: str, seen: Seen) -> float:
    start = time.perf_counter()
    answers = _generate(lm, chunk, tokens, schedule)
    seconds = time.perf_counter() - start
    trace = answers[0].trace
    seen.first.append(trace.seconds_to_first)
    seen.later.append((seconds - trace.seconds_to_first) / (tokens - 1))
    seen.passes.append((trace.passes + 1) / tokens)
    for answer in answers:
        seen.opened += [step.open for step in answer.trace.steps]
        seen.changed += [step.replaced is not None for step in answer.trace.steps]
        seen.candidates += [step.candidate for step in answer.trace.steps if step.open]
    return seconds / tokens


# ---- the naive form ------------------------------------------------------------------------------------------


@torch.no_grad()
def naive(lm: LM, request: EmphasizedPrompt, tokens: int) -> tuple[list[int], float]:
    """The token ids, and the time in seconds, with copied caches and a forward pass per candidate and ranked layer."""
    start = time.perf_counter()
    ids = lm.encode(request.prompt)
    spans = lm.spans(request.prompt, request.instruction)
    cache: Any = compat.DynamicCache(config=lm.layout.decoder.config)  # type: ignore[arg-type]
    _pass(lm, ids[:-1], cache)
    token = ids[-1]
    order: tuple[int, ...] = ()
    token_ids: list[int] = []
    for _ in range(tokens):
        before = copy.deepcopy(cache)
        raw = _step(lm, token, cache)
        if not order:
            order = _rank(lm, token, before, spans)
        for end in _end_ids(lm):  # as min_new_tokens does for the others
            raw[end] = -torch.inf
        top = raw.topk(2)
        bar = top.values[0] + torch.tensor(BETA).log()
        chosen = int(top.indices[0])
        if top.values[1] >= bar:
            for layers in halving_subsets(order):
                steered = _step(lm, token, _scaled(before, layers, spans))
                for end in _end_ids(lm):
                    steered[end] = -torch.inf
                if raw[int(steered.argmax())] >= bar:
                    chosen = int(steered.argmax())
                    break
        token_ids.append(chosen)
        token = chosen
    return token_ids, time.perf_counter() - start


def _end_ids(lm: LM) -> list[int]:
    ends = lm.model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _step(lm: LM, token: int, cache: Any) -> Tensor:
    return _pass(lm, [token], cache)[0, -1].float()


def _pass(lm: LM, ids: Sequence[int], cache: Any) -> Tensor:
    """The logits `[1, tokens, vocabulary]` of these tokens, which are added to the cache."""
    inputs = compat.with_cache(lm.model, {"input_ids": torch.tensor([list(ids)], device=lm.model.device)}, cache)
    return lm.model(**inputs, use_cache=True).logits


def _scaled(cache: Any, layers: Sequence[int], spans: Sequence[tuple[int, int]]) -> Any:
    scaled = copy.deepcopy(cache)
    for layer in layers:
        for start, stop in spans:
            scaled.layers[layer].keys[:, :, start:stop] *= ALPHA
    return scaled


def _rank(lm: LM, token: int, before: Any, spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    layers = list(range(lm.layout.layers))
    seen: list[list[tuple[Tensor, Tensor]]] = []
    modules = [module for module in attention_modules(lm.layout) if module is not None]

    def note(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen[-1].append((entered[0, -1].clone(), output[0][0, -1].clone()))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        for chosen in ((), *((layer,) for layer in layers)):
            seen.append([])
            _step(lm, token, _scaled(before, chosen, spans))
    finally:
        for handle in handles:
            handle.remove()
    columns = []
    for j in layers:
        pre, post = (torch.stack([pair[j][side] for pair in seen]) for side in (0, 1))
        columns.append(disturbance(pre, post))
    crossed = torch.stack([column for column, _ in columns], 1)
    return order_layers(sensitivity(crossed, torch.stack([raw for _, raw in columns]), "paper"), layers)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise TrimtabError(f"there is no file {path}; name the folder of data sets with --data")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
