"""`/make` in `trimtab chat`: parse the request, make the steering, and stop on Ctrl-C."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.chat_state import Conversation, NamedSteering
from trimtab.commands.terminal import signal_handler
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.commands.chat_commands import ChatSetup
    from trimtab.making import Made

USAGE = "TEXT|--like WHO|--from PAIRS"
LONGEST_NAME = 24
LEAST_TOKENS = 8
"""Answers are as long as the chat's, but at least this long, and no longer than those of `make`."""

Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MakeRequest:
    """A request of `/make`: a sentence, a persona and its opposite, or a file of pairs.

    `keep` puts the steering on even if the verdict is none.
    """

    idea: str | None = None
    like: str | None = None
    unlike: str | None = None
    pairs: Path | None = None
    keep: bool = False


def parse_make_request(rest: str) -> MakeRequest:
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
    sentence = rest[1:-1] if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "\"'" else rest
    request = MakeRequest(idea=sentence.strip() or None, **options)
    if sum(part is not None for part in (request.idea, request.like, request.pairs)) != 1:
        raise TrimtabError(f"/make takes one of these: {USAGE}")
    if request.unlike is not None and request.like is None:
        raise TrimtabError('/make --unlike goes with --like; in a sentence the opposite follows after "not"')
    return request


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
class MakeResult:
    """The result of `/make`: the conversation, with the steering on if it holds or is to be kept, and what was made."""

    conversation: Conversation
    made_steering: Made
    name: str
    turned_on: bool


def make_steering(
    setup: ChatSetup, conversation: Conversation, request: MakeRequest, stage: Stage, say: Callable[[str], None]
) -> MakeResult:
    """Make the requested steering, and put it on.

    Args:
        setup: The model.
        conversation: The conversation, for the names that are taken; it isn't changed.
        request: The request.
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
    with _lasting_interrupt() as check:

        def report_stage(what: str, done: int, total: int) -> None:
            check()
            stage(what, done, total)

        if request.pairs is not None:
            pairs = read_pairs(request.pairs)
            made_steering = make_from_pairs(
                setup.lm, pairs, name=request.pairs.stem, tokens=tokens, stage=report_stage, say=say
            )
        else:
            idea = (
                idea_from_contrast(request.like, request.unlike)
                if request.like
                else idea_from_sentence(request.idea or "")
            )
            made_steering = make(setup.lm, idea, tokens=tokens, stage=report_stage, say=say)
        check()
    if not (made_steering.verdict.holds or request.keep):
        return MakeResult(conversation, made_steering, "", False)
    used_names = {
        *setup.names,
        *(steered.name for steered in (*conversation.made_steerings, *conversation.active_steerings)),
    }
    name = name_of(made_steering.idea, used_names)
    return MakeResult(
        conversation.with_made(NamedSteering(name, "", made_steering.steering)), made_steering, name, True
    )


def name_of(idea: str, used_names: set[str]) -> str:
    """A free name of one or a few words for a steering that was made: `blunt` for "be blunt, not flattering"."""
    phrase = re.sub(r"^(?:please )?(?:be|talk like|write like|act like|sound|answer) ", "", idea.strip().lower())
    phrase = re.split(r",| not | rather than | instead of ", phrase)[0]
    words = [word for word in re.findall(r"[^\W_]+", phrase) if word not in ("a", "an", "the")]
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word
        if name and len(longer) > LONGEST_NAME:
            break
        name = longer[: 2 * LONGEST_NAME]
    name = name or "made"
    number = 2
    free = name
    while free in used_names:
        free, number = f"{name}-{number}", number + 1
    return free


@contextmanager
def _lasting_interrupt() -> Iterator[Callable[[], None]]:
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

    with signal_handler(signal.SIGINT, handle):
        yield check
