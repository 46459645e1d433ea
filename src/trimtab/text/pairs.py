"""Contrastive pairs: what a steering is learned from, in the shapes that people have.

Three shapes are read, from JSONL, JSON (a list of objects) or CSV (a header line):

- `positive`, `negative`, and optionally `prompt`. With a prompt, they are two answers to it; without one, two
  texts.
- `question`, `answer_matching_behavior`, `answer_not_matching_behavior`: CAA's multiple-choice records, whose
  answers are bracketed letters such as `(A)`.
- `prompt`, `prompt_without_instruction`: two prompts, with and without an instruction.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.text.letters import letter_of
from trimtab.text.read import read_text


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in what is to be learned: `prompt + positive` and `prompt + negative`.

    `shape` says what they are: `"answers"` to the prompt, bare `"texts"` (no prompt), multiple-choice
    `"letters"` (the prompt is the question), or `"prompts"` (no prompt; each is one).
    """

    positive: str
    negative: str
    prompt: str = ""
    shape: str = "texts"


def _answers(row: dict[str, str]) -> Pair:
    prompt = row.get("prompt") or ""
    return Pair(row["positive"], row["negative"], prompt, "answers" if prompt.strip() else "texts")


def _letters(row: dict[str, str]) -> Pair:
    matching, other = row["answer_matching_behavior"].strip(), row["answer_not_matching_behavior"].strip()
    letter_of(matching), letter_of(other)
    return Pair(matching, other, row["question"], "letters")


def _prompts(row: dict[str, str]) -> Pair:
    return Pair(row["prompt"], row["prompt_without_instruction"], "", "prompts")


SHAPES: dict[tuple[str, ...], Callable[[dict[str, str]], Pair]] = {
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"): _letters,
    ("prompt", "prompt_without_instruction"): _prompts,
    ("positive", "negative"): _answers,
}


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a `.jsonl`, `.json` or `.csv` file.

    Raises `TrimtabError` naming the file and the line (or item) for a missing file, a malformed row, a row in
    none of the shapes, a one-sided pair, rows of different shapes, or a file without rows.
    """
    path = Path(path)
    pairs = _pairs(_rows(path))
    if not pairs:
        raise TrimtabError(f"{path} has no pairs in it; write one a row: {_shapes()}")
    return pairs


def pairs_from_rows(rows: Iterable[dict[str, Any]], name: str = "pairs") -> list[Pair]:
    """Pairs from dictionaries in one of the shapes. Raises `TrimtabError` as `read_pairs` does."""
    pairs = _pairs((f"{name}[{i}]", row) for i, row in enumerate(rows))
    if not pairs:
        raise TrimtabError(f"{name} is empty")
    return pairs


def rows_from_text(text: str, name: str = "pairs") -> list[dict[str, Any]]:
    """The rows of what somebody typed or pasted: a JSON list, JSONL or CSV, told apart by how it begins.

    They go to `pairs_from_rows`. Raises `TrimtabError` for text that is none of these, naming the line.
    """
    begins = text.lstrip("\ufeff \t\r\n")
    if not begins:
        raise TrimtabError(f"{name} is empty; write one a row: {_shapes()}")
    kind = ".json" if begins.startswith("[") else ".jsonl" if begins.startswith("{") else ".csv"
    rows = list(READERS[kind](Path(name), begins.replace("\r\n", "\n")))
    for where, row in rows:
        _pair(row, where)  # here the error can name the line
    if not rows:
        raise TrimtabError(f"{name} has no rows; write one a row: {_shapes()}")
    return [row for _, row in rows]


def digest(pairs: Sequence[Pair]) -> str:
    """A digest of the pairs, in their order."""
    text = json.dumps([asdict(pair) for pair in pairs], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pairs(rows: Iterable[tuple[str, Any]]) -> list[Pair]:
    pairs: list[Pair] = []
    for where, row in rows:
        pair = _pair(row, where)
        if pairs and pair.shape != pairs[0].shape:
            raise TrimtabError(f"{where}: a pair of {pair.shape} among pairs of {pairs[0].shape}; split the file")
        pairs.append(pair)
    return pairs


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, and where each is: `file:line`, or in a JSON list `file: item 1`."""
    kind = path.suffix.lower()
    if kind not in READERS:
        raise TrimtabError(f"{path}: pairs come as .jsonl, .json or .csv, not {kind or 'a file without a suffix'}")
    return READERS[kind](path, read_text(path))


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at U+2028, which JSON allows
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    items = _parse(text, str(path)) if text.strip() else []
    if not isinstance(items, list):
        raise TrimtabError(f"{path} must hold a list of objects, it holds a {type(items).__name__}")
    for number, item in enumerate(items, 1):
        yield f"{path}: item {number}", item


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or [])
                raise TrimtabError(f"{path}:{reader.line_num}: {columns} columns expected, as in the header line")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise TrimtabError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from error


READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"{where}: not JSON: {error}") from None


def _pair(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise TrimtabError(f"{where}: an object was expected, got {type(row).__name__}")
    for keys, make in SHAPES.items():
        if not set(keys) <= set(row):
            continue
        for key in keys:
            if not _is_text(row[key]) or not row[key].strip():
                raise TrimtabError(f"{where}: {key!r} is empty or no text; a pair needs both sides")
        if not _is_text(row.get("prompt") or ""):
            raise TrimtabError(f"{where}: 'prompt' is no text")
        try:
            pair = make(row)
        except TrimtabError as error:
            raise TrimtabError(f"{where}: {error}") from None
        if pair.positive == pair.negative:
            raise TrimtabError(f"{where}: both sides of the pair are the same")
        return pair
    sided = [key for key in dict.fromkeys(key for keys in SHAPES for key in keys) if key in row]
    has = f"it has {', '.join(map(repr, sided))} but not the rest" if sided else f"its keys are {', '.join(row)}"
    raise TrimtabError(f"{where}: no pair: {has}. Shapes: {_shapes()}")


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written as UTF-8: JSON can hold halves of surrogate pairs, which can't."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _shapes() -> str:
    return "; ".join(" + ".join(keys) for keys in SHAPES)
