"""Words and lengths by a fixed weight: Stolfo et al., ICLR 2025, arXiv 2410.12877, sections 4.2 and 5.

    h[p] <- h[p] + c u        u: unit mean difference of prompts with and without "include the word W", or "be concise"

To exclude a word, the same vector is subtracted (c < 0): in the paper's validation this worked more often than adding a
vector learned from "do not use the word W".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.data import instruction_pairs, instruction_type, length_phrasings, queries
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import Progress
from trimtab.learn.inputs import check_lm
from trimtab.methods.instruct import learn_instruct
from trimtab.steering import Positions, Steering

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

WORD_QUERIES = 20
"""The number of queries that a word's vector is learned from, as in the paper."""
LENGTHS = ("concise", "verbose")


@keywords
def learn_word(
    lm: LM,
    word: str,
    layers: int | Sequence[int] | None = None,
    *,
    exclude: bool = False,
    weight: float | None = None,
    base: Sequence[str] | None = None,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn a steering that makes answers include a word (or phrase), or with `exclude` avoid it.

    Args:
        lm: The model.
        word: The word or phrase.
        layers: Blocks to read and to steer after (default: one, at 0.6 of the depth).
        exclude: Avoid the word: the same steering, negated.
        weight: The paper's c, in units of the residual stream (default: the norm of the instruction's mean difference).
        base: The queries to learn from (default: 20 included ones).
        positions: The tokens at which to add (default: all but the first).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering.

    Raises:
        TrimtabError: The word is empty, or a layer is unknown.
    """
    check_lm(lm)
    word = _word(word)
    base = queries("learn")[:WORD_QUERIES] if base is None else base
    phrasings = instruction_type("keywords:existence").phrasings("learn", {"word": word})
    options = {"word": word, "exclude": exclude}
    steering = _learn_weighted(lm, base, phrasings, layers, weight, positions, options, progress)
    return -steering if exclude else steering


@keywords
def learn_length(
    lm: LM,
    length: str,
    layers: int | Sequence[int] | None = None,
    *,
    weight: float | None = None,
    base: Sequence[str] | None = None,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn a steering towards concise or verbose answers.

    Args:
        lm: The model.
        length: `"concise"` or `"verbose"`.
        layers: As in `learn_word`.
        weight: As in `learn_word`.
        base: The queries to learn from (default: all included ones to learn from).
        positions: As in `learn_word`.
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering.

    Raises:
        TrimtabError: The length or a layer is unknown.
    """
    check_lm(lm)
    if length not in LENGTHS:
        raise TrimtabError(f"there is no length {length!r}; lengths: {', '.join(LENGTHS)}")
    base = queries("learn") if base is None else base
    return _learn_weighted(lm, base, length_phrasings(length), layers, weight, positions, {"length": length}, progress)


def _word(word: str) -> str:
    if not word.strip():
        raise TrimtabError("a word to include or exclude can't be empty")
    return word.strip()


def _learn_weighted(
    lm: LM,
    base: Sequence[str],
    phrasings: Sequence[str],
    layers: int | Sequence[int] | None,
    weight: float | None,
    positions: Positions | None,
    options: dict,
    progress: Progress | None,
) -> Steering:
    steering = learn_instruct(
        lm,
        instruction_pairs(base, phrasings),
        layers,
        operation="add" if weight is None else "unit",
        positions=Positions.all_but_first() if positions is None else positions,
        options=options,
        progress=progress,
    )
    return steering if weight is None else weight * steering
