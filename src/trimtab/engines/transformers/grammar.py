"""Grammar-constrained decoding: masks over a batch's logits that allow only tokens that the grammar permits.

Each constrained row has a matcher on the host that tracks its position in the grammar. Before each step's tokens are
chosen, the matchers of all rows write their masks into one bit buffer, which is copied to the device once and
unpacked there. Forbidden tokens get a logit of minus infinity, regardless of steering. Masking needs no device
synchronization; the matchers receive the chosen tokens at the step's single one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.grammar import Grammar, load_llguidance, parser_limits
from trimtab.engines.transformers.compat import LogitsProcessor
from trimtab.errors import TrimtabError, UnsupportedError

REFUSED = {
    "num_beams": "beam search reorders its rows; decode greedily or sample",
    "min_new_tokens": "the grammar decides where an answer ends",
    "prompt_lookup_num_tokens": "draft tokens aren't checked against the grammar",
}
"""Options of `generate` that can't be combined with a grammar, and why."""
STUCK = (
    "the answer can't follow its grammar any further: the other settings exclude every token that it allows, the"
    " logits are NaN or infinite, or the grammar is too complex"
)
KEPT = 64
"""The number of most recently used compiled grammars to keep."""


class Matcher:
    """One answer's position in its grammar."""

    def __init__(self, state: Any, vocabulary: int) -> None:
        self._state = state
        self._over = False
        self.words: int = (vocabulary + 31) // 32  # 32-bit words in a mask

    def copy(self) -> Matcher:
        """An independent copy at the same position."""
        copied = copy(self)
        copied._state = self._state.deep_copy()
        return copied

    @property
    def done(self) -> bool:
        """Whether only an end token can follow."""
        return self._over or (self._state.is_stopped() and not self._state.is_error())

    def consume(self, token: int) -> None:
        """Advance by the answer's next token. Tokens after the end are ignored.

        Raises:
            TrimtabError: The grammar forbids the token, or is too complex to continue.
        """
        if self._over:
            return
        if self._state.is_stopped() and not self._state.is_error():
            self._over = True
        elif not self._state.consume_token(token):
            raise TrimtabError(f"{STUCK} ({' '.join(self._state.get_error().split())[:200]})")


class GrammarCompiler:
    """A thread-safe compiler of grammars for one model.

    Args:
        tokenizer: The model's tokenizer, which must be a fast one.
        size: The number of logits of the model.
        ends: The tokens that end an answer; if empty, the tokenizer's end-of-sequence token.

    Raises:
        UnsupportedError: The bytes of the tokenizer's tokens aren't known, or the model has no token that ends answers.
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
            raise UnsupportedError(f"this tokenizer can't be used with a grammar: {error}") from None
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Matcher] = OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of an answer. Raises `TrimtabError` if the grammar doesn't compile."""
        with self._lock:
            if (known := self._known.get(grammar.text)) is not None:
                self._known.move_to_end(grammar.text)
                return known.copy()
        state = load_llguidance().LLMatcher(self._tokenizer, grammar.text, log_level=0, limits=parser_limits())
        if state.is_error():
            raise TrimtabError(f"the grammar can't be used: {' '.join(state.get_error().split())[:300]}")
        with self._lock:
            self._known[grammar.text] = Matcher(state, self._size)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return self._known[grammar.text].copy()


class Masks:
    """The grammar masks of a batch whose rows don't change.

    Args:
        matchers: One for each row; `None` for an unconstrained row. The caller advances them with the chosen tokens.
        size: The number of logits.
        device: The device of the logits.
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
        self._forbidden: Tensor | None = None  # for the current token
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor] | None] = {}

    def apply(self, scores: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """The scores with minus infinity for forbidden tokens. `scores` itself isn't modified.

        Args:
            scores: `[rows, vocabulary]`.
            rows: The batch row of each row of `scores`; a batch row may occur more than once. `None`: `scores` has the
                rows of the batch in order.
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
        """Discard the masks after the current token was chosen; the next `apply` computes new ones."""
        self._forbidden = None

    def _computed(self) -> Tensor:
        """`[constrained rows, vocabulary]`: the forbidden tokens. None are forbidden once a row's answer has ended."""
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
        """The indices of the constrained ones among these rows, and of their masks; `None` if there are none."""
        if rows not in self._known:
            chosen = [(i, self._places[row]) for i, row in enumerate(rows) if row in self._places]
            if len(self._known) >= KEPT:
                self._known.clear()
            both = [torch.tensor(indices, device=self._device) for indices in zip(*chosen, strict=True)]
            self._known[rows] = (both[0], both[1]) if both else None
        return self._known[rows]


class GrammarProcessor(LogitsProcessor):
    """A logits processor that applies grammar masks, for decoding loops that run through transformers' `generate`.

    There is one of `matchers` for each prompt; each is copied for every answer to its prompt. The processor may be
    called several times before the same token.
    """

    def __init__(self, matchers: Sequence[Matcher | None]) -> None:
        self._prompt_matchers = list(matchers)
        self._rows: list[Matcher | None] = []
        self._masks: Masks | None = None
        self._read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The masked scores `[rows, vocabulary]`."""
        if self._masks is None:
            each = len(input_ids) // len(self._prompt_matchers)
            self._rows = [matcher and matcher.copy() for matcher in self._prompt_matchers for _ in range(each)]
            self._masks = Masks(self._rows, scores.shape[-1], scores.device)
            self._read = input_ids.shape[1]
        if input_ids.shape[1] > self._read:
            for row, tokens in zip(self._rows, input_ids[:, self._read :].tolist(), strict=True):
                for token in tokens if row is not None else ():
                    row.consume(token)  # type: ignore[union-attr]
            self._read = input_ids.shape[1]
            self._masks.advance()
        masked = self._masks.apply(scores)
        going = [i for i, row in enumerate(self._rows) if row is not None and not row.done]
        if not masked[going].isfinite().any(-1).all():  # or the loop would still pick a token
            raise TrimtabError(STUCK)
        return masked


def check_grammar_options(options: Mapping[str, Any]) -> None:
    """Raise `TrimtabError` for options of `generate` that can't be combined with a grammar."""
    for name, why in REFUSED.items():
        if options.get(name) not in (None, 0, 1):
            raise TrimtabError(f"answers that follow a JSON schema can't be generated with {name}: {why}")


def with_grammars(options: Mapping[str, Any], matchers: Sequence[Matcher | None]) -> dict[str, Any]:
    """The options of `generate`, with a logits processor that constrains these prompts' answers to their grammars."""
    if not any(matchers):
        return dict(options)
    return {**options, "logits_processor": [*(options.get("logits_processor") or ()), GrammarProcessor(matchers)]}
