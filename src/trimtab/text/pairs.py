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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError


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
    return Pair(row["positive"], row["negative"], prompt, "answers" if prompt else "texts")


def _letters(row: dict[str, str]) -> Pair:
    matching, other = row["answer_matching_behavior"], row["answer_not_matching_behavior"]
    return Pair(matching.strip(), other.strip(), row["question"], "letters")


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
    rows = list(_rows(path))
    if not rows:
        raise TrimtabError(f"{path} has no pairs in it")
    pairs = [_pair(row, f"{path}:{line}") for line, row in rows]
    for (line, _), pair in zip(rows, pairs, strict=True):
        if pair.shape != pairs[0].shape:
            raise TrimtabError(f"{path}:{line}: a pair of {pair.shape} among pairs of {pairs[0].shape}; split the file")
    return pairs


def pairs_from_rows(rows: Iterable[dict[str, Any]], name: str = "pairs") -> list[Pair]:
    """Pairs from dictionaries in one of the shapes. Raises `TrimtabError` as `read_pairs` does."""
    pairs = [_pair(row, f"{name}[{i}]") for i, row in enumerate(rows)]
    if not pairs:
        raise TrimtabError(f"{name} is empty")
    return pairs


def digest(pairs: Sequence[Pair]) -> str:
    """A digest of the pairs, in their order."""
    text = json.dumps([asdict(pair) for pair in pairs], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    """The rows of a file with their line numbers (in a JSON list: item numbers from 1)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TrimtabError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrimtabError(f"can't read {path} as UTF-8 text: {error}") from error
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, _json(line, f"{path}:{number}")
    elif kind == ".json":
        items = _json(text, str(path)) if text.strip() else []
        if not isinstance(items, list):
            raise TrimtabError(f"{path} must hold a list of objects, it holds a {type(items).__name__}")
        yield from enumerate(items, 1)
    elif kind == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise TrimtabError(f"{path}:{reader.line_num}: {len(reader.fieldnames or [])} columns expected")
                yield reader.line_num, row
        except csv.Error as error:
            raise TrimtabError(f"{path}:{reader.line_num}: {error}") from error
    else:
        raise TrimtabError(f"{path}: pairs come as .jsonl, .json or .csv, not {kind or 'a file without a suffix'}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TrimtabError(f"{where}: not JSON: {error}") from None


def _pair(row: Any, where: str) -> Pair:
    if not isinstance(row, dict):
        raise TrimtabError(f"{where}: an object was expected, got {type(row).__name__}")
    for keys, make in SHAPES.items():
        if not set(keys) <= set(row):
            continue
        for key in keys:
            if not isinstance(row[key], str) or not row[key].strip():
                raise TrimtabError(f"{where}: {key!r} is empty or no text; a pair needs both sides")
        pair = make(row)
        if pair.positive == pair.negative:
            raise TrimtabError(f"{where}: both sides of the pair are the same")
        return pair
    sided = [key for keys in SHAPES for key in keys if key in row]
    hint = f"it has {', '.join(map(repr, sided))} but not the rest" if sided else f"its keys are {', '.join(row)}"
    raise TrimtabError(f"{where}: no pair: {hint}. Shapes: {'; '.join(' + '.join(keys) for keys in SHAPES)}")
