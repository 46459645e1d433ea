"""What users give `generate` and its like: one for all prompts, or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from trimtab.decoding.grammar import Grammar, json_grammar
from trimtab.decoding.rejection import Rejection
from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.steering.steering import check_steering
from trimtab.text.chat import Prompt
from trimtab.text.spans import Emphasis


def marks_for(emphasize: Any, count: int) -> list[Any]:
    """What to emphasize in each prompt, `None` where nothing."""
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
    """Each prompt's rejection: as given, or by default where something is emphasized."""
    if rejection is None:
        return [Rejection() if mark is not None else None for mark in marks]
    if isinstance(rejection, bool):
        return [Rejection() if rejection else None for _ in marks]
    if isinstance(rejection, Rejection):
        return [rejection] * len(marks)
    if not isinstance(rejection, (list, tuple)):
        raise TrimtabError(f"rejection is a Rejection, True or False, got {rejection!r}")
    if len(rejection) != len(marks):
        raise TrimtabError(f"{len(rejection)} rejections for {len(marks)} prompts; give one, or one for each")
    return list(rejection)


def grammars_for(json_schema: Any, count: int) -> list[Grammar | None]:
    """The grammar of each prompt's answers: by one schema for all, or one for each. Raises as `json_grammar` does."""
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
    """Raises `TrimtabError` for what isn't a number of prompts."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise TrimtabError(f"batch_size is a whole number from 1 up, got {size!r}")


def of_equal_length(batch: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """A batch's prompts in batches that need no pads, in order; `lengths` are those of all prompts, in tokens."""
    by_length: dict[int, list[int]] = {}
    for i in batch:
        by_length.setdefault(lengths[i], []).append(i)
    return list(by_length.values())


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list; a list of messages is one prompt.

    Raises `TrimtabError` for an empty list, and for what is neither text nor messages.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Steering):
        raise TrimtabError("the prompts come first, and then the steering: lm.generate(prompts, steering)")
    if isinstance(prompts, Mapping):
        raise TrimtabError("a prompt is a text or a list of messages, got one message; put it in a list")
    if isinstance(prompts, (bytes, Tensor)) or not isinstance(prompts, Iterable):
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
    if isinstance(value, (int, Tensor)):
        return "tokens are generated from by model.generate inside lm.steered(…)"
    return "give a string, or {'role': …, 'content': …} in a list"


def one_each(
    steering: Steering | str | Sequence[Steering | str | None] | None, count: int, *, named: bool = False
) -> list[Any]:
    """One steering or `None` for all prompts, or one for each; where they have names (`named`), a name will do.

    Raises `TrimtabError` for another count, and for a name where there are none.
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
