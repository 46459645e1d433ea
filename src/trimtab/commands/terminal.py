"""Terminal output: results and JSON go to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PROGRESS_INTERVAL = 30.0
"""Seconds between two progress lines if there is no terminal."""


def escape_unencodable() -> None:
    """Print characters that stdout's encoding lacks as escapes, as stderr does, instead of failing at them.

    The output of a program on Windows that isn't shown on a terminal is in the system's code page.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """Print one line to stderr, with line breaks in the message removed."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)


def note(message: str, *, quiet: bool) -> None:
    """Print a remark for the user to stderr; nothing with `quiet`."""
    if not quiet:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message, style="dim")


def show(*parts: RenderableType) -> None:
    """Print text and tables to stdout. Strings are printed unchanged: no markup, no added line breaks."""
    console = Console(highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def side_by_side(unsteered: Text, steered: Text) -> Table:
    """Two answers in columns of equal width."""
    table = Table("unsteered", "steered", box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.expand = True
    for column in table.columns:
        column.ratio = 1
    table.add_row(unsteered, steered)
    return table


def write_json(document: Any, *, indent: int | None = 2) -> None:
    """Print one JSON document, in UTF-8, to stdout: on one line with `indent=None`.

    Numbers that JSON doesn't have (NaN, infinities) become null.
    """
    text = json.dumps(_plain(document), ensure_ascii=False, indent=indent, allow_nan=False)
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _ProgressLines:
    """Replaces a bar in a log: one line for each new label, and one for the progress every `PROGRESS_INTERVAL`
    seconds.
    """

    def __init__(self, label: str) -> None:
        self.label, self.last_report = label, time.monotonic()

    def __call__(self, done: int | None = None, total: int | None = None, *, label: str | None = None) -> None:
        if label is not None and label != self.label:
            self.label, self.last_report = label, time.monotonic()
            note(label, quiet=False)
        elif (
            done is not None
            and total is not None
            and done < total
            and time.monotonic() >= self.last_report + PROGRESS_INTERVAL
        ):
            self.last_report = time.monotonic()
            note(f"{self.label} ({done} of {total})", quiet=False)


@contextmanager
def progress_bar(label: str, *, quiet: bool, lines: bool = True) -> Iterator[Callable[..., None] | None]:
    """A bar with the time left, on stderr; yields `update(done, total)`, and `update(label=…)` changes its label.

    If stderr isn't a terminal, progress is printed as occasional lines, or with `lines=False` not at all. Yields `None`
    if nothing is printed, which includes `quiet`.
    """
    if not quiet and not sys.stderr.isatty():
        yield _ProgressLines(label) if lines else None
        return
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(label, total=None)

        def update(done: int | None = None, total: int | None = None, *, label: str | None = None) -> None:
            bars.update(bar, completed=done, total=total, description=label)

        yield update


@contextmanager
def signal_handler(number: int, handler: Callable[..., None]) -> Iterator[None]:
    """While open, a signal calls the handler. Only the main thread handles signals; other threads change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In the main thread, treat SIGTERM as Ctrl-C: the first raises `KeyboardInterrupt`.

    Later ones are ignored, so that results can be written.
    """
    came = False

    def interrupt(*_: Any) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    with signal_handler(signal.SIGTERM, interrupt):
        yield


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each trimtab warning once, as a line `warning: …` on stderr; warnings of other packages are dropped.

    A warning class with `once` is printed once, whatever its message.
    """
    seen: set[str] = set()

    def print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = str(message)
        key = category.__name__ if getattr(category, "once", False) else text
        if category.__module__.partition(".")[0] == "trimtab" and key not in seen:
            seen.add(key)
            say(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = print_warning
        yield


def shortened(text: str, most: int) -> str:
    """A text on one line, cut to this many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
