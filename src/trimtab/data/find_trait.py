"""Find the trait that a short sentence asks for, such as "be blunt, not flattering"."""

from __future__ import annotations

import re
from functools import cache

from trimtab.data.trait_cards import Trait, traits

Phrase = tuple[str, ...]

TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.,;:!?()]")
DASH = re.compile(r"\s-+\s|[–—]")
CLAUSE_ENDS = frozenset(".;:!?()")
NEGATIONS = ("not", "never", "no", "non", "nor", "neither", "cannot", "dont", "without", "less", "too", "than")
NEGATING_WORDS = frozenset((*NEGATIONS, "avoid", "stop", "quit", "hate", "dislike", "about"))
"""Words that negate the traits after them in the same clause, like "instead of" and words that end in "n't"."""
ONLY_WORDS = frozenset(("only", "just", "merely"))
REQUEST_STARTS = frozenset(("be", "more", "just", "sound", "talk", "speak", "write", "answer", "please"))
"""Words that start a new request after a negated trait: "don't be formal be casual"."""
FORMS_OF_BE = frozenset(("is", "are", "was", "were"))


def find_trait(sentence: str) -> Trait | None:
    """Find the trait that a short sentence asks for, by the words of its card.

    Traits after "not", "don't be", "less" and similar words are negated, up to the end of the clause.

    Args:
        sentence: A sentence such as "talk like a pirate", "more formal please" or "be blunt, not flattering".

    Returns:
        The trait, or `None` if the sentence asks for none or for more than one.
    """
    tokens = _tokens(sentence)
    wanted: set[str] = set()
    clause: set[str] = set()  # the traits that this clause asks for so far
    negated = trait_seen = False  # whether the following traits are negated, and whether one has occurred yet
    i = 0
    while i < len(tokens):
        length, names = _phrase_at(tokens, i)
        if length:
            trait_seen = True
            clause |= set() if negated else names
            i += length
            continue
        if _negates(tokens, i):
            if tokens[i] in ("isn't", "aren't", "wasn't") or (i and tokens[i - 1] in FORMS_OF_BE):
                clause = set()  # "formal isn't what I want"
            negated, trait_seen = True, False
        elif _ends_clause(tokens, i, negated, trait_seen):
            wanted |= clause
            clause, negated = set(), False
        i += 1
    wanted |= clause
    return traits()[wanted.pop()] if len(wanted) == 1 else None


@cache
def _phrases() -> dict[Phrase, frozenset[str]]:
    """The words of all cards, tokenized, and the traits that each may refer to."""
    phrases: dict[Phrase, frozenset[str]] = {}
    for card in traits().values():
        for text in (card.name, *card.words):
            phrase = tuple(_tokens(text))
            phrases[phrase] = phrases.get(phrase, frozenset()) | {card.name}
    return phrases


def _phrase_at(tokens: list[str], i: int) -> tuple[int, frozenset[str]]:
    """The length of the longest phrase that starts here, and its traits; length 0 if there is none."""
    for length in range(max(map(len, _phrases())), 0, -1):
        phrase = tuple(tokens[i : i + length])
        if len(phrase) == length and phrase in _phrases():
            return length, _phrases()[phrase]
    return 0, frozenset()


def _negates(tokens: list[str], i: int) -> bool:
    """Whether this word negates the traits after it."""
    word, after = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else ""
    if word.endswith("n't"):
        asks = word in ("can't", "couldn't", "won't", "wouldn't") and after == "you"
        return not asks and not (i and tokens[i - 1] == "why")  # "can't you be …" and "why don't you …" are requests
    if word == "not":
        return after not in ONLY_WORDS
    return word in NEGATING_WORDS or (word == "instead" and after == "of")


def _ends_clause(tokens: list[str], i: int, unasked: bool, named: bool) -> bool:
    """Whether a clause, or a negated part of it, ends at this word."""
    word = tokens[i]
    if word in CLAUSE_ENDS or word in ("but", "instead"):
        return True
    if word == ",":
        return not (unasked and named and _or_follows(tokens, i))
    return unasked and named and word in REQUEST_STARTS


def _or_follows(tokens: list[str], i: int) -> bool:
    """Whether the clause continues as a list: "don't be formal, rude, or sarcastic"."""
    for word in tokens[i + 1 :]:
        if word in CLAUSE_ENDS or word == "but" or word in REQUEST_STARTS:
            return False
        if word in ("or", "nor"):
            return True
    return False


def _tokens(text: str) -> list[str]:
    """Lower-case words and punctuation marks. A hyphen separates two words, a dash two clauses."""
    return TOKEN.findall(DASH.sub(" ; ", text.lower().replace("’", "'")))
