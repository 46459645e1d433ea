"""An idea of what a steering should do, as prompts for a model: system prompts for and against, and questions.

An idea comes from one of the packaged trait cards, from a sentence ("be blunt, not flattering"), or from two personas
("a pirate", "an office clerk").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trimtab.data import Trait, find_trait, queries
from trimtab.errors import TrimtabError

LEARN, TEST = 20, 20
"""The number of questions to learn from, and that of other questions for the test at the end."""

FOR = (
    "{Idea}.",
    "In everything you write, follow this rule: {idea}.",
    "The most important thing about how you answer: {idea}.",
    "You always keep to this, whatever you are asked: {idea}. Nobody needs to remind you.",
    "Your users chose you for one reason, and you live up to it in every sentence: {idea}.",
)
PLAIN = (
    "You are a helpful assistant.",
    "You are an assistant who answers plainly and to the point.",
    "You answer questions as a good assistant does, in an ordinary way.",
    "You are a helpful assistant with no particular style.",
    "You answer every question in a neutral, ordinary tone.",
)
"""The negative side of an idea without an opposite: an ordinary assistant."""
PERSONA = (
    "You are {who}.",
    "You are {who}, and you answer every question as {who} would.",
    "Answer as if you were {who}. Your words, your tone and what you think of are those of {who}.",
    "From now on you are {who}. Stay in this role, whatever you are asked.",
    "Everything you write sounds like {who}.",
)
_OPPOSITE = re.compile(
    r"^(?P<idea>.+?)(?:,| but|;)?\s+(?:and )?(?:not|rather than|instead of|never)\s+(?P<other>.+)$", re.I
)
_VERB = re.compile(r"^(?:please\s+)?(?:be|sound|act|talk|speak|write|answer|respond|reply)\b", re.I)


@dataclass(frozen=True)
class Idea:
    """What is wanted, and its opposite.

    Args:
        name: A short name.
        positive: System prompts that produce the behaviour, in different words.
        negative: The same number of system prompts for the opposite.
        learn: Questions to learn from.
        test: Other questions, which are used only for the test at the end.
        signs: Words that reliably indicate the behaviour in an answer, if there are any.
        source: Where the idea comes from, for the card.

    Raises:
        TrimtabError: No prompts on a side, too few questions, or a question in both lists.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    learn: tuple[str, ...]
    test: tuple[str, ...]
    signs: tuple[str, ...] = ()
    source: str = "sentence"

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise TrimtabError(f"the idea {self.name!r} needs system prompts for it and against it")
        if len(self.learn) < 8 or len(self.test) < 4:
            raise TrimtabError(
                f"the idea {self.name!r} has {len(self.learn)} questions to learn from and {len(self.test)} to test;"
                " at least 8 and 4 are needed"
            )
        if both := set(self.learn) & set(self.test):
            raise TrimtabError(f"a test question is also one to learn from: {sorted(both)[0]!r}")


def idea_from_trait(trait: Trait) -> Idea:
    """The idea of a trait card."""
    signs = trait.check.any if trait.check is not None else ()
    return Idea(trait.name, trait.positive, trait.negative, trait.learn, trait.test, signs, f"trait {trait.name}")


def idea_from_sentence(sentence: str, *, cards: bool = True) -> Idea:
    """The idea of a sentence: that of the trait card it names, or else the sentence in templates.

    In "be blunt, not flattering" the opposite follows "not"; without one, the opposite is an ordinary assistant.

    Args:
        sentence: What is wanted, such as "talk like a pirate".
        cards: Whether trait cards may be used.

    Raises:
        TrimtabError: The sentence is empty.
    """
    cleaned = " ".join(sentence.split()).strip(" .!")
    if not cleaned:
        raise TrimtabError("describe in a sentence what you want, such as 'be blunt, not flattering'")
    if cards and (trait := find_trait(cleaned)) is not None:
        return idea_from_trait(trait)
    match = _OPPOSITE.match(cleaned)
    wanted = match["idea"].strip(" ,;") if match else cleaned
    negative = _prompts_for(_with_verb(match["other"].strip(" ,;"), wanted)) if match else PLAIN
    return Idea(cleaned, _prompts_for(wanted), negative, *_general(), source="sentence")


def idea_from_contrast(like: str, unlike: str | None = None) -> Idea:
    """The idea of a persona, against another one or an ordinary assistant.

    Args:
        like: Who the model should be like, such as "a pirate".
        unlike: Who it should be unlike, such as "an office clerk".

    Raises:
        TrimtabError: An empty persona, or the same one twice.
    """
    who, other = (" ".join((text or "").split()).strip(" .!") for text in (like, unlike))
    if not who:
        raise TrimtabError("say who the model should be like, such as 'a pirate'")
    if who == other:
        raise TrimtabError(f"like and unlike are the same: {who!r}")
    negative = tuple(template.format(who=other) for template in PERSONA) if other else PLAIN
    return Idea(who, tuple(template.format(who=who) for template in PERSONA), negative, *_general(), source="persona")


def with_questions(idea: Idea, questions: Sequence[str]) -> Idea:
    """The idea with custom questions; every second one is kept for the test.

    Raises:
        TrimtabError: Too few questions.
    """
    return replace(idea, learn=tuple(questions[::2]), test=tuple(questions[1::2]))


def _prompts_for(wanted: str) -> tuple[str, ...]:
    wanted = wanted if _VERB.match(wanted) else f"be {wanted}" if len(wanted.split()) < 4 else wanted
    return tuple(template.format(idea=wanted, Idea=wanted[0].upper() + wanted[1:]) for template in FOR)


def _with_verb(other: str, wanted: str) -> str:
    """The opposite with the verb of what is wanted: "talk like a pirate, not like a clerk"."""
    verb = _VERB.match(wanted)
    return f"{verb[0]} {other}" if verb and not _VERB.match(other) else other


def _general() -> tuple[tuple[str, ...], tuple[str, ...]]:
    learn, test = (tuple(queries(split)) for split in ("learn", "test"))
    return _spread(learn, LEARN), _spread(test, TEST)


def _spread(texts: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(texts[i * len(texts) // count] for i in range(min(count, len(texts))))
