"""Words and lengths by a fixed weight: Stolfo et al., ICLR 2025, arXiv 2410.12877, sections 4.2 and 5.

    h[p] <- h[p] + c u        u: unit mean difference of prompts with and without "include the word W", or "be concise"

To keep a word out, the same vector is subtracted (c < 0): in the paper's validation that held more often than adding
a vector learned from "do not use the word W".
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
"""How many queries a word's vector is learned from, as in the paper."""
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
    """Learn a steering that makes answers include a word (or phrase), or with `exclude`
    avoid it.

    `weight` is the paper's c, in units of the residual stream; without it, the push is as long as the mean difference
    that the instruction makes. `base` are the queries to learn from (default: 20 included ones). Default
    layer: the one at 0.6 of the depth; positions: all but the first.

    Raises `TrimtabError` for an empty word or an unknown layer.
    """
    check_lm(lm)
    word = _word(word)
    base = queries("learn")[:WORD_QUERIES] if base is None else base
    phrasings = instruction_type("keywords:existence").phrasings("learn", {"word": word})
    options = {"word": word, "exclude": exclude}
    steering = _by_weight(lm, base, phrasings, layers, weight, positions, options, progress)
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
    """A steering towards `"concise"` or `"verbose"` answers; the other arguments are those of `learn_word`."""
    check_lm(lm)
    if length not in LENGTHS:
        raise TrimtabError(f"there is no length {length!r}; lengths: {', '.join(LENGTHS)}")
    base = queries("learn") if base is None else base
    return _by_weight(lm, base, length_phrasings(length), layers, weight, positions, {"length": length}, progress)


def _word(word: str) -> str:
    if not word.strip():
        raise TrimtabError("a word to include or exclude can't be empty")
    return word.strip()


def _by_weight(
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
