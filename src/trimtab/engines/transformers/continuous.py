"""Continuous batching for `lm.generate`: finished rows leave the batch, and the next prompts take their places.

With static batching, finished rows are computed until the last one ends. Here they aren't, and the cache is written in
place rather than copied for each token. The batch size differs from static batching, so in float32 a near-tie of two
tokens may be decided differently, as between any two batch sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.decoding.rejection import Rejection
from trimtab.decoding.trace import Trace
from trimtab.engines.answer import Applied, Generation
from trimtab.engines.images import PromptImages
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.batch_row import GenerationRequest
from trimtab.engines.transformers.clean import CleanBatch
from trimtab.engines.transformers.decode import check_continuous_batching
from trimtab.engines.transformers.generate import _end_ids
from trimtab.engines.transformers.grammar import Matcher
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.monitoring import MonitorLog
from trimtab.engines.transformers.sampling import Sampling, Settings, seed_of
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
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
"""The options of `generate` for choosing tokens that continuous batching applies to all rows at once."""
OTHERS = ("streamer", "num_return_sequences", "use_cache", "stop_strings", "tokenizer")
"""Further options that it supports."""
ROW_BY_ROW = (*compat.PROCESSING, "stopping_criteria", "max_time")
"""Arguments of `generate` that are supported only with rejection, where they are applied row by row."""
REFUSED = {
    "num_beams": "beam search keeps a cache per beam; decode greedily or sample",
    "prompt_lookup_num_tokens": "drafts aren't checked for plausibility",
    "penalty_alpha": "contrastive search selects tokens by its own rule",
    "dola_layers": "it selects tokens by its own rule",
    "cache_implementation": "rejection needs the default cache",
    **dict.fromkeys(compat.CACHE_NAMES, "each row needs its own cache"),
    "use_cache": "rejection needs the cache",
    "custom_generate": "rejection has its own decoding loop",
    "prefill_chunk_size": "the last prompt token needs a separate, complete pass",
    "synced_gpus": "rejection has its own decoding loop",
}
"""Options of `generate` that can't be combined with rejection, and why."""
REFILL = 4
"""New prompts are read once a quarter of the batch is free, since reading them one by one would delay other rows."""


def check_rejection_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raises `TrimtabError` for options of `generate` that can't be combined with rejection."""
    for name, value in options.items():
        if (
            value is None
            or name in ({*OTHERS} - {"use_cache"} | {*ROW_BY_ROW})
            or (name == "use_cache" and value is True)
        ):
            continue
        if name in REFUSED and value != 1:
            raise TrimtabError(f"rejection can't run with {name}: {REFUSED[name]}")
        if name not in REFUSED and not hasattr(model.generation_config, name):
            raise UnsupportedError(f"rejection can't run with {name}, which its decoding loop doesn't support")
    if not options.get("do_sample"):
        check_answer_count(options)


def check_answer_count(options: Mapping[str, Any]) -> None:
    """Raises `TrimtabError` if the options ask for several greedy answers per prompt."""
    if options.get("num_return_sequences") not in (None, 1):
        raise TrimtabError(
            "greedy answers to one prompt are all the same; sample (do_sample=True), or leave num_return_sequences out"
        )


@dataclass(frozen=True)
class BatchingSettings:
    """The settings of a run with continuous batching, derived from options of `generate`.

    `answers_per_prompt` is the number of answers per prompt; `streamer` is a transformers streamer, or `None`.
    `stop_strings` end answers, with the finish reason `"stop"`. `criteria` are stopping criteria, called after each
    token with the prompt and the answer's tokens; an answer that they end has the finish reason `"length"`. With
    `single_row`, rows run one at a time.
    """

    settings: Settings
    ends: frozenset[int]
    answers_per_prompt: int
    streamer: Any
    stop_strings: compat.StopStrings | None = None
    criteria: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    single_row: bool = False

    @classmethod
    def of(cls, model: Any, tokenizer: Any, layout: Layout, options: Mapping[str, Any]) -> BatchingSettings | None:
        """The settings for these options; `None` if an option, a setting or the cache of the model isn't supported."""
        set_options = {name: value for name, value in options.items() if value is not None}
        criteria: tuple[Any, ...] = ()
        if "streamer" in set_options and list(set_options.get("stopping_criteria", ())) == [set_options["streamer"]]:
            criteria = tuple(set_options.pop("stopping_criteria"))
        if (
            set_options.keys() - {*SETTINGS, *OTHERS}
            or set_options.get("use_cache") is False
            or not _steps(model, layout)
        ):
            return None
        each = set_options.get("num_return_sequences", 1)
        if each != 1 and not (options["do_sample"] and isinstance(each, int) and each > 0):
            return None  # transformers raises the error
        chosen = {name: options[name] for name in SETTINGS if name in options}
        if not compat.decodes_by_steps(model, chosen):
            return None
        settings = Settings.of(model, chosen, 1, input_device(model))
        if settings.fallback_processors:
            return None
        return cls(
            settings,
            frozenset(_end_ids(model, set_options)),
            each,
            set_options.get("streamer"),
            _stop_strings(tokenizer, set_options),
            criteria,
        )

    @classmethod
    def for_rejection(cls, model: Any, tokenizer: Any, layout: Layout, options: Mapping[str, Any]) -> BatchingSettings:
        """The settings for requests with rejection, for any options that pass `check_rejection_options`."""
        set_options = {name: value for name, value in options.items() if value is not None}
        without = {*OTHERS, *ROW_BY_ROW} - {*compat.PROCESSING}
        chosen = {name: value for name, value in options.items() if name not in without}
        return cls(
            Settings.of(model, chosen, 1, input_device(model)),
            frozenset(_end_ids(model, set_options)),
            set_options.get("num_return_sequences", 1),
            set_options.get("streamer"),
            _stop_strings(tokenizer, set_options),
            tuple(compat.stopping_criteria(set_options)),
            options=chosen,
            single_row=not _steps(model, layout),
        )

    def settings_for(self, model: Any, prompt: Sequence[int]) -> Settings:
        """The sampling settings for this prompt; unknown logits processors may depend on its length."""
        return (
            Settings.of(model, self.options, len(prompt), input_device(model))
            if self.settings.fallback_processors
            else self.settings
        )

    def ends_at(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether a stopping criterion ends the answer here."""
        if not self.criteria:
            return False
        ids = torch.tensor([[*prompt, *tokens]])
        ended = [bool(torch.as_tensor(criterion(ids, ())).all()) for criterion in self.criteria]
        return any(ended)  # all are called, since they may be stateful


def _stop_strings(tokenizer: Any, options: Mapping[str, Any]) -> compat.StopStrings | None:
    if "stop_strings" not in options:
        return None
    return compat.StopStrings(options.get("tokenizer", tokenizer), options["stop_strings"])


def _steps(model: Any, layout: Layout) -> bool:
    try:
        check_continuous_batching(model, layout)
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
    log: MonitorLog = field(default_factory=MonitorLog)
    trace: Trace | None = None


def generate_answers(
    model: Any,
    tokenizer: Any,
    layout: Layout,
    batching: BatchingSettings,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[Steering | None],
    rejections: Sequence[Rejection | None],
    matchers: Sequence[Matcher | None],
    images: Sequence[PromptImages | None],
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
    """Generate `batching.answers_per_prompt` answers to each rendered prompt, in prompt order.

    Each prompt has its own steering and grammar.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        layout: Its layout.
        batching: The settings of the run.
        prompts: Token ids. Prompts are started in this order.
        steerings: One for each prompt.
        rejections: One for each prompt; `None` without rejection.
        matchers: One for each prompt, in the start state of the grammar of its answers; `None` without a grammar.
        images: One for each prompt; `None` if it has no images.
        places: The index of each prompt in the caller's list. Together with `seed`, it determines an answer's random
            numbers.
        rows: The maximum number of prompts that are answered at a time.
        max_new_tokens: The maximum number of tokens per answer.
        logprobs: Whether to return log-probabilities.
        seed: For reproducible samples; `None` draws a seed from torch's random number generator.
        clean_cache: Whether to steer over a clean cache, with the keys and values of the unsteered model.
        monitors: The monitors that read each answer's tokens.
        progress: Called with the number of finished prompts.

    Raises:
        TrimtabError: The steered logits of a sampled row aren't finite.
    """
    batch = CleanBatch(model, tokenizer, layout, strict=False, ends=batching.ends, single_row=batching.single_row)
    if batching.settings.sampled and seed is None:
        seed = int(torch.randint(2**62, ()))
    pending = deque(range(len(prompts)))
    answers: list[list[_Answer]] = [[] for _ in prompts]
    running: dict[int, _Answer] = {}
    left = [batching.answers_per_prompt] * len(prompts)
    most = rows * batching.answers_per_prompt
    settings = {len(prompt): batching.settings_for(model, prompt) for prompt in prompts}
    if batching.streamer is not None:
        batching.streamer.put(torch.tensor([list(prompts[0])]))
    while pending or running:
        if not running or most - len(running) >= max(1, most // REFILL):
            while pending and len(running) + batching.answers_per_prompt <= most:
                prompt = pending.popleft()
                for n in range(batching.answers_per_prompt):
                    sampling = Sampling(
                        seed=None if seed is None else seed_of(seed, places[prompt] * batching.answers_per_prompt + n)
                    )
                    request = GenerationRequest(
                        tuple(prompts[prompt]),
                        steerings[prompt],
                        max_new_tokens,
                        sampling,
                        0 if logprobs else None,
                        settings[len(prompts[prompt])],
                        rejections[prompt],
                        matcher=matchers[prompt],
                        clean_cache=clean_cache and rejections[prompt] is None,  # with rejection it is clean anyway
                        monitors=monitors,
                        images=images[prompt],
                    )
                    begun = _Answer(prompt)
                    answers[prompt].append(begun)
                    running[batch.insert(request)] = begun
        before = left.count(0)
        responses = batch.step()
        for response in responses:
            if response.error is not None:
                raise response.error
            current = running[response.key]
            if monitors:
                current.log.add(monitors, response.monitored)
            if response.finish != FILTERED:  # otherwise there is no token
                current.tokens.append(response.token)
            if response.logprob is not None:
                current.logprobs.append(response.logprob)
            if batching.streamer is not None and response.finish != FILTERED:
                batching.streamer.put(torch.tensor([response.token]))
        texts = [(prompts[current.prompt], current.tokens) for current in (running[each.key] for each in responses)]
        stopped = [False] * len(texts) if batching.stop_strings is None else batching.stop_strings.ended(texts)
        for response, text, stops in zip(responses, texts, stopped, strict=True):
            current = running[response.key]
            finish, applied, trace = response.finish, response.applied, response.trace
            ended = batching.ends_at(*text)
            if finish is None and (stops or ended):
                finish, trace = "stop" if stops else "length", batch.trace(response.key)
                applied = batch.remove(response.key)
            if finish is not None:
                current.finish, current.applied, current.trace = finish, applied, trace
                left[current.prompt] -= 1
                del running[response.key]
        if left.count(0) > before:
            progress(left.count(0))
    if batching.streamer is not None:
        batching.streamer.end()
    return [
        Generation(
            text=tokenizer.decode(each.tokens, skip_special_tokens=True),
            token_ids=tuple(each.tokens),
            finish_reason=each.finish,
            prompt_tokens=len(prompts[each.prompt]),
            applied=each.applied or Applied((), ()),
            logprobs=tuple(each.logprobs) if logprobs else None,
            trace=each.trace,
            monitors=each.log.readings(monitors) if monitors else None,
        )
        for of_prompt in answers
        for each in of_prompt
    ]
