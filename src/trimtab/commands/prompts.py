"""The prompts for `trimtab generate` and other commands: from options, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.errors import TrimtabError
from trimtab.text.chat import Prompt
from trimtab.text.columns import ALIASES, columns_of, is_blank, is_nan, unused_prompt_columns
from trimtab.text.images import image_content, read_image
from trimtab.text.messages import as_messages, messages_from_json
from trimtab.text.tables import COLUMNAR, READERS, read_rows
from trimtab.text.text_files import kind_of, read_text

COLUMNS = ("prompt", "messages", "conversations", "question", "instruction", "input", "user", "text")
"""The columns that may hold a row's prompt."""

ColumnOption = Annotated[
    str | None,
    typer.Option(
        help="The column of the prompts' file, or the key of its objects, that holds the prompt. Default: "
        "prompt, messages, conversations, question, instruction, input, user or text.",
        metavar="NAME",
    ),
]


def gather_prompts(texts: Sequence[str], source: str | None, column: str | None = None) -> list[Prompt]:
    """The prompts that are given one by one, followed by those of the file (`-`: standard input).

    A file has one prompt per line, unless its name ends in `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, it is a
    JSON list, or each of its lines begins with `{`. The rows of such a file are texts, lists of messages, or objects.
    An object has its prompt in `column` or one of `COLUMNS`, and may have a `system` prompt.

    Raises `TrimtabError` for no prompts, an empty prompt, a malformed line, and a row whose prompt is ambiguous.
    """
    for text in texts:
        if not text.strip():
            raise TrimtabError("a --prompt is empty; give it some text")
    if column is not None and source is None:
        raise TrimtabError("--column applies to a file of prompts, and there is none; give one, or leave --column out")
    results: list[Prompt] = [*texts, *(_read(source, column) if source else [])]
    if not results:
        raise TrimtabError("there is no prompt; give --prompt TEXT, or --prompts FILE (- reads standard input)")
    return results


def attach_images(prompts: Sequence[Prompt], images: Sequence[str], *, plain: bool = False) -> list[Prompt]:
    """The prompts with these images at the beginning of the last user message.

    Raises `TrimtabError` for a file that isn't an image, plain text, and messages without a user message.
    """
    if plain:
        raise TrimtabError("--image needs the chat template, and --plain doesn't use it; leave one of them out")
    for name in images:
        read_image(Path(name), what=f"--image {name}")
    results: list[Prompt] = []
    for prompt in prompts:
        conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages: list[dict[str, Any]] = [dict(message) for message in conversation]
        user_messages = [message for message in messages if message["role"] == "user"]
        if not user_messages:
            raise TrimtabError("--image belongs to a user message, and a prompt has none")
        user_messages[-1]["content"] = image_content(images, user_messages[-1]["content"])
        results.append(messages)
    return results


def _read(source: str, column: str | None) -> list[Prompt]:
    name = "standard input" if source == "-" else source
    kind = kind_of(Path(source))
    if kind in COLUMNAR or (kind in READERS and not Path(source).is_file()):
        rows: Iterable[tuple[str, Any]] = read_rows(Path(source))  # reports a missing file
    else:
        text = sys.stdin.read() if source == "-" else read_text(Path(source))
        kind = kind if kind in READERS else _kind_of(text)
        if not kind:
            if column is not None:
                raise TrimtabError(
                    f"{name} holds one prompt per line, and has no column {column!r}; leave --column out"
                )
            rows = ((f"{name}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        else:
            rows = READERS[kind](Path(name), text)
    rows = list(rows)
    if not rows:
        raise TrimtabError(f"{name} has no prompts in it; write one per line")
    if kind == ".json" and all(map(_is_message, talk := as_messages([row for _, row in rows]))):
        return [talk]
    return [_prompt(row, where, column) for where, row in rows]


def _kind_of(text: str) -> str:
    """The format of a text without a known suffix: a JSON list, JSON lines, or (empty) one prompt per line."""
    begins = text.lstrip()[:1]
    if begins == "[":
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return ""
        return ".json"
    return (
        ".jsonl" if begins and all(line.lstrip().startswith("{") for line in text.split("\n") if line.strip()) else ""
    )


def _prompt(row: Any, where: str, column: str | None) -> Prompt:
    if not isinstance(row, Mapping):
        if column is not None:
            raise TrimtabError(f"{where}: this isn't a row with columns, so it has no {column!r}; leave --column out")
        return _checked(row, where)
    name = _column(row, where, column)
    prompt = _checked(row[name], where, messages=name in ("messages", "conversations"))
    systems = columns_of(row, ("system", *ALIASES["system"]))
    system_columns = [column for column in systems if column != name and not is_blank(row[column])]
    if not system_columns:
        return prompt
    if len(system_columns) > 1:
        raise TrimtabError(
            f"{where}: {system_columns[0]!r} and {system_columns[1]!r} are two system prompts; take one of them out"
        )
    if not isinstance(row[system_columns[0]], str):
        raise TrimtabError(f"{where}: {system_columns[0]!r} isn't text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if messages[0]["role"] == "system":
        raise TrimtabError(f"{where}: the system prompt is given twice: in the messages, and in a column of its own")
    return [{"role": "system", "content": row[system_columns[0]]}, *messages]


def _column(row: Mapping[str, Any], where: str, wanted: str | None) -> str:
    """The name of the column that holds the row's prompt."""
    has = f"it has {', '.join(map(repr, row))}"
    if wanted is not None:
        if wanted not in row:
            raise TrimtabError(f"{where}: there is no column {wanted!r}; {has}")
        return wanted
    present_columns = columns_of(row, COLUMNS)
    if not present_columns:
        raise TrimtabError(f"{where}: no prompt: {has}; name its column (--column), or call it {COLUMNS[0]!r}")
    filled_columns = [name for name in present_columns if not is_blank(row[name])]
    systems = columns_of(row, ("system", *ALIASES["system"]))
    unread_columns = (
        [name for name in unused_prompt_columns(row, row[filled_columns[0]]) if name not in (*filled_columns, *systems)]
        if filled_columns
        else []
    )
    if filled_columns and len(rivals := [*filled_columns, *unread_columns]) > 1:
        raise TrimtabError(
            f"{where}: {' and '.join(map(repr, rivals))} could each belong to the prompt, and only one is read; choose"
            f" one (--column {rivals[0]}), or write the whole prompt into one"
        )
    return (filled_columns or present_columns)[0]


def _checked(value: Any, where: str, *, messages: bool = False) -> Prompt:
    try:
        value = as_messages(messages_from_json(value) if isinstance(value, str) else value)
    except TrimtabError as error:
        raise TrimtabError(f"{where}: {error}") from None
    if isinstance(value, list) or messages:
        if not isinstance(value, list) or not value or not all(map(_is_message, value)):
            raise TrimtabError(f'{where}: messages are a list of {{"role": "user", "content": "…"}}')
        return value
    if not isinstance(value, str) or is_blank(value):
        raise TrimtabError(f"{where}: the prompt is {'NaN, ' if is_nan(value) else ''}empty or not text")
    return value


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
