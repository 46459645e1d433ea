"""Positions by meaning, tracked while text is generated: which meanings apply to its newest token.

A request's text is tracked from the start of its answer. That may be in the prompt, if the prompt contains the
beginning of the answer: a template's `<think>`, or an assistant message that is continued. Other turns of the prompt
don't count, nor do any thinking and tool calls in them, and no prompt token has a meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary

from trimtab.errors import TrimtabError
from trimtab.steering import Edit, Steering
from trimtab.steering.meanings import AFTER, ANSWER, AT, OUTSIDE_TOOLS, THINKING, Meaning
from trimtab.text import markers
from trimtab.text.machine import Machine, State, Step
from trimtab.text.token_text import TokenText

ActiveMeanings = frozenset[Meaning]
"""The meanings that apply to a token."""
NOTHING: ActiveMeanings = frozenset()
MAX_MEANINGS = 6
"""The maximum number of meanings per steering; each of them may apply or not."""


def meanings_of(edits: Iterable[Edit]) -> ActiveMeanings:
    """All meanings that these edits need to know of generated tokens."""
    return frozenset(meaning for edit in edits for meaning in edit.positions.meanings)


def possible_subsets(meanings: ActiveMeanings) -> list[ActiveMeanings]:
    """All subsets of these that can apply at the same time: no token is in both the thinking and the answer."""
    listed = sorted(meanings)
    every = [frozenset(some) for n in range(len(listed) + 1) for some in combinations(listed, n)]
    apart = [
        {Meaning(THINKING, meaning.texts), Meaning(ANSWER, meaning.texts)}
        for meaning in meanings
        if meaning.kind == THINKING
    ]
    return [holding for holding in every if not any(both <= holding for both in apart)]


def check_meanings(steering: Steering, tokenizer: Any) -> None:
    """Raises `TrimtabError` for too many meanings, or for one that can't occur in this tokenizer's text."""
    meanings = meanings_of(steering.edits)
    if len(meanings) > MAX_MEANINGS:
        raise TrimtabError(f"a steering has at most {MAX_MEANINGS} positions by meaning, this one has {len(meanings)}")
    for meaning in meanings:
        if tokenizer is None:
            raise TrimtabError(f"positions {meaning.kind} depend on the text, and this model has no tokenizer")
        machine_of(tokenizer, meaning)


def machine_of(tokenizer: Any, meaning: Meaning) -> Machine:
    """The state machine that tracks this meaning. Raises `TrimtabError` if the model has no such markers."""
    key = meaning, str(getattr(tokenizer, "chat_template", None))
    known = _machines.setdefault(tokenizer, {})
    if key not in known:
        known[key] = _machine(tokenizer, meaning)
    return known[key]


_machines: WeakKeyDictionary[Any, dict[Any, Machine]] = WeakKeyDictionary()
_texts: WeakKeyDictionary[Any, TokenText] = WeakKeyDictionary()


def _machine(tokenizer: Any, meaning: Meaning) -> Machine:
    if meaning.kind in (THINKING, ANSWER):
        return markers.thinking_machine(tokenizer, meaning.texts, strict=meaning.kind == THINKING)
    if meaning.kind == OUTSIDE_TOOLS:
        return markers.tools_machine(tokenizer, meaning.texts)
    (text,) = meaning.texts
    if meaning.kind == AT:
        return Machine({AT: {text: AT}}, AT)
    return Machine({"before": {text: AFTER}, AFTER: {}}, "before")


def _holds(meaning: Meaning, step: Step) -> bool:
    if meaning.kind == AT:
        return step.completed
    if meaning.kind == OUTSIDE_TOOLS:
        return not any(mode.startswith(markers.TOOL) for mode in step.modes)
    mode = {THINKING: markers.THINKING, ANSWER: markers.ANSWER, AFTER: AFTER}[meaning.kind]
    return step.modes == (mode,)


@dataclass(frozen=True)
class FollowerState:
    """The state after a token: the meanings that apply to it (a prompt token has none), and each machine's state."""

    holding: ActiveMeanings
    states: tuple[State, ...]
    last: int


class Follower:
    """Tracks the text of one request. Its states are plain data, so that going back is easy.

    Args:
        tokenizer: The model's tokenizer.
        meanings: The meanings to track.
        prompt: The prompt's ids; at least one.

    Raises:
        TrimtabError: As in `check_meanings`.
    """

    def __init__(self, tokenizer: Any, meanings: Iterable[Meaning], prompt: Sequence[int]) -> None:
        self._meanings = sorted(meanings)
        self._machines = [machine_of(tokenizer, meaning) for meaning in self._meanings]
        self._text = _text_of(tokenizer)
        self.start: FollowerState = FollowerState(NOTHING, self._begin(tokenizer, prompt), prompt[-1])
        """The state before the first generated token."""

    def after(self, before: FollowerState, token: int) -> FollowerState:
        """The state after one more token."""
        piece = self._text.added_bytes(before.last, token)
        steps = [machine.read(state, piece) for machine, state in zip(self._machines, before.states, strict=True)]
        holding = [meaning for meaning, step in zip(self._meanings, steps, strict=True) if _holds(meaning, step)]
        return FollowerState(_interned(frozenset(holding)), tuple(step.state for step in steps), token)

    def states_after(self, tokens: Iterable[int]) -> list[FollowerState]:
        """The states after each of these generated tokens, from the first one on."""
        states, at = [], self.start
        for token in tokens:
            at = self.after(at, token)
            states.append(at)
        return states

    def _begin(self, tokenizer: Any, prompt: Sequence[int]) -> tuple[State, ...]:
        """Each machine's state after the prompt.

        A prompt without the template's header may have no answer yet, only text to be continued. Then a marker text
        (`AFTER`, `AT`) is only searched for in the generated text, but thinking or a tool call that was opened in the
        prompt counts.
        """
        pieces = [self._text.added_bytes(prompt[max(0, i - 1)], token) for i, token in enumerate(prompt)]
        whole, header = b"".join(pieces), markers.answer_header(tokenizer)
        place = -1 if header is None else whole.rfind(header.encode())
        begun = whole[place + len(header.encode()) :] if header is not None and place >= 0 else None
        states = []
        for meaning, machine in zip(self._meanings, self._machines, strict=True):
            text = begun if begun is not None else b"" if meaning.kind in (AFTER, AT) else whole
            states.append(machine.read(machine.start, text).state)
        return tuple(states)


def _text_of(tokenizer: Any) -> TokenText:
    if tokenizer not in _texts:
        _texts[tokenizer] = TokenText(tokenizer)
    return _texts[tokenizer]


@lru_cache(maxsize=4096)
def _interned(holding: ActiveMeanings) -> ActiveMeanings:
    """One object for equal sets of meanings, so that comparisons are fast."""
    return holding


def follower(tokenizer: Any, edits: Iterable[Edit], prompt: Sequence[int]) -> Follower | None:
    """The tracker of a request's text for these edits; `None` if they don't depend on the generated text."""
    meanings = meanings_of(edits)
    return Follower(tokenizer, meanings, prompt) if meanings else None
