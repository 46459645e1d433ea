"""The output of `trimtab chat`: at a terminal, as plain lines, or as JSON with one object per answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.commands.chat_answer import OnPiece
from trimtab.commands.chat_commands import Outcome
from trimtab.commands.chat_file import turn_document
from trimtab.commands.chat_make import MakeResult, Stage
from trimtab.commands.chat_state import Conversation, Turn
from trimtab.commands.make import stage_reporter, summary
from trimtab.commands.terminal import note, progress_bar, show, side_by_side, write_json

CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
"""Maps control characters, which could move the cursor or color the screen, to visible symbols."""


class Screen(Protocol):
    """Where answers and command output are shown. `interrupt`: whether Ctrl-C ends an answer early."""

    interrupt: bool

    def answering(self, compared: bool) -> AbstractContextManager[OnPiece]:
        """Enclose an answer; yields the callback for its pieces. `compared`: an unsteered answer comes first."""

    def finish_answer(self, turn: Turn, conversation: Conversation) -> None:
        """Handle a complete answer."""

    def show_outcome(self, outcome: Outcome) -> None:
        """Show the outcome of a command."""

    def making(self) -> AbstractContextManager[tuple[Stage, Callable[[str], None]]]:
        """Enclose the making of a steering; yields the callbacks for the progress and for messages."""


class PlainScreen:
    """Plain answers on stdout, separated by empty lines; remarks on stderr."""

    interrupt = False

    def __init__(self) -> None:
        self._has_output = False

    @contextmanager
    def answering(self, compared: bool) -> Iterator[OnPiece]:
        side = ""

        def on_piece(which: str, piece: str) -> None:
            nonlocal side
            if which != side:
                gap = "\n" if side else "\n" * self._has_output
                _write(f"{gap}{which}:\n" if compared else gap)
                side = which
            _write(piece)

        try:
            yield on_piece
        finally:
            if side:
                _write("\n")
                self._has_output = True

    def finish_answer(self, turn: Turn, conversation: Conversation) -> None:
        _remark(turn, conversation)

    def show_outcome(self, outcome: Outcome) -> None:
        show(*outcome.shown)
        if outcome.note:
            note(outcome.note, quiet=False)

    def making(self) -> AbstractContextManager[tuple[Stage, Callable[[str], None]]]:
        return _making_progress()


class JsonScreen:
    """One JSON object per answer and line on stdout; everything else on stderr."""

    interrupt = False

    @contextmanager
    def answering(self, compared: bool) -> Iterator[OnPiece]:
        yield lambda _side, _piece: None

    def finish_answer(self, turn: Turn, conversation: Conversation) -> None:
        write_json({**turn_document(turn), "dose": turn.answer.dose}, indent=None)
        _remark(turn, conversation)

    def show_outcome(self, outcome: Outcome) -> None:
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        for part in outcome.shown:
            console.print(part, soft_wrap=isinstance(part, str))
        if outcome.note:
            note(outcome.note, quiet=False)

    def making(self) -> AbstractContextManager[tuple[Stage, Callable[[str], None]]]:
        return _making_progress()


class TerminalScreen:
    """Answers as they are generated, in two columns if compared; remarks below."""

    interrupt = True

    @contextmanager
    def answering(self, compared: bool) -> Iterator[OnPiece]:
        with _echo_off(), self._showing(compared) as on_piece:
            yield on_piece

    @contextmanager
    def _showing(self, compared: bool) -> Iterator[OnPiece]:
        texts = {"unsteered": "", "steered": ""}
        if not compared:

            def write(side: str, piece: str) -> None:
                texts[side] += piece
                _write(piece.translate(CONTROLS))

            try:
                yield write
            finally:
                _write("\n" * bool(texts["steered"]))
            return
        from rich.live import Live

        try:
            with Live(console=_console(), transient=True, refresh_per_second=8) as live:

                def on_piece(side: str, piece: str) -> None:
                    texts[side] += piece.translate(CONTROLS)
                    live.update(_columns(texts))

                yield on_piece
        finally:
            if any(texts.values()):
                show(_columns(texts))

    def finish_answer(self, turn: Turn, conversation: Conversation) -> None:
        _remark(turn, conversation)

    def show_outcome(self, outcome: Outcome) -> None:
        PlainScreen.show_outcome(self, outcome)  # type: ignore[arg-type]

    @contextmanager
    def making(self) -> Iterator[tuple[Stage, Callable[[str], None]]]:
        with _echo_off(), _making_progress() as making:
            yield making


def outcome_of(make_result: MakeResult) -> Outcome:
    """The output for a steering that was made."""
    lines = summary(make_result.made_steering)
    if make_result.turned_on:
        message = f"{make_result.name} is on at strength 1; /save {make_result.name}.safetensors writes it"
    else:
        message = "nothing was turned on; try clearer words, or /make --keep … to look at it"
    return Outcome(make_result.conversation, message, tuple(lines))


def _columns(texts: Mapping[str, str]) -> Table:
    return side_by_side(Text(texts["unsteered"]), Text(texts["steered"]))


@contextmanager
def _making_progress() -> Iterator[tuple[Stage, Callable[[str], None]]]:
    """A progress bar on stderr; if that isn't a terminal, a line for each new stage."""
    with progress_bar("answering", quiet=False, lines=False) as progress:
        yield stage_reporter(progress, quiet=False), lambda words: note(words, quiet=progress is not None)


def _console() -> Any:
    return Console(highlight=False, markup=False, emoji=False)


@contextmanager
def _echo_off() -> Iterator[None]:
    """While open, keys aren't echoed into an answer; the next prompt receives them."""
    try:
        import termios
    except ImportError:  # Windows, where nothing is echoed unless it is being read
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _remark(turn: Turn, conversation: Conversation) -> None:
    """Explain why an answer ended, if it didn't end by itself."""
    answer = turn.answer
    if answer.finish_reason == "interrupted":
        note("stopped; the answer is kept as far as it got", quiet=False)
    elif answer.finish_reason == "length" and len(answer.token_ids) < conversation.max_tokens:
        note("the model's context is full; /undo or /reset makes room", quiet=False)
    elif answer.finish_reason == "length":
        note(f"ended after {len(answer.token_ids)} tokens; --max-tokens allows more", quiet=False)
