"""The prompts of `trimtab generate`: from options, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.text.chat import Prompt
from trimtab.text.read import read_text


def gather_prompts(texts: Sequence[str], source: str | None) -> list[Prompt]:
    """The prompts given one by one, then those of the file (`-`: standard input).

    A file holds one prompt a line, or, when it is named `.jsonl` or each of its lines begins with `{`, objects
    with `prompt` or `messages`. Raises `TrimtabError` for none, an empty one, or a malformed line.
    """
    for text in texts:
        if not text.strip():
            raise TrimtabError("a --prompt is empty; give it some text")
    found: list[Prompt] = [*texts, *(_read(source) if source else [])]
    if not found:
        raise TrimtabError("there is no prompt; give --prompt TEXT, or --prompts FILE (- reads standard input)")
    return found


def _read(source: str) -> list[Prompt]:
    text = sys.stdin.read() if source == "-" else read_text(Path(source))
    name = "standard input" if source == "-" else source
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise TrimtabError(f"{name} has no prompts in it; write one a line")
    if source.endswith((".jsonl", ".ndjson")) or all(line.lstrip().startswith("{") for _, line in lines):
        return [_row(line, f"{name}:{number}") for number, line in lines]
    return [line for _, line in lines]


def _row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{where}: not JSON: {error}") from None
    keys = [key for key in ("prompt", "messages") if isinstance(row, dict) and key in row]
    if len(keys) != 1:
        raise TrimtabError(f'{where}: an object with either "prompt" or "messages" was expected')
    value = row[keys[0]]
    if keys[0] == "prompt":
        if not isinstance(value, str) or not value.strip():
            raise TrimtabError(f"{where}: the prompt is empty or no text")
        return value
    if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
        raise TrimtabError(f'{where}: messages are a list of {{"role": "user", "content": "…"}}')
    return value


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
