"""Answers that keep to a grammar: which tokens may come next, as a mask over the logits of a batch.

Each constrained row has a matcher, on the host, which knows how far its answer has come. Before a step's tokens are
chosen the matchers of all rows write their masks into one buffer of bits, which goes to the device in one copy and is
unpacked there: a forbidden token has a logit of minus infinity, whatever steered it, and the host waits for nothing.
The tokens that were chosen come to the matchers with the step's one wait.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.grammar import Grammar, limits, load_llguidance
from trimtab.engines.transformers.compat import LogitsProcessor
from trimtab.errors import TrimtabError, UnsupportedError

REFUSED = {
    "num_beams": "beams change places; decode greedily or sample",
    "min_new_tokens": "the grammar says where an answer ends",
    "prompt_lookup_num_tokens": "drafts aren't checked against the grammar",
}
"""Options of `generate` that grammars can't run with, and why."""
STUCK = (
    "the answer can't keep to its grammar here: no token that it allows is left by the other settings, the logits are"
    " no numbers any more, or the grammar is too complex"
)
KEPT = 64
"""So many compiled grammars are kept, those that were used last."""


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, state: Any, vocabulary: int) -> None:
        self._state = state
        self._over = False
        self.words: int = (vocabulary + 31) // 32  # of 32 bits each, in a mask

    def copy(self) -> Matcher:
        """Another one, as far as this."""
        copied = copy(self)
        copied._state = self._state.deep_copy()
        return copied

    @property
    def done(self) -> bool:
        """Whether nothing can follow any more but an end."""
        return self._over or (self._state.is_stopped() and not self._state.is_error())

    def take(self, token: int) -> None:
        """The answer's next token. What comes after its end is left alone.

        Raises `TrimtabError` for one that the grammar forbids, or where the grammar is too complex to go on.
        """
        if self._over:
            return
        if self._state.is_stopped() and not self._state.is_error():
            self._over = True
        elif not self._state.consume_token(token):
            raise TrimtabError(f"{STUCK} ({' '.join(self._state.get_error().split())[:200]})")


class Grammars:
    """Compiles grammars for one model; from any thread.

    Args:
        tokenizer: The model's; a fast one.
        size: How many logits the model gives.
        ends: The tokens that end an answer.

    Raises:
        UnsupportedError: A tokenizer whose tokens aren't known as bytes, or a model without a token that ends answers.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Collection[int]) -> None:
        load_llguidance()
        from llguidance import hf

        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError("a grammar needs to know the bytes of each token; load the tokenizer's fast version")
        stops = sorted(ends) or [tokenizer.eos_token_id]
        if stops[0] is None:
            raise UnsupportedError("a grammar needs a token that ends an answer, and this model has none")
        self.ends: frozenset[int] = frozenset(stops)
        try:
            self._size = max(size, len(tokenizer), max(stops) + 1)
            self._tokenizer = hf.from_tokenizer(tokenizer, n_vocab=self._size, eos_token=stops)
        except ValueError as error:
            raise UnsupportedError(f"no grammar can be had with this tokenizer: {error}") from None
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Matcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an answer. Raises `TrimtabError` for a grammar that doesn't compile."""
        with self._lock:
            if (known := self._known.get(grammar.text)) is not None:
                self._known.move_to_end(grammar.text)
                return known.copy()
        state = load_llguidance().LLMatcher(self._tokenizer, grammar.text, log_level=0, limits=limits())
        if state.is_error():
            raise TrimtabError(f"the grammar can't be used: {' '.join(state.get_error().split())[:300]}")
        with self._lock:
            self._known[grammar.text] = Matcher(state, self._size)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return self._known[grammar.text].copy()


class Masks:
    """The masks of these rows, for as long as the batch stays the same; `None` for a row that may say anything.

    Args:
        matchers: Each row's. Whoever chooses the tokens lets them know.
        size: How many logits there are.
        device: Where the logits are.
    """

    def __init__(self, matchers: Sequence[Matcher | None], size: int, device: torch.device) -> None:
        chosen = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
        self._matchers = [matcher for _, matcher in chosen]
        self._places = {row: place for place, (row, _) in enumerate(chosen)}
        self._every = tuple(range(len(matchers)))
        self._size, self._device = size, device
        words = max(matcher.words for _, matcher in chosen)
        pinned = device.type == "cuda" and torch.cuda.is_available()
        self._bits = torch.zeros(len(chosen), words, dtype=torch.int32, pin_memory=pinned)
        self._shifts = torch.arange(32, dtype=torch.int32, device=device)
        self._executor = load_llguidance().LLExecutor() if len(chosen) > 1 else None
        self._forbidden: Tensor | None = None  # at the token at hand
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor] | None] = {}

    def apply(self, scores: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """Scores with minus infinity where a token is forbidden; the given ones stay as they are.

        Args:
            scores: `[rows, vocabulary]`.
            rows: Which rows of the batch they are of, perhaps several times; `None` is the batch as it is.
        """
        rows = self._every if rows is None else rows
        chosen = self._chosen(rows)
        if chosen is None:
            return scores
        if self._forbidden is None:
            self._forbidden = self._computed()
        index, places = chosen
        if rows == self._every and len(self._places) == len(rows):
            return scores.masked_fill(self._forbidden, -torch.inf)
        masked = scores.index_select(0, index).masked_fill(self._forbidden.index_select(0, places), -torch.inf)
        return scores.index_copy(0, index, masked)

    def advance(self) -> None:
        """The token at hand is chosen: what comes is masked anew."""
        self._forbidden = None

    def _computed(self) -> Tensor:
        """`[constrained rows, vocabulary]`: what mustn't come. A row whose answer is over may say anything."""
        going = [(place, matcher) for place, matcher in enumerate(self._matchers) if not matcher._over]
        if len(going) < len(self._matchers):
            self._bits.fill_(-1)
        width = self._bits.shape[1] * 4
        if self._executor is not None and len(going) > 1:
            pairs = [(matcher._state, place) for place, matcher in going]
            self._executor.unsafe_compute_mask_ptr(pairs, self._bits.data_ptr(), width, len(self._bits))
        else:
            for place, matcher in going:
                matcher._state.unsafe_compute_mask_ptr(self._bits.data_ptr() + place * width, width)
        bits = self._bits.to(self._device, non_blocking=True)
        return ((bits[:, :, None] >> self._shifts) & 1 == 0).flatten(1)[:, : self._size]

    def _chosen(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Which of these rows are constrained, and where their masks are; `None` where none is."""
        if rows not in self._known:
            chosen = [(i, self._places[row]) for i, row in enumerate(rows) if row in self._places]
            if len(self._known) >= KEPT:
                self._known.clear()
            both = [torch.tensor(indices, device=self._device) for indices in zip(*chosen, strict=True)]
            self._known[rows] = (both[0], both[1]) if both else None
        return self._known[rows]


class GrammarProcessor(LogitsProcessor):
    """The masks as a processor of logits, for loops that are transformers' own or stand in its `generate`.

    `matchers` are those of the prompts; each has as many rows as there are answers to a prompt. It may be asked several
    times before the same token.
    """

    def __init__(self, matchers: Sequence[Matcher | None]) -> None:
        self._prompts = list(matchers)
        self._rows: list[Matcher | None] = []
        self._masks: Masks | None = None
        self._read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[rows, vocabulary]`, masked."""
        if self._masks is None:
            each = len(input_ids) // len(self._prompts)
            self._rows = [matcher and matcher.copy() for matcher in self._prompts for _ in range(each)]
            self._masks = Masks(self._rows, scores.shape[-1], scores.device)
            self._read = input_ids.shape[1]
        if input_ids.shape[1] > self._read:
            for row, tokens in zip(self._rows, input_ids[:, self._read :].tolist(), strict=True):
                for token in tokens if row is not None else ():
                    row.take(token)  # type: ignore[union-attr]
            self._read = input_ids.shape[1]
            self._masks.advance()
        masked = self._masks.apply(scores)
        going = [i for i, row in enumerate(self._rows) if row is not None and not row.done]
        if not masked[going].isfinite().any(-1).all():  # the loop would take some token all the same
            raise TrimtabError(STUCK)
        return masked


def check_grammar_options(options: Mapping[str, Any]) -> None:
    """Raises `TrimtabError` for options of `generate` that a grammar can't run with."""
    for name, why in REFUSED.items():
        if options.get(name) not in (None, 0, 1):
            raise TrimtabError(f"answers by a JSON schema can't run with {name}: {why}")


def with_grammars(options: Mapping[str, Any], matchers: Sequence[Matcher | None]) -> dict[str, Any]:
    """Options of `generate` by which the answers to these prompts keep to their grammars."""
    if not any(matchers):
        return dict(options)
    return {**options, "logits_processor": [*(options.get("logits_processor") or ()), GrammarProcessor(matchers)]}
