"""What an engine is to whoever uses one: the verbs, the sizes of its model, and what it says that it can't do.

Learning, tuning, evaluating and inspecting know this and nothing else of an engine, so they run on every engine that
can do what they need. What one can't do it says before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab.engines.answer import Generation
from trimtab.engines.request import Batch, Choice, Decoding, Request, Text
from trimtab.errors import TrimtabError
from trimtab.steering import Site, Steering

TOKENS_PER_BATCH = 4096
"""Tokens that are read together unless a caller says otherwise."""
ENOUGH = 1024
"""So many tokens keep a processor busy."""

FEATURES = {
    "emphasis": "emphasis, which steers attention scores",
    "rejection": "rejection of implausible tokens",
    "clean_cache": "steering over a clean cache",
    "monitors": "monitors that read while it generates",
    "streaming": "streams of an answer's pieces",
    "steered": "lm.steered(…)",
    "training": "learning by gradients, or from the weights",
    "perplexity": "perplexities",
    "logits": "probabilities of all tokens",
    "doses": "doses",
    "grammar": "answers by a JSON schema",
    "images": "images in prompts",
}
"""What not every engine can do, and what it is called in errors."""


def fitting(lengths: Sequence[int], budget: int) -> int:
    """How many of these texts to read together, padded to the longest of them: at least one, and what fits the budget.

    Beyond `ENOUGH` tokens, where more of them at a time are hardly faster, no more than a tenth of them are pads.
    """
    longest = total = 0
    for rows, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        padded = longest * (rows + 1)
        if rows and (padded > budget or (padded > ENOUGH and padded > 1.1 * total)):
            return rows
    return len(lengths)


class Shape(Protocol):
    """The sizes of a model: how many blocks, how wide the residual stream, and how many tokens fit (`None`: any)."""

    @property
    def layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def context(self) -> int | None: ...


@dataclass(frozen=True)
class Sizes:
    """A `Shape` that was read from a file or asked of another process."""

    layers: int
    width: int
    context: int | None


class Engine(Protocol):
    """What runs a model. `LanguageModel` is one, and what users hold; its subclasses are the engines there are."""

    engine: str
    cannot: Mapping[str, str]
    """Which of `FEATURES` it hasn't, and why."""

    layout: Shape

    def supports(self, steering: Steering | None = None, *features: str) -> str | None:
        """Why this engine can't run a steering, or hasn't one of these `FEATURES`; `None` where it can."""

    def run(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Generation]]:
        """The answers to requests that were checked, in their order; each has as many as the options ask for."""

    def read(
        self,
        groups: Sequence[Sequence[Text]],
        sites: Sequence[Site],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        steering: Steering | None = None,
    ) -> Iterator[Batch]:
        """The activations of every text of every group at every site, batch by batch, in an order of its own."""


def check_length(layout: Shape, length: int, what: str) -> None:
    """Raises `TrimtabError` for an empty text or one that exceeds the model's context."""
    if length == 0:
        raise TrimtabError(f"{what} is empty: it has no tokens")
    if layout.context is not None and length > layout.context:
        raise TrimtabError(f"{what} has {length} tokens, the model's context is {layout.context}; shorten it")


def check_answers(layout: Shape, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raises `TrimtabError` for prompts of these lengths whose answers of so many tokens don't fit the context."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise TrimtabError(f"max_new_tokens is a whole number from 1 up, got {max_new_tokens!r}")
    for i, length in enumerate(lengths):
        check_length(layout, length, f"prompt {i + 1}")
        if layout.context is not None and length + max_new_tokens > layout.context:
            raise TrimtabError(
                f"prompt {i + 1} has {length} tokens and {max_new_tokens} new ones are asked for, the model's context"
                f" holds {layout.context}; ask for at most {layout.context - length}"
            )


def check_texts(layout: Shape, groups: Sequence[Sequence[Text]]) -> None:
    """Raises `TrimtabError` for a text that is empty or too long, or is read where it has no token."""
    for g, group in enumerate(groups):
        for text in group:
            check_length(layout, len(text.ids), f"text {g + 1}")
            if not text.positions or not 0 <= min(text.positions) <= max(text.positions) < len(text.ids):
                raise TrimtabError(
                    f"text {g + 1}: positions {list(text.positions)} of a text of {len(text.ids)} tokens"
                )


def check_choices(layout: Shape, choices: Sequence[Choice]) -> None:
    """Raises `TrimtabError` for a text that is empty or too long, a prompt longer than it, or no candidates."""
    for i, choice in enumerate([choices] if isinstance(choices, str) else choices):
        if not isinstance(choice, Choice):
            raise TrimtabError(
                f"text {i + 1} is a {type(choice).__name__}, not a Choice (of trimtab.engines.request): its token ids,"
                " how many of them are the prompt, and the candidates' token ids"
            )
        check_length(layout, len(choice.ids), f"text {i + 1}")
        if not 0 < choice.prompt_length <= len(choice.ids):
            raise TrimtabError(f"text {i + 1}: a prompt of {choice.prompt_length} tokens in {len(choice.ids)}")
        if not choice.candidates:
            raise TrimtabError(f"text {i + 1}: no token is asked for")
