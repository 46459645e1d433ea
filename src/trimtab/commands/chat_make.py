"""`/make` in `trimtab chat`: parse the request, make the steering, and stop on Ctrl-C."""

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
"""Answers are as long as the chat's, but at least this long, and no longer than those of `make`."""

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wish:
    """A request of `/make`: a sentence, a persona and its opposite, or a file of pairs.

    `keep` puts the steering on even if the verdict is none.
    """

    idea: str | None = None
    like: str | None = None
    unlike: str | None = None
    pairs: Path | None = None
    keep: bool = False


def wish_of(rest: str) -> Wish:
    """Parse the words after `/make`. A sentence needs no quotes, so that it can contain an apostrophe.

    Raises `TrimtabError` if nothing is requested, or two things at once.
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
    """The value after a flag, which may be quoted, and the rest of the line."""
    match = re.match(r"""("[^"]*"|'[^']*'|\S+)\s*""", rest)
    if match is None or match[1].startswith("--"):
        raise TrimtabError(f"/make {flag} has nothing after it")
    value = match[1]
    return (value[1:-1] if value[0] in "\"'" and value[-1] == value[0] and len(value) > 1 else value), rest[
        match.end() :
    ]


@dataclass(frozen=True)
class Making:
    """The result of `/make`: the conversation, with the steering on if it holds or is to be kept, and what was made."""

    conversation: Conversation
    made: Made
    name: str
    on: bool


def make_steered(
    desk: Desk, conversation: Conversation, wish: Wish, stage: Stage, say: Callable[[str], None]
) -> Making:
    """Make the requested steering, and put it on.

    Args:
        desk: The model.
        conversation: The conversation, for the names that are taken; it isn't changed.
        wish: The request.
        stage: Called with the current stage, and its progress.
        say: Called with messages about the progress.

    Raises:
        TrimtabError: As from `make` and `make_from_pairs`.
        KeyboardInterrupt: Ctrl-C was pressed; the model is unchanged.
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
    """A free name of one or a few words for a steering that was made: `blunt` for "be blunt, not flattering"."""
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
    """While open, Ctrl-C raises `KeyboardInterrupt`, and from then on the yielded check raises it again.

    Training that is interrupted returns the best so far, which isn't wanted here.
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
