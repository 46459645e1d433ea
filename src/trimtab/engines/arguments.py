"""Validate the arguments of `generate` and similar methods, and expand them to one value per prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from trimtab.decoding.grammar import Grammar, json_grammar
from trimtab.decoding.rejection import Rejection
from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.steering.steering import check_steering
from trimtab.text.chat import Prompt
from trimtab.text.spans import Emphasis


def emphasis_for(emphasize: Any, count: int) -> list[Any]:
    """The phrases to emphasize in each prompt, or `None`."""
    if emphasize is None or isinstance(emphasize, Emphasis):
        return [emphasize] * count
    if not isinstance(emphasize, (list, tuple)):
        raise TrimtabError(f"emphasize takes a phrase of the prompt, got {type(emphasize).__name__}")
    if len(emphasize) != count:
        raise TrimtabError(
            f"{len(emphasize)} things to emphasize for {count} prompts; give one, or one for each (a list of phrases,"
            " or None for none)"
        )
    return list(emphasize)


def rejections_for(rejection: Any, marks: list[Any]) -> list[Rejection | None]:
    """Each prompt's rejection: the given one, or the default if the prompt has emphasis."""
    if rejection is None:
        return [Rejection() if mark is not None else None for mark in marks]
    if isinstance(rejection, bool):
        return [Rejection() if rejection else None for _ in marks]
    if isinstance(rejection, Rejection):
        return [rejection] * len(marks)
    if not isinstance(rejection, (list, tuple)):
        raise TrimtabError(f"rejection must be a Rejection, True or False, got {rejection!r}")
    if len(rejection) != len(marks):
        raise TrimtabError(f"{len(rejection)} rejections for {len(marks)} prompts; give one, or one for each")
    return [rejections_for(each, [mark])[0] for each, mark in zip(rejection, marks, strict=True)]


def grammars_for(json_schema: Any, count: int) -> list[Grammar | None]:
    """Each prompt's grammar, from one schema for all prompts or from one for each. Raises as `json_grammar` does."""
    if not isinstance(json_schema, (list, tuple)):
        return [_grammar(json_schema)] * count
    if len(json_schema) != count:
        raise TrimtabError(
            f"{len(json_schema)} JSON schemas for {count} prompts; give one, or one for each (None for any text)"
        )
    return [_grammar(schema, f"JSON schema {i}") for i, schema in enumerate(json_schema, 1)]


def _grammar(schema: Any, where: str = "the JSON schema") -> Grammar | None:
    return schema if schema is None or isinstance(schema, Grammar) else json_grammar(schema, where=where)


def check_batch_size(size: Any) -> None:
    """Raises `TrimtabError` if this isn't a number of prompts."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise TrimtabError(f"batch_size is a whole number from 1 up, got {size!r}")


SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h")
"""Options of `generate` that affect sampling, and have no effect in greedy decoding."""
SEEDS = range(-(2**63), 2**64)  # what torch accepts


def sampling_for(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with temperature 0 turned into greedy decoding.

    Raises `TrimtabError` for sampling options without `do_sample`: users of vLLM or OpenAI's API expect them to enable
    sampling, and here they would have no effect.
    """
    drawing = [name for name in SAMPLING_OPTIONS if options.get(name) is not None]
    temperature = options.get("temperature")
    if temperature is not None and temperature == 0:
        rest = {name: value for name, value in options.items() if name not in drawing}
        return {**rest, "do_sample": False}
    if options.get("penalty_alpha") is not None:  # contrastive search, where top_k isn't a sampling option
        drawing = [name for name in drawing if name != "top_k"]
    if drawing and options.get("do_sample") is None:
        name = drawing[0]
        raise TrimtabError(
            f"{name}={options[name]!r} is a sampling option, but decoding is greedy; add do_sample=True, or leave"
            f" {name} out"
        )
    return dict(options)


def seed_for(seed: Any) -> int | None:
    """The seed as an `int`. Raises `TrimtabError` unless it is a whole number of at most 64 bits."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise TrimtabError(f"a seed is a whole number of at most 64 bits, got {seed!r}")
    return int(seed)


def check_logprobs_and_system(logprobs: Any, system: Any) -> None:
    """Raises `TrimtabError` if `logprobs` isn't a boolean or `system` isn't a string."""
    if not isinstance(logprobs, bool):
        raise TrimtabError(
            f"logprobs is True or False, got {logprobs!r}; answers have the log-probabilities of their own tokens only,"
            " for those of other tokens use lm.next_logprobs"
        )
    if system is not None and not isinstance(system, str):
        raise TrimtabError(
            f"system is a single text for all prompts, got {system!r}; for one per prompt, give lists of messages"
        )


def split_by_length(batch: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """Split a batch of prompt indices by length, so that none needs padding; `lengths` are all prompts', in tokens."""
    by_length: dict[int, list[int]] = {}
    for i in batch:
        by_length.setdefault(lengths[i], []).append(i)
    return list(by_length.values())


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list; a list of messages is one prompt.

    Raises `TrimtabError` for an empty list, and for anything that is neither text nor messages.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Steering):
        raise TrimtabError("the prompts come first, and then the steering: lm.generate(prompts, steering)")
    if isinstance(prompts, Mapping) and "input_ids" not in prompts:
        raise TrimtabError("a prompt is a text or a list of messages, got one message; put it in a list")
    if hasattr(prompts, "columns"):
        named = ", ".join(repr(str(column)) for column in list(prompts.columns)[:4])
        raise TrimtabError(
            f"prompts are texts or lists of messages, got a {type(prompts).__name__}; give one of its columns: {named}"
        )
    if isinstance(prompts, (bytes, Tensor, Mapping, set, frozenset)) or not isinstance(prompts, Iterable):
        raise TrimtabError(f"prompts are texts or lists of messages, got {type(prompts).__name__}; {_fix(prompts)}")
    listed: list[Any] = list(prompts)
    if not listed:
        raise TrimtabError("there are no prompts")
    for i, prompt in enumerate(listed, 1):
        if not isinstance(prompt, (str, Mapping, list, tuple)):
            raise TrimtabError(
                f"prompt {i} is a text or a list of messages, got {type(prompt).__name__}; {_fix(prompt)}"
            )
    return [listed] if isinstance(listed[0], Mapping) else listed


def _fix(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return "sets have no order; give a list"
    if isinstance(value, (int, Tensor, Mapping)):
        return "for token ids, use model.generate inside lm.steered(…)"
    return "give a string, or {'role': …, 'content': …} in a list"


def steerings_for(
    steering: Steering | str | Sequence[Steering | str | None] | None, count: int, *, named: bool = False
) -> list[Any]:
    """Expand the steering argument to one per prompt: a steering or `None`; with `named`, also a registered name.

    Raises `TrimtabError` if the counts differ, and for a name without `named`.
    """
    if steering is None or isinstance(steering, Steering) or (named and isinstance(steering, str)):
        return [steering] * count
    if not isinstance(steering, (list, tuple)):
        check_steering(steering)
    if len(steering) != count:
        raise TrimtabError(f"{len(steering)} steerings for {count} prompts; give one, or one for each (None for none)")
    for each_steering in steering:
        if each_steering is not None and not (named and isinstance(each_steering, str)):
            check_steering(each_steering)
    return list(steering)
