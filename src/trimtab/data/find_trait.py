"""Which trait a short sentence asks for, such as "be blunt, not flattering"."""

from __future__ import annotations

import re
from functools import cache

from trimtab.data.trait_cards import Trait, traits

Phrase = tuple[str, ...]

TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.,;:!?()]")
DASH = re.compile(r"\s-+\s|[–—]")
STOPS = frozenset(".;:!?()")
NOT = ("not", "never", "no", "non", "nor", "neither", "cannot", "dont", "without", "less", "too", "than")
UNASKED = frozenset((*NOT, "avoid", "stop", "quit", "hate", "dislike", "about"))
"""A trait that comes after one of these in its clause isn't wanted for; nor after "instead of", nor a word in "n't"."""
ONLY = frozenset(("only", "just", "merely"))
STARTS = frozenset(("be", "more", "just", "sound", "talk", "speak", "write", "answer", "please"))
"""Words that begin to ask for something else, after a trait that isn't wanted for: "don't be formal be casual"."""
IS = frozenset(("is", "are", "was", "were"))


def find_trait(sentence: str) -> Trait | None:
    """The trait that a short sentence asks for, by the words of its card.

    What comes after "not", "don't be", "less" and the like isn't asked for, up to the end of the clause.

    Args:
        sentence: Such as "talk like a pirate", "more formal please" or "be blunt, not flattering".

    Returns:
        The trait, or `None` where the sentence asks for none of them or for more than one.
    """
    tokens = _tokens(sentence)
    wanted: set[str] = set()
    clause: set[str] = set()  # what this clause has asked for so far
    unasked = named = False  # whether what comes isn't asked for, and whether it has named a trait yet
    i = 0
    while i < len(tokens):
        length, names = _phrase_at(tokens, i)
        if length:
            named = True
            clause |= set() if unasked else names
            i += length
            continue
        if _denies(tokens, i):
            if tokens[i] in ("isn't", "aren't", "wasn't") or (i and tokens[i - 1] in IS):
                clause = set()  # "formal isn't what I want"
            unasked, named = True, False
        elif _ends(tokens, i, unasked, named):
            wanted |= clause
            clause, unasked = set(), False
        i += 1
    wanted |= clause
    return traits()[wanted.pop()] if len(wanted) == 1 else None


@cache
def _phrases() -> dict[Phrase, frozenset[str]]:
    """The words of all cards as tokens, and the traits that each may mean."""
    phrases: dict[Phrase, frozenset[str]] = {}
    for card in traits().values():
        for text in (card.name, *card.words):
            phrase = tuple(_tokens(text))
            phrases[phrase] = phrases.get(phrase, frozenset()) | {card.name}
    return phrases


def _phrase_at(tokens: list[str], i: int) -> tuple[int, frozenset[str]]:
    """The length of the longest phrase that begins here, and its traits; length 0 where none does."""
    for length in range(max(map(len, _phrases())), 0, -1):
        phrase = tuple(tokens[i : i + length])
        if len(phrase) == length and phrase in _phrases():
            return length, _phrases()[phrase]
    return 0, frozenset()


def _denies(tokens: list[str], i: int) -> bool:
    """Whether what comes after this word isn't wanted for."""
    word, after = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else ""
    if word.endswith("n't"):
        asks = word in ("can't", "couldn't", "won't", "wouldn't") and after == "you"
        return not asks and not (i and tokens[i - 1] == "why")  # "can't you be …", "why don't you …" ask for it
    if word == "not":
        return after not in ONLY
    return word in UNASKED or (word == "instead" and after == "of")


def _ends(tokens: list[str], i: int, unasked: bool, named: bool) -> bool:
    """Whether a clause ends at this word, or a part of it that names what isn't wanted for."""
    word = tokens[i]
    if word in STOPS or word in ("but", "instead"):
        return True
    if word == ",":
        return not (unasked and named and _or_follows(tokens, i))
    return unasked and named and word in STARTS


def _or_follows(tokens: list[str], i: int) -> bool:
    """Whether the clause goes on as a list: "don't be formal, rude, or sarcastic"."""
    for word in tokens[i + 1 :]:
        if word in STOPS or word == "but" or word in STARTS:
            return False
        if word in ("or", "nor"):
            return True
    return False


def _tokens(text: str) -> list[str]:
    """Words in lower case, and marks of punctuation; a hyphen parts two words, a dash two clauses."""
    return TOKEN.findall(DASH.sub(" ; ", text.lower().replace("’", "'")))
