"""Positions by meaning in a session: each row's text is tracked from pass to pass.

The host needs the token ids, so each pass has one host sync. Continuous batching (see `decode`) doesn't use this
module, since it knows its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from trimtab.engines.meanings import NOTHING, ActiveMeanings, Follower, FollowerState, meanings_of
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.plan import Plan
from trimtab.engines.transformers.positions import ForwardPass, count_steered, state_at, states_of, token_positions
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit
from trimtab.steering.meanings import Meaning


def check_rows_stay(model: Any, options: Mapping[str, Any]) -> None:
    """Raises `UnsupportedError` for options of `generate` that reorder rows, as beam search does."""
    if compat.generation_option(model, options, "num_beams") not in (None, 1):
        raise UnsupportedError(
            "positions by meaning can't run with num_beams: beam search reorders its rows, so trimtab can't follow each"
            " text; decode greedily or sample"
        )


@dataclass
class TrackedText:
    """One row's text. `ids` are its known tokens, and `followed` the state after each generated one."""

    tokenizer: Any
    meanings: frozenset[Meaning]
    prompt_length: int
    ids: list[int]
    followed: list[FollowerState] = field(default_factory=list)
    states: list[int] = field(default_factory=list)  # the session's state of each generated token
    _follower: Follower | None = None

    def advance(
        self, positions: Sequence[int], ids: Sequence[int], state_of: Callable[[int, ActiveMeanings], int]
    ) -> list[int]:
        """The states of a pass's tokens; negative positions are padding.

        A pass may start before the end of the known text; the rest is then discarded. Raises `TrimtabError` if tokens
        before a generated one haven't been seen, so that its meaning can't be determined.
        """
        states = []
        for position, token in zip(positions, ids, strict=True):
            if position < 0:
                states.append(0)
                continue
            generated = position - self.prompt_length
            if generated < 0:
                if position <= len(self.ids):
                    self.ids[position : position + 1] = [token]
                states.append(state_of(position, NOTHING))
                continue
            if position > len(self.ids) or generated > len(self.followed):
                raise TrimtabError(
                    f"positions {', '.join(sorted(m.kind for m in self.meanings))} depend on the whole text, and its"
                    f" tokens before position {position} weren't seen; start at its first token, with passes over token"
                    " ids"
                )
            del self.ids[position:], self.followed[generated:], self.states[generated:]
            if self._follower is None:
                self._follower = Follower(self.tokenizer, self.meanings, self.ids[: self.prompt_length])
            before = self.followed[-1] if self.followed else self._follower.start
            self.ids.append(token)
            self.followed.append(self._follower.after(before, token))
            self.states.append(state_of(position, self.followed[-1].holding))
            states.append(self.states[-1])
        return states


class TrackedTexts:
    """The texts of all rows of a session in which some edits have positions by meaning.

    Args:
        plan: The session's plan.
        edits: The edits of each request.
        lengths: The prompt length of each request.
        rows: The number of rows; the rows of one request are adjacent.
        tokenizer: The model's tokenizer; with `None`, passes must not contain generated tokens.
        prompts: The token ids of each prompt; with `None`, they are taken from the passes.
    """

    def __init__(
        self,
        plan: Plan,
        edits: Sequence[tuple[Edit, ...]],
        lengths: Sequence[int],
        rows: int,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]] | None,
    ) -> None:
        self._plan = plan
        self._repeat = rows // len(lengths)
        self._collects = prompts is None and tokenizer is not None
        self._known = tokenizer is not None
        self._rows: list[TrackedText | None] = []
        for request in (row // self._repeat for row in range(rows)):
            meanings = meanings_of(edits[request])
            ids = [] if prompts is None else list(prompts[request])
            following = TrackedText(tokenizer, meanings, lengths[request], ids) if meanings else None
            self._rows.append(following)

    def states(self, forward_pass: ForwardPass, pads: Sequence[int], ids: Tensor | None) -> tuple[tuple[int, ...], ...]:
        """Each row's states in a pass over these tokens, one per column.

        Raises `TrimtabError` if the meaning of generated tokens can't be determined.
        """
        states = states_of(self._plan.segments, forward_pass, pads)
        where = token_positions(forward_pass, pads)
        generated = any(text and max(row) >= text.prompt_length for text, row in zip(self._rows, where, strict=True))
        if not generated and not self._collects:
            return states
        if not self._known:
            raise UnsupportedError("positions by meaning need a tokenizer, and this model has none")
        if ids is None or ids.shape != (forward_pass.rows, forward_pass.length):
            raise UnsupportedError("positions by meaning need the tokens, and the model was given embeddings")
        listed = ids.tolist()
        return tuple(
            states[row] if text is None else tuple(text.advance(where[row], listed[row], partial(self._state, row)))
            for row, text in enumerate(self._rows)
        )

    def steered(self, row: int, touched: frozenset[int], start: int, stop: int) -> int:
        """The number of a row's positions from `start` to `stop` that are in one of the `touched` states."""
        text, segments = self._rows[row], self._plan.segments[row // self._repeat]
        if text is None:
            return count_steered(segments, touched, start, stop)
        generated = text.states[: max(0, stop - text.prompt_length)]
        in_prompt = count_steered(segments, touched, start, min(stop, text.prompt_length))
        return in_prompt + sum(state in touched for state in generated)

    def _state(self, row: int, position: int, holding: ActiveMeanings) -> int:
        return state_at(self._plan.at(row // self._repeat, holding), position)
