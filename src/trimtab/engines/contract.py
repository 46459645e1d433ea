"""What every engine declares: the sizes of its model, and what it can't do; and the checks that follow from these.

An engine is a subclass of `LanguageModel`. Learning, tuning, evaluating and inspecting depend on nothing else of it, so
they run on every engine that supports what they need. An engine declares what it doesn't support before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab.engines.request import AnsweredPrompt, Choice, Text
from trimtab.errors import LengthError, TrimtabError, UnsupportedError

TOKENS_PER_BATCH = 4096
"""The default number of tokens that are read together."""
ENOUGH = 1024
"""About this many tokens keep a processor busy."""

FEATURES = {
    "emphasis": "emphasis, which steers attention scores",
    "rejection": "rejection of implausible tokens",
    "clean_cache": "steering over a clean cache",
    "monitors": "monitors during generation",
    "streaming": "streaming of answers",
    "steered": "lm.steered(…)",
    "training": "learning with gradients or from the weights",
    "modules": "learning that examines the model's modules",
    "perplexity": "perplexities",
    "logits": "probabilities of all tokens",
    "doses": "doses",
    "grammar": "answers that follow a JSON schema",
    "images": "images in prompts",
}
"""The features that not every engine supports, with the wording that errors use."""


def count_fitting(lengths: Sequence[int], budget: int) -> int:
    """The number of leading texts to read in one batch, padded to the longest: at least one, within the token budget.

    A batch of more than `ENOUGH` tokens, beyond which a larger batch is hardly faster, has at most 10 % padding on top
    of its real tokens.
    """
    longest = total = 0
    for rows, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        padded = longest * (rows + 1)
        if rows and (padded > budget or (padded > ENOUGH and padded > 1.1 * total)):
            return rows
    return len(lengths)


class Shape(Protocol):
    """The sizes of a model: its blocks, the width of its residual stream, its context length (`None`: no limit), and
    the number of query heads per layer (`None`: unknown, or not the same in all layers).
    """

    @property
    def layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def context(self) -> int | None: ...

    @property
    def heads(self) -> int | None: ...


@dataclass(frozen=True)
class Sizes:
    """A `Shape` that was read from a file or received from another process."""

    layers: int
    width: int
    context: int | None
    heads: int | None = None


def query_heads(layout: Shape) -> int:
    """The number of query heads per layer.

    Raises:
        UnsupportedError: There is no single number for all layers.
    """
    if layout.heads is None:
        raise UnsupportedError(
            "the number of attention heads per layer isn't known, or isn't the same in all layers, so activations can't"
            " be split into heads; steer the residual stream or neurons instead"
        )
    return layout.heads


def check_length(layout: Shape, length: int, what: str) -> None:
    """Raises `TrimtabError` for an empty text, or one that exceeds the model's context."""
    if length == 0:
        raise LengthError(f"{what} is empty: it has no tokens")
    if layout.context is not None and length > layout.context:
        raise LengthError(f"{what} has {length} tokens, the model's context is {layout.context}; shorten it")


def check_answers(layout: Shape, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raises `TrimtabError` if prompts of these lengths plus `max_new_tokens` don't fit the model's context."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise TrimtabError(f"max_new_tokens is a whole number from 1 up, got {max_new_tokens!r}")
    for i, length in enumerate(lengths):
        check_length(layout, length, f"prompt {i + 1}")
        if layout.context is not None and length + max_new_tokens > layout.context:
            raise LengthError(
                f"prompt {i + 1} has {length} tokens and {max_new_tokens} new ones are asked for, the model's context"
                f" holds {layout.context}; ask for at most {layout.context - length}"
            )


def check_texts(layout: Shape, groups: Sequence[Sequence[Text]]) -> None:
    """Raises `TrimtabError` for a text that is empty or too long, or that is to be read at a position outside it."""
    for g, group in enumerate(groups):
        for text in group:
            check_length(layout, len(text.ids), f"text {g + 1}")
            if not text.positions or not 0 <= min(text.positions) <= max(text.positions) < len(text.ids):
                raise TrimtabError(
                    f"text {g + 1}: positions {list(text.positions)} are empty or outside its {len(text.ids)} tokens"
                )


def check_answered_prompts(layout: Shape, texts: Sequence[AnsweredPrompt]) -> None:
    """Raise `TrimtabError`, naming the text, if one has no prompt or answer or is too long."""
    for i, text in enumerate(texts):
        if not text.prompt or not text.answer:
            raise TrimtabError(f"text {i + 1} has no {'answer' if text.prompt else 'prompt'} to read")
        check_length(layout, len(text.prompt) + len(text.answer), f"text {i + 1}")


def check_choices(layout: Shape, choices: Sequence[Choice]) -> None:
    """Raises `TrimtabError` for an empty or overlong text, a prompt that is longer than its text, or no candidates."""
    for i, choice in enumerate([choices] if isinstance(choices, str) else choices):
        if not isinstance(choice, Choice):
            raise TrimtabError(
                f"text {i + 1} is a {type(choice).__name__}, not a Choice (of trimtab.engines.request), which has token"
                " ids, the number of them that are the prompt, and the candidates' token ids"
            )
        check_length(layout, len(choice.ids), f"text {i + 1}")
        if not 0 < choice.prompt_length <= len(choice.ids):
            raise TrimtabError(
                f"text {i + 1}: the prompt's length is {choice.prompt_length}, and must be from 1 to the text's"
                f" {len(choice.ids)} tokens"
            )
        if not choice.candidates:
            raise TrimtabError(f"text {i + 1}: there are no candidates")
