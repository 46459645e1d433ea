"""The input line of `trimtab chat`: history with the arrow keys, and completion with Tab."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.history import InMemoryHistory

from trimtab.commands.chat_commands import COMMANDS, ChatSetup, is_command
from trimtab.commands.chat_state import Conversation
from trimtab.commands.terminal import note

MAKE_FLAGS = ("--like", "--unlike", "--from", "--keep")
PAIR_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
STEERING_FILES = (".safetensors", ".gguf", ".svec", ".pt", ".json")


def make_reader(setup: ChatSetup) -> Callable[[Conversation], str | None]:
    """Make a function that reads a line for a conversation.

    It returns `None` after Ctrl-D. On Ctrl-C it says how to leave, and reads on.
    """
    session: PromptSession[str] = PromptSession(history=InMemoryHistory(), complete_while_typing=False)

    def read(conversation: Conversation) -> str | None:
        label = conversation.label()
        while True:
            try:
                return session.prompt(f"{label} > " if label else "> ", completer=_Completer(setup, conversation))
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    note("Ctrl-D or /quit leaves", quiet=False)
            except EOFError:
                return None

    return read


class _Completer(Completer):
    def __init__(self, setup: ChatSetup, conversation: Conversation) -> None:
        self.setup = setup
        self.conversation = conversation

    def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
        before = document.text_before_cursor
        for candidate in candidates(self.setup, self.conversation, before):
            yield Completion(candidate, start_position=-len(before.rpartition(" ")[2]))


def candidates(setup: ChatSetup, conversation: Conversation, before: str) -> list[str]:
    """Completions of the current word: commands, names of steerings, layers, files."""
    if not is_command(before):
        return []
    *words, last = before.split(" ")
    words = [word for word in words if word]
    if not words:
        return [f"/{name}" for name in COMMANDS if name.startswith(last[1:])]
    on = [steered.name for steered in conversation.active_steerings]
    argument = words[0], len(words)
    if argument == ("/steer", 1):
        names = [*dict.fromkeys([*on, *(steered.name for steered in conversation.made_steerings), *setup.names])]
        return [*_names(last, names), *_paths(last, STEERING_FILES)]
    if argument in (("/strength", 1), ("/layer", 1), ("/tokens", 1)):
        return _names(last, on)
    if argument in (("/layer", 2), ("/tokens", 2)):
        chosen = conversation.find(words[1])
        layers = [] if chosen is None else [str(layer) for layer in chosen.steering.layers]
        return _with_prefix(last, [*(["all"] if words[0] == "/layer" else []), *layers])
    if words[0] == "/make":
        return _paths(last, PAIR_FILES) if words[-1] == "--from" else _with_prefix(last, MAKE_FLAGS) if last else []
    if argument == ("/save", 2):
        return _names(last, [steered.name for steered in conversation.made_steerings])
    if argument in (("/save", 1), ("/load", 1)):
        return _paths(last, (".json",))
    if argument == ("/help", 1):
        return _with_prefix(last, COMMANDS)
    return _with_prefix(last, ["off"]) if argument in (("/steer", 2), ("/system", 1), ("/emphasize", 1)) else []


def _with_prefix(with_: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(with_)]


def _names(with_: str, names: Iterable[str]) -> list[str]:
    """Names of steerings, quoted if they have spaces."""
    return [shlex.quote(name) for name in _with_prefix(with_.lstrip("'\""), names)]


def _paths(typed: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files with these suffixes, and folders, whose path begins with what was typed."""
    folder, slash, start = typed.rpartition("/")
    try:
        inside = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    listed = []
    for path in inside:
        if path.name.startswith(start) and not (path.name.startswith(".") and not start):
            if path.is_dir():
                listed.append(f"{folder}{slash}{path.name}/")
            elif path.suffix in suffixes:
                whole = f"{folder}{slash}{path.name}"
                listed.append(shlex.quote(whole) if " " in whole else whole)
    return listed
