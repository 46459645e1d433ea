"""`/make` in `trimtab chat`: what is to be made, making it, and a Ctrl-C that stops it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.chat_state import Conversation, Steered
from trimtab.commands.terminal import handling
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.commands.chat_commands import Desk
    from trimtab.making import Made

TAKES = "TEXT|--like WHO|--from PAIRS"
LONGEST_NAME = 24
LEAST_TOKENS = 8
"""Answers are as long as the chat's, but for what is too short to learn from, and no longer than `make` has them."""

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wish:
    """What `/make` is to make: a sentence, a persona and another one, or a file of pairs.

    `keep`: even if the verdict is none.
    """

    idea: str | None = None
    like: str | None = None
    unlike: str | None = None
    pairs: Path | None = None
    keep: bool = False


def wish_of(rest: str) -> Wish:
    """What stands after `/make`. A sentence needs no quotes, so that an apostrophe may stand in it.

    Raises `TrimtabError` where nothing is wanted, or two things at once.
    """
    options: dict[str, Any] = {}
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        rest = rest.strip()
        if flag == "--keep":
            options["keep"] = True
            continue
        name = {"--like": "like", "--unlike": "unlike", "--from": "pairs"}.get(flag)
        if name is None:
            raise TrimtabError(f"/make has no {flag}; it has --like, --unlike, --from and --keep")
        value, rest = _first_word(rest, flag)
        options[name] = Path(value).expanduser() if name == "pairs" else value
    said = rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "\"'" else rest
    wish = Wish(idea=said.strip() or None, **options)
    if sum(part is not None for part in (wish.idea, wish.like, wish.pairs)) != 1:
        raise TrimtabError(f"/make takes one of these: {TAKES}")
    if wish.unlike is not None and wish.like is None:
        raise TrimtabError('/make --unlike goes with --like; in a sentence the opposite follows after "not"')
    return wish


def _first_word(rest: str, flag: str) -> tuple[str, str]:
    """The value after a flag, which quotes hold together, and what comes after it."""
    match = re.match(r"""("[^"]*"|'[^']*'|\S+)\s*""", rest)
    if match is None or match[1].startswith("--"):
        raise TrimtabError(f"/make {flag} has nothing after it")
    value = match[1]
    return (value[1:-1] if value[0] in "\"'" and value[-1] == value[0] and len(value) > 1 else value), rest[
        match.end() :
    ]


@dataclass(frozen=True)
class Making:
    """What came of it: the conversation, in which it is on if it holds or is to be kept, and what was made."""

    conversation: Conversation
    made: Made
    name: str
    on: bool


def make_steered(
    desk: Desk, conversation: Conversation, wish: Wish, stage: Stage, say: Callable[[str], None]
) -> Making:
    """Make what is wished for, and put it on.

    Args:
        desk: The model.
        conversation: It gives the names that are taken, and isn't changed.
        wish: What is wanted.
        stage: Called with what is being done, and how far it is.
        say: Called with messages about the progress.

    Raises:
        TrimtabError: As `make` and `make_from_pairs` do.
        KeyboardInterrupt: Ctrl-C was pressed; the model is as it was.
    """
    from trimtab.making import idea_from_contrast, idea_from_sentence, make, make_from_pairs
    from trimtab.making.make import TOKENS
    from trimtab.text.pairs import read_pairs

    tokens = max(LEAST_TOKENS, min(TOKENS, conversation.max_tokens))
    with _stopped_for_good() as check:

        def at(what: str, done: int, total: int) -> None:
            check()
            stage(what, done, total)

        if wish.pairs is not None:
            pairs = read_pairs(wish.pairs)
            made = make_from_pairs(desk.lm, pairs, name=wish.pairs.stem, tokens=tokens, stage=at, say=say)
        else:
            idea = idea_from_contrast(wish.like, wish.unlike) if wish.like else idea_from_sentence(wish.idea or "")
            made = make(desk.lm, idea, tokens=tokens, stage=at, say=say)
        check()
    if not (made.verdict.holds or wish.keep):
        return Making(conversation, made, "", False)
    taken = {*desk.names, *(steered.name for steered in (*conversation.made, *conversation.steered))}
    name = name_of(made.idea, taken)
    return Making(conversation.with_made(Steered(name, "", made.steering)), made, name, True)


def name_of(idea: str, taken: set[str]) -> str:
    """A name for what was made, of a word or a few, which isn't taken: `blunt` of "be blunt, not flattering"."""
    said = re.sub(r"^(?:please )?(?:be|talk like|write like|act like|sound|answer) ", "", idea.strip().lower())
    said = re.split(r",| not | rather than | instead of ", said)[0]
    words = [word for word in re.findall(r"[^\W_]+", said) if word not in ("a", "an", "the")]
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word
        if name and len(longer) > LONGEST_NAME:
            break
        name = longer[: 2 * LONGEST_NAME]
    name = name or "made"
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


@contextmanager
def _stopped_for_good() -> Iterator[Callable[[], None]]:
    """While open, Ctrl-C raises `KeyboardInterrupt`, and so does what is yielded, from then on.

    A descent that is interrupted ends with the best so far; here that isn't wanted.
    """
    pressed = False

    def handle(_signal: int, _frame: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    with handling(signal.SIGINT, handle):
        yield check
