"""Examples: questions with their answers, which become earlier turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.text.columns import Columns, Row, is_blank, unused_prompt_columns
from trimtab.text.messages import is_text
from trimtab.text.tables import read_rows


def read_examples(path: str | Path) -> list[tuple[str, str]]:
    """The examples in a file of any format that `read_pairs` reads: rows with `prompt` and `answer`, both texts.

    Raises `TrimtabError`, naming the file and the line, for a missing file, a row without either, a row with other
    columns that are part of its prompt, or no rows.
    """
    path = Path(path)
    examples = []
    for where, row in read_rows(path):
        cells = Row.of(row if isinstance(row, Mapping) else {}, Columns())
        for part in ("prompt", "answer"):
            cells.take(part, where)
        prompt, answer = (cells.parts.get(part) for part in ("prompt", "answer"))
        if not all(is_text(side) and not is_blank(side) for side in (prompt, answer)):
            raise TrimtabError(f"{where}: an example needs a prompt and an answer, both non-empty strings")
        if unused := unused_prompt_columns(row, prompt):
            raise TrimtabError(f"{where}: column {unused[0]!r} isn't used; write it into the prompt, or remove it")
        examples.append((str(prompt), str(answer)))
    if not examples:
        raise TrimtabError(f"{path} has no examples in it; write one per row, with prompt and answer")
    return examples
