"""The layer search of Stolfo et al. (2410.12877, appendix) as in their code, against `tune`, on the same prompts.

The reference generates one answer at a time, for one layer after the other, without a KV cache. `tune` runs all layers
and prompts as rows of the same batches, with a cache. Both search the same layers with the same directions and targets,
and must find the same accuracy at each. The reference's time is a sum over layers, so it may search only some of them:
the comparison is of tokens per second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, Result, Target
from benchmarks.machine import machine, versions
from trimtab.data import instruction_pairs, instruction_type, queries
from trimtab.evaluate.constraints import is_bullets
from trimtab.lm import LM
from trimtab.methods.instruct import learn_many, steering_from
from trimtab.steering import SetProjection
from trimtab.tune.candidates import Candidate, Setting, default_layers
from trimtab.tune.halving import Rung
from trimtab.tune.tune import tune

FASTER = Target(50)
EQUAL = Target(1)
KIND = "detectable_format:number_bullet_lists"
UNSTEERED = -1
BATCH = 96


def run(prompts: int, tokens: int, searched: int | None) -> Report:
    """Time and tokens per second of the search, each way; the reference searches `searched` of the layers (or all)."""
    lm = LM.load()
    layers = default_layers(lm.layout.layers)
    kind = instruction_type(KIND)
    pairs = instruction_pairs(queries("learn"), kind.phrasings("learn"))
    moments = learn_many(lm, {KIND: pairs}, layers)[KIND]
    prompt_list = [f"{query} {kind.phrasings('test')[0]}" for query in queries("tune")[:prompts]]
    candidates = []
    for layer in layers:
        steering = steering_from(moments, layer)
        candidates.append(Candidate(Setting(layer, 1.0, str(steering.edits[0].positions), "project"), steering))
    lm.generate(prompt_list[0], max_new_tokens=2)  # a warm-up

    started = time.perf_counter()
    some = [None, *candidates] if searched is None else spread(candidates, searched)
    expected, generated = reference_search(lm, prompt_list, some, tokens)
    reference = generated / (time.perf_counter() - started)

    options: dict[str, Any] = {"max_new_tokens": tokens, "held_out": 0.0, "batch_size": BATCH}
    started = time.perf_counter()
    whole = tune(lm, candidates, prompt_list, complies, rungs=[Rung(prompts, len(candidates))], guard=None, **options)
    seconds = time.perf_counter() - started
    scores = {UNSTEERED if row.setting is None else row.setting.layer: row.score for row in whole.table}
    equal = sum(abs(scores[layer] - expected[layer]) < 1e-9 for layer in expected) / len(expected)

    started = time.perf_counter()
    tune(lm, candidates, prompt_list, complies, **options)
    shipped = time.perf_counter() - started
    speed = whole.tokens / seconds
    case = f"{len(layers)} layers and none, {prompts} prompts, {tokens} tokens"
    return Report(
        "instruct",
        machine(),
        versions(),
        (
            Result(case, f"as the reference, {len(some)} of them", generated / reference, "s"),
            Result(case, "as the reference, speed", reference, "tokens/s"),
            Result(case, "tune, every layer on every prompt", seconds, "s"),
            Result(case, "tune, every layer on every prompt, speed", speed, "tokens/s"),
            Result(case, "tune / reference", speed / reference, "times the tokens a second", target=FASTER),
            Result(case, "layers at which both find the same accuracy", equal, "share", target=EQUAL),
            Result(case, "tune with halving and the quality guard", shipped, "s"),
        ),
    )


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """`count` of the candidates, evenly spaced."""
    return [candidates[round((i + 0.5) * len(candidates) / count - 0.5)] for i in range(count)]


def complies(_: int, answer: str, cut: bool) -> bool:
    return is_bullets(answer, cut=cut)


def reference_search(
    lm: LM, prompts: Sequence[str], candidates: Sequence[Candidate | None], tokens: int
) -> tuple[dict[int, float], int]:
    """The accuracy by layer, and the number of generated tokens: batch 1, no cache, one layer after the other."""
    accuracy, generated = {}, 0
    for candidate in candidates:
        passed = 0
        for prompt in prompts:
            ids = torch.tensor([lm.encode(prompt)], device=lm.model.device)
            with torch.no_grad(), clamped(lm, candidate):
                whole = lm.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    use_cache=False,
                    pad_token_id=lm.tokenizer.eos_token_id,
                )[0, ids.shape[1] :]
            generated += len(whole)
            text = lm.tokenizer.decode(whole, skip_special_tokens=True)
            passed += complies(0, text, int(whole[-1]) != lm.tokenizer.eos_token_id)
        accuracy[UNSTEERED if candidate is None else candidate.setting.layer] = passed / len(prompts)
    return accuracy, generated


@contextmanager
def clamped(lm: LM, candidate: Candidate | None) -> Iterator[None]:
    """A plain hook that sets the projection at every position but the first, as in the paper's code."""
    if candidate is None:
        yield
        return
    (edit,) = candidate.steering.edits
    operation = edit.operation
    assert isinstance(operation, SetProjection)
    direction = operation.direction.to(lm.model.device, lm.model.dtype)

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x: Tensor = output if isinstance(output, Tensor) else output[0]
        share = (operation.target - x[:, 1:] @ direction)[..., None] * direction
        new = torch.cat([x[:, :1], x[:, 1:] + share], 1)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = lm.layout.blocks[edit.site.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
