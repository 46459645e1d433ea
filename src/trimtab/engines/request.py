"""Requests to engines and their results: plain data, the same for every engine. Answers are in `answer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trimtab.decoding.grammar import Grammar
from trimtab.decoding.rejection import Rejection
from trimtab.engines.answer import Applied
from trimtab.engines.images import PromptImages
from trimtab.steering import Site, Steering
from trimtab.steering.monitors import Monitor


@dataclass(frozen=True)
class Request:
    """A rendered prompt to be answered, with its own steering, rejection, grammar and `images`."""

    ids: list[int]
    steering: Steering | None = None
    rejection: Rejection | None = None
    grammar: Grammar | None = None
    images: PromptImages | None = None


@dataclass(frozen=True)
class Decoding:
    """How all requests of one call are decoded.

    Args:
        max_new_tokens: Maximum tokens per answer.
        logprobs: Whether to return the log-probability of each token.
        seed: The seed for sampling; `None` draws one.
        batch_size: Requests that run together, if the engine leaves that to the caller.
        options: Further options, under their names in transformers' `generate`.
        progress: `progress(done, total)` is called as requests are answered.
        clean_cache: Whether the KV cache is the one that the unsteered model would write.
        monitors: Monitors that read each token while it is generated.
    """

    max_new_tokens: int = 128
    logprobs: bool = False
    seed: int | None = None
    batch_size: int | None = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Any = None
    clean_cache: bool = False
    monitors: tuple[Monitor, ...] = ()


@dataclass(frozen=True)
class Text:
    """Token ids, and the positions to read (each at least 0 and less than the number of ids).

    `images` are the ones whose placeholders are in the ids.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    images: PromptImages | None = None


@dataclass(frozen=True)
class Batch:
    """The activations of one batch of `read`.

    `values[site][g][m]` is `[positions, width]` for member m of `groups[g]`.
    """

    groups: list[int]
    values: dict[Site, list[list[Tensor]]]


@dataclass(frozen=True)
class Choice:
    """A text that is read to its end, and candidates for the next token.

    The first `prompt_length` ids are the prompt, which position rules refer to; the others are the first tokens of an
    answer. `candidates` are the ids whose probability is requested.
    """

    ids: Sequence[int]
    prompt_length: int
    candidates: Sequence[int]


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and its answer, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class NextToken:
    """The natural log-probability of each candidate, normalized over the whole vocabulary, and what steered it."""

    logprobs: tuple[float, ...]
    applied: Applied
