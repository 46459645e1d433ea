"""What engines are asked, and what comes back: plain data, the same for every engine. Answers are in `answer`."""

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
    """A rendered prompt that is to be answered, under its own steering, rejection and grammar; `images` are its own."""

    ids: list[int]
    steering: Steering | None = None
    rejection: Rejection | None = None
    grammar: Grammar | None = None
    images: PromptImages | None = None


@dataclass(frozen=True)
class Decoding:
    """How all requests of one call are decoded.

    Args:
        max_new_tokens: Tokens of an answer at most.
        logprobs: Whether the log-probability of each token is wanted.
        seed: Of sampled answers; `None` draws one.
        batch_size: Requests that run together, where the engine leaves that to its caller.
        options: Under transformers' names for them, those of `generate`.
        progress: Called with how many requests are done, and of how many.
        clean_cache: Whether what is stored of the texts is what the unsteered model would store.
        monitors: What is read of each token while it is generated.
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
    """Token ids, and the positions at which to read (each at least 0 and below the number of ids).

    `images` are those whose places the ids hold.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    images: PromptImages | None = None


@dataclass(frozen=True)
class Batch:
    """What one batch of a reading gave: `values[site][g][m]` is `[positions, width]` for member m of `groups[g]`."""

    groups: list[int]
    values: dict[Site, list[list[Tensor]]]


@dataclass(frozen=True)
class Choice:
    """A text to read to its end, and the tokens that may come next.

    The prompt is the first `prompt_length` ids, which is what position rules count from; what follows are the first
    tokens of an answer. `candidates` are the ids whose probability is requested.
    """

    ids: Sequence[int]
    prompt_length: int
    candidates: Sequence[int]


@dataclass(frozen=True)
class NextToken:
    """The natural log-probability of each candidate, over the whole vocabulary, and what steered it."""

    logprobs: tuple[float, ...]
    applied: Applied
