"""Continuous batching for `lm.generate`: rows leave the batch as they end, and the next prompts take their places.

In a batch that stays whole a row that has ended is computed until the last one ends. Here it isn't, and the cache is
written in place rather than copied at each token. Rows see other neighbours than in a whole batch, so a near-tie of
two tokens may fall the other way in float32, as it does between any two batch sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.clean import CleanBatch
from trimtab.engines.transformers.decode import GenerationRequest, check_steps
from trimtab.engines.transformers.generate import Applied, Generation, _end_ids
from trimtab.engines.transformers.grammar import Matcher
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.monitoring import Log
from trimtab.engines.transformers.sampling import Sampling, Settings, seed_of
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import UnsupportedError
from trimtab.steering import Steering
from trimtab.steering.monitors import FILTERED, Monitor

SETTINGS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "min_new_tokens",
    "eos_token_id",
)
"""The options of `generate` that say how tokens are chosen, and that batches of steps have as well."""
OTHERS = ("streamer", "num_return_sequences", "use_cache")
"""Further options that they have."""
REFILL = 4
"""New rows are read when a quarter of the batch is free, as reading one at a time would hold the others up."""


@dataclass(frozen=True)
class Continuous:
    """What is decoded by continuous batching, as options of `generate` have it.

    `each` counts the answers to a prompt; `streamer` is what transformers calls one, or `None`. With `stops` it is also
    asked after each token whether the answer ends there, as a stopping criterion is.
    """

    settings: Settings
    ends: frozenset[int]
    each: int
    streamer: Any
    stops: bool = False

    @classmethod
    def of(cls, model: Any, layout: Layout, options: Mapping[str, Any]) -> Continuous | None:
        """`None` where it can't be: for an option or a setting of the model that steps don't have, or its cache."""
        given = {name: value for name, value in options.items() if value is not None}
        stops = "streamer" in given and list(given.get("stopping_criteria", ())) == [given["streamer"]]
        if stops:
            del given["stopping_criteria"]
        if given.keys() - {*SETTINGS, *OTHERS} or given.get("use_cache") is False or not _steps(model, layout):
            return None
        each = given.get("num_return_sequences", 1)
        if each != 1 and not (options["do_sample"] and isinstance(each, int) and each > 0):
            return None  # an error, of which transformers speaks
        chosen = {name: options[name] for name in SETTINGS if name in options}
        if not compat.decodes_by_steps(model, chosen):
            return None
        settings = Settings.of(model, chosen, 1, input_device(model))
        if settings.others:
            return None
        return cls(settings, frozenset(_end_ids(model, given)), each, given.get("streamer"), stops)


def _steps(model: Any, layout: Layout) -> bool:
    try:
        check_steps(model, layout)
    except UnsupportedError:
        return False
    return True


@dataclass
class _Answer:
    prompt: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    applied: Applied | None = None
    log: Log = field(default_factory=Log)


def answer(
    model: Any,
    tokenizer: Any,
    layout: Layout,
    way: Continuous,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[Steering | None],
    matchers: Sequence[Matcher | None],
    places: Sequence[int],
    *,
    rows: int,
    max_new_tokens: int,
    logprobs: bool,
    seed: int | None,
    clean_cache: bool = False,
    monitors: tuple[Monitor, ...] = (),
    progress: Callable[[int], None],
) -> list[Generation]:
    """Answers to rendered prompts, each under its own steering and grammar, in the prompts' order: `way.each` to each.

    Args:
        model: The model, `tokenizer` and `layout` with it.
        way: How tokens are chosen.
        prompts: Token ids. They are begun in this order.
        steerings: One for each prompt.
        matchers: Each prompt's, at the beginning of the grammar that its answers keep to; `None` for any text.
        places: Which prompts of the caller's they are: with the `seed`, it says what an answer's random numbers are.
        rows: How many prompts are answered at a time, at most.
        max_new_tokens: Tokens of an answer at most.
        logprobs: Whether answers have log-probabilities.
        seed: For repeatable samples; `None` takes one from torch's random numbers.
        clean_cache: Whether answers are steered over the cache of the unsteered model.
        monitors: What is read of each answer's tokens.
        progress: Told how many prompts are done, as they are.

    Raises:
        TrimtabError: A sampled row was steered to where the logits are no numbers any more.
    """
    batch = CleanBatch(model, tokenizer, layout, strict=False, ends=way.ends)
    if way.settings.sampled and seed is None:
        seed = int(torch.randint(2**62, ()))
    waiting = deque(range(len(prompts)))
    answers: list[list[_Answer]] = [[] for _ in prompts]
    running: dict[int, _Answer] = {}
    left = [way.each] * len(prompts)
    most = rows * way.each
    if way.streamer is not None:
        way.streamer.put(torch.tensor([list(prompts[0])]))
    while waiting or running:
        if not running or most - len(running) >= max(1, most // REFILL):
            while waiting and len(running) + way.each <= most:
                prompt = waiting.popleft()
                for n in range(way.each):
                    sampling = Sampling(seed=None if seed is None else seed_of(seed, places[prompt] * way.each + n))
                    request = GenerationRequest(
                        tuple(prompts[prompt]),
                        steerings[prompt],
                        max_new_tokens,
                        sampling,
                        0 if logprobs else None,
                        way.settings,
                        matcher=matchers[prompt],
                        clean_cache=clean_cache,
                        monitors=monitors,
                    )
                    one = _Answer(prompt)
                    answers[prompt].append(one)
                    running[batch.insert(request)] = one
        before = left.count(0)
        for told in batch.step():
            if told.error is not None:
                raise told.error
            one = running[told.key]
            if monitors:
                one.log.add(monitors, told.monitored)
            if told.finish != FILTERED:  # else the token wasn't chosen
                one.tokens.append(told.token)
            if told.logprob is not None:
                one.logprobs.append(told.logprob)
            if way.streamer is not None and told.finish != FILTERED:
                way.streamer.put(torch.tensor([told.token]))
            finish, applied = told.finish, told.applied
            if finish is None and way.stops and way.streamer(torch.tensor([[*prompts[0], *one.tokens]]), ()).all():
                finish, applied = "length", batch.remove(told.key)
            if finish is not None:
                one.finish, one.applied = finish, applied
                left[one.prompt] -= 1
                del running[told.key]
        if left.count(0) > before:
            progress(left.count(0))
    if way.streamer is not None:
        way.streamer.end()
    return [
        Generation(
            text=tokenizer.decode(one.tokens, skip_special_tokens=True),
            token_ids=tuple(one.tokens),
            finish_reason=one.finish,
            prompt_tokens=len(prompts[one.prompt]),
            applied=one.applied or Applied((), ()),
            logprobs=tuple(one.logprobs) if logprobs else None,
            monitors=one.log.told(monitors) if monitors else None,
        )
        for of_prompt in answers
        for one in of_prompt
    ]
