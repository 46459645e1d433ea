"""Contrastive pairs, which steerings are learned from, in the shapes that data sets have.

Four shapes are read, from JSONL, JSON (a list of objects), CSV and TSV (a header line) or Parquet:

- `positive`, `negative`, and optionally `prompt`. With a prompt, they are two answers to it; without one, two texts.
- `question`, `answer_matching_behavior`, `answer_not_matching_behavior`: CAA's multiple-choice records, whose answers
  are bracketed letters such as `(A)`.
- `prompt`, `prompt_without_instruction`: two prompts, with and without an instruction.
- `statement`, `label`, and optionally `prompt`: single texts, true or false, which are paired (see `statements`).

Some of these have aliases (see `columns.ALIASES`), and `keys` names columns that go by other names. A column that isn't
read but may matter is an error, unless it is ignored explicitly.

In JSONL and JSON a prompt or an answer may be a list of chat messages, as `{"role": …, "content": …}`. Such an answer
ends with the assistant's message, and the messages before it continue the prompt. `system` is both sides' system
prompt; `positive_system` and `negative_system` are each side's own, and then the rest of the two sides may be the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords, keywords
from trimtab.text.chat import Prompt
from trimtab.text.columns import ALIASES, Columns, Row, check_choice_columns, is_blank, is_nan
from trimtab.text.doubtful import warn_of_doubtful
from trimtab.text.letters import letter_of
from trimtab.text.messages import (
    Conversation,
    as_messages,
    conversation,
    includes_prompt,
    is_text,
    is_turn,
    messages_from_json,
    messages_from_transcript,
    starts_conversation,
)
from trimtab.text.statements import Statement, label_of, pair_up
from trimtab.text.tables import READERS, read_rows

Content = str | Conversation


@class_keywords
@dataclass(frozen=True)
class Pair:
    """Two sides that differ in the thing to be learned: `prompt + positive` and `prompt + negative`.

    `shape` says what they are: `"answers"` to the prompt, bare `"texts"` (no prompt), multiple-choice `"letters"` (the
    prompt is the question), or `"prompts"` (each side is one, and `prompt` is empty).

    A prompt, and a side that is an answer or a prompt, is a text or a conversation: chat messages as tuples of role and
    content. A list of `{"role": …, "content": …}` is converted to one. An answer that is a conversation ends with the
    assistant's message, and the messages before that continue the prompt. A system prompt of `None` leaves it to the
    chat template, which may have its own default. `sides` returns both sides with the prompt.

    Raises `TrimtabError` for a conversation or a system prompt where the shape allows none, malformed messages, and a
    side with two system prompts.
    """

    positive: Content
    negative: Content
    prompt: Content = ""
    shape: str = "texts"
    positive_system: str | None = None
    negative_system: str | None = None

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "prompt"):
            if not isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, conversation(value, name))
        _check(self)


@dataclass(frozen=True)
class Side:
    """One side of a pair: a prompt under a system prompt, and the answer to it.

    For bare texts the answer is the text and the prompt is empty; for prompts the answer is empty.
    """

    prompt: Content
    answer: str
    system: str | None = None


def sides(pair: Pair) -> tuple[Side, Side]:
    """The positive and the negative side of a pair."""
    return _side(pair, pair.positive, pair.positive_system), _side(pair, pair.negative, pair.negative_system)


def as_prompt(words: Content) -> Prompt:
    """The input for a chat template: a text, or messages."""
    return words if isinstance(words, str) else [{"role": role, "content": content} for role, content in words]


def as_texts(pair: Pair, caller: str) -> tuple[str, str, str]:
    """The prompt, the positive and the negative side of a pair that has only plain texts, for methods that need these.

    Raises `TrimtabError`, naming the `caller`, for messages or a system prompt.
    """
    prompt, positive, negative = pair.prompt, pair.positive, pair.negative
    if not (isinstance(prompt, str) and isinstance(positive, str) and isinstance(negative, str)):
        raise TrimtabError(f"{caller} takes pairs of plain texts, but this one has chat messages")
    if pair.positive_system is not None or pair.negative_system is not None:
        raise TrimtabError(f"{caller} takes pairs without system prompts, but this one has one")
    return prompt, positive, negative


def _check(pair: Pair) -> None:
    """Raises `TrimtabError` if rendering would have to drop a part of the pair."""
    systems = [system for system in (pair.positive_system, pair.negative_system) if system is not None]
    conversations_given = [words for words in (pair.prompt, pair.positive, pair.negative) if not isinstance(words, str)]
    if systems and pair.shape == "texts":
        raise TrimtabError("a system prompt needs a prompt after it, but bare texts have none; give one")
    if conversations_given and pair.shape in ("texts", "letters"):
        raise TrimtabError(f"the prompt and both sides of pairs of {pair.shape} are texts, not messages")
    if pair.shape != "answers":
        conversations = [words for words in (pair.positive, pair.negative) if not isinstance(words, str)]
        if any(words[-1][0] == "assistant" for words in conversations):
            raise TrimtabError("a prompt ends where the answer begins, but these messages end with the assistant's")
    for side in sides(pair):
        if conversations_given and pair.shape == "answers" and not side.prompt:
            raise TrimtabError(f"{side.answer!r} has no prompt; give one, or messages on both sides")
        if side.system is not None and not isinstance(side.prompt, str) and "system" in dict(side.prompt):
            raise TrimtabError("the system prompt is given twice: in the messages, and separately")


def _side(pair: Pair, words: Content, system: str | None) -> Side:
    if pair.shape == "prompts":
        return Side(words, "", system)
    if isinstance(words, str):
        return Side(pair.prompt, words, system)
    *before, (role, answer) = words
    if role != "assistant":
        raise TrimtabError(
            f"an answer ends with the assistant's message, this one with the {role}'s; two prompts are"
            " 'prompt' and 'prompt_without_instruction'"
        )
    if not answer.strip():
        raise TrimtabError("an answer is empty: the assistant's last message says nothing")
    if not before:
        if not pair.prompt:
            raise TrimtabError("nothing comes before the assistant's message; give a prompt")
        if not isinstance(pair.prompt, str) and pair.prompt[-1][0] == "assistant":
            raise TrimtabError(
                "the prompt ends with an unfinished answer; give the rest of it as a text, not as a message"
            )
        return Side(pair.prompt, answer, system)
    opening = (("user", pair.prompt),) if isinstance(pair.prompt, str) and pair.prompt else pair.prompt or ()
    assert not isinstance(opening, str)
    return Side((*opening, *before), answer, system)


def _answers(row: Mapping[str, Any]) -> Pair:
    prompt = row.get("prompt") or ""
    if all(includes_prompt(row[side], prompt) for side in ("positive", "negative")):
        prompt = ""
    for side in ("positive", "negative"):
        if not is_blank(prompt) and starts_conversation(row[side], prompt):
            raise TrimtabError(
                f"the messages of the {side} side begin with {row[side][0]['role']!r}, and the prompt, which is"
                " different, would come before that; leave the prompt out, or remove it from the messages"
            )
    if not isinstance(prompt, str) or prompt.strip():
        return Pair(row["positive"], row["negative"], prompt, "answers", *_systems(row))
    if isinstance(row["positive"], str) and isinstance(row["negative"], str):
        return Pair(row["positive"], row["negative"], prompt, "texts", *_systems(row))
    return Pair(row["positive"], row["negative"], "", "answers", *_systems(row))


def _letters(row: Mapping[str, Any]) -> Pair:
    matching, other = row["answer_matching_behavior"].strip(), row["answer_not_matching_behavior"].strip()
    if not any(LETTER_LIKE.fullmatch(answer) for answer in (matching, other)):
        return Pair(matching, other, row["question"], "answers", *_systems(row))
    letter_of(matching), letter_of(other)
    return Pair(matching, other, row["question"], "letters", *_systems(row))


def _prompts(row: Mapping[str, Any]) -> Pair:
    return Pair(row["prompt"], row["prompt_without_instruction"], "", "prompts", *_systems(row))


def _systems(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Both sides' system prompts. An empty one counts as none, as in a table where only some rows have one."""
    systems: dict[str, str] = {}
    for key in SYSTEMS:
        if (value := row.get(key)) is None:
            continue
        if not is_text(value):
            raise TrimtabError(f"{key!r} isn't text")
        if value.strip():
            systems[key] = value
    if "system" in systems and len(systems) > 1:
        raise TrimtabError("'system' is the system prompt of both sides; give either it or the sides' own")
    both = systems.get("system")
    return systems.get("positive_system", both), systems.get("negative_system", both)


def _statement(row: Mapping[str, Any]) -> Statement:
    prompt = row.get("prompt") or ""
    under = prompt if isinstance(prompt, str) else conversation(prompt, "prompt")
    content = row["statement"] if isinstance(row["statement"], str) else conversation(row["statement"], "statement")
    return Statement(content, label_of(row["label"]), (under, *_systems(row)))


Pairs = Iterable["Pair | Mapping[str, Any] | Sequence[Any]"]
"""Anything that `as_pairs` accepts."""
KINDS = "Pair, of (positive, negative), of (prompt, positive, negative), or of dictionaries"

SHAPES: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Pair | Statement]] = {
    ("question", "answer_matching_behavior", "answer_not_matching_behavior"): _letters,
    ("prompt", "prompt_without_instruction"): _prompts,
    ("positive", "negative"): _answers,
    ("statement", "label"): _statement,
}
LETTER_LIKE = re.compile(r"\W*\w(\W*|[).:].*)", re.DOTALL)
"""An answer that is, or begins with, a letter or number of a choice, correctly formatted or not; others are texts."""
SYSTEMS = ("system", "positive_system", "negative_system")
ANSWERS = ("positive", "negative", "statement")
MESSAGE_PARTS = ("prompt", "prompt_without_instruction", *ANSWERS)
"""Parts that may be a list of messages."""
KEYS = tuple(dict.fromkeys((*MESSAGE_PARTS, *SYSTEMS, *(key for keys in SHAPES for key in keys))))
"""All keys that are read from a row."""


@keywords
def read_pairs(path: str | Path, *, keys: Mapping[str, str] | None = None, ignore: Iterable[str] = ()) -> list[Pair]:
    """The pairs of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file.

    Args:
        path: The file.
        keys: The columns of parts that have other names: `{"positive": "answer_a", "negative": "answer_b"}`.
        ignore: Columns to leave out.

    Returns:
        The pairs, in the order of the file; labelled statements are paired.

    Raises:
        TrimtabError: A missing file, a malformed row, a row in none of the shapes, a one-sided pair, rows of different
            shapes, a column that isn't read but may matter, or no rows. The message names the file and the line (or
            item).
    """
    if not isinstance(path, (str, PathLike)):
        raise TrimtabError(
            f"read_pairs reads a file, got {type(path).__name__}; "
            "pairs in a list are passed directly to the learning function"
        )
    return read_pairs_with(Path(path), Columns.of(KEYS, keys, ignore))


def read_pairs_with(path: str | Path, columns: Columns) -> list[Pair]:
    """`read_pairs` with the column settings of the command line."""
    path = Path(path)
    pairs = _pairs(read_rows(path), columns, str(path))
    if not pairs:
        raise TrimtabError(f"{path} has no pairs in it; write one per row: {_shapes()}")
    return pairs


def pairs_from_rows(
    rows: Iterable[Mapping[str, Any]],
    name: str = "pairs",
    *,
    keys: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
) -> list[Pair]:
    """Pairs from dictionaries in one of the shapes. Raises `TrimtabError` as `read_pairs` does."""
    columns = Columns.of(KEYS, keys, ignore)
    pairs = _pairs(((f"{name}[{i}]", row) for i, row in enumerate(rows)), columns, name)
    if not pairs:
        raise TrimtabError(f"{name} is empty")
    return pairs


def as_pairs(pairs: Pairs) -> list[Pair]:
    """Convert pairs in any supported form.

    Args:
        pairs: Each a `Pair`, a tuple (or list) of `(positive, negative)` or `(prompt, positive, negative)`, or a
            dictionary in one of the shapes. Prompts and answers are texts, or lists of chat messages.

    Returns:
        The same pairs as `Pair`s, in their order. Two sides without a prompt are bare texts.

    Raises:
        TrimtabError: The argument has another form, a pair lacks a side or has the same text on both, or tuples or
            dictionaries have different shapes.

    Examples:
        >>> (pair,) = as_pairs([("How are you?", "Splendid!", "Terrible.")])
        >>> pair.prompt, pair.positive, pair.negative, pair.shape
        ('How are you?', 'Splendid!', 'Terrible.', 'answers')
        >>> [pair.shape for pair in as_pairs([("I love rain.", "I hate rain.")])]
        ['texts']
    """
    if isinstance(pairs, (str, Path)):
        raise TrimtabError(
            f"pairs are given as a list, got {str(pairs)!r}; read a file with read_pairs({str(pairs)!r})"
        )
    if isinstance(pairs, (Pair, Mapping)):
        raise TrimtabError(f"pairs are given as a list, got one {type(pairs).__name__}; put it in a list")
    if hasattr(pairs, "to_dict"):
        raise TrimtabError(f"pairs are given as a list, got a {type(pairs).__name__}; pass its .to_dict('records')")
    if not isinstance(pairs, Iterable):
        raise TrimtabError(f"pairs are given as a list of {KINDS}, got {type(pairs).__name__}")
    items = list(pairs)
    ready = [pair for pair in items if isinstance(pair, Pair)]
    if len(ready) == len(items):
        return ready
    made = [_as_pair(pair, f"pairs[{i}]") for i, pair in enumerate(items)]
    for i, pair in enumerate(made):
        if pair.shape != made[0].shape:
            raise TrimtabError(
                f"pairs[{i}] is a pair of {pair.shape} among pairs of {made[0].shape}; learn from one kind at a time"
            )
    return made


def _as_pair(pair: Any, where: str) -> Pair:
    if isinstance(pair, Pair):
        return pair
    if isinstance(pair, Mapping):
        return _pair_of(dict(pair), where)
    if isinstance(pair, str):
        raise TrimtabError(f"{where} is a text, {pair!r}, not a pair; pairs are a list of {KINDS}")
    if isinstance(pair, (tuple, list)) and len(pair) in (2, 3):
        names = ("positive", "negative") if len(pair) == 2 else ("prompt", "positive", "negative")
        return _pair_of(dict(zip(names, pair, strict=True)), where)
    shown = f"{len(pair)} items" if isinstance(pair, (tuple, list)) else type(pair).__name__
    raise TrimtabError(f"{where} isn't a pair; pairs are a list of {KINDS}, got {shown}")


def _pair_of(row: dict[str, Any], where: str) -> Pair:
    columns = Columns.of(KEYS, None, ())
    columns.check([row], where)
    entry = _read(row, where, columns)
    if isinstance(entry, Statement):
        raise TrimtabError(f"{where} is a labelled statement, not a pair; pairs_from_rows pairs statements")
    return entry


def pairs_from_text(text: str, name: str = "pairs", columns: Columns | None = None) -> list[Pair]:
    """The pairs in typed or pasted text: a JSON list, JSONL, CSV or TSV, distinguished by its beginning.

    Raises `TrimtabError`, naming the line, for text in none of these formats.
    """
    begins = text.lstrip("\ufeff \t\r\n")
    if not begins:
        raise TrimtabError(f"{name} is empty; write one per row: {_shapes()}")
    several = begins.startswith("[") or begins.partition("\n")[0].strip() == "{"
    kind = ".json" if several else ".jsonl" if begins.startswith("{") else ".csv"
    pairs = _pairs(READERS[kind](Path(name), begins.replace("\r\n", "\n")), columns or Columns(), name)
    if not pairs:
        raise TrimtabError(f"{name} has no rows; write one per row: {_shapes()}")
    return pairs


def row_of(pair: Pair) -> dict[str, Any]:
    """The row that a pair can be read from."""
    by_shape = {
        "letters": ("question", "answer_matching_behavior", "answer_not_matching_behavior"),
        "prompts": ("", "prompt", "prompt_without_instruction"),
    }
    names = by_shape.get(pair.shape, ("prompt", "positive", "negative"))
    row = {
        name: as_prompt(words) for name, words in zip(names, (pair.prompt, pair.positive, pair.negative), strict=True)
    }
    systems = {"positive_system": pair.positive_system, "negative_system": pair.negative_system}
    return {name: value for name, value in (*row.items(), *systems.items()) if value}


def digest(pairs: Sequence[Pair]) -> str:
    """A digest of the pairs, in their order."""
    # without `None` values, so that the digest of pairs without system prompts is the same as in earlier versions
    known = [{key: value for key, value in asdict(pair).items() if value is not None} for pair in pairs]
    text = json.dumps(known, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pairs(rows: Iterable[tuple[str, Any]], columns: Columns, name: str) -> list[Pair]:
    rows = list(rows)
    columns.check([row for _, row in rows], name)
    pairs: list[Pair] = []
    statements: list[Statement] = []
    for where, row in rows:
        entry = _read(row, where, columns)
        if isinstance(entry, Statement):
            statements.append(entry)
        else:
            if pairs and entry.shape != pairs[0].shape:
                raise TrimtabError(f"{where}: a pair of {entry.shape} among pairs of {pairs[0].shape}; split the file")
            pairs.append(entry)
        if statements and pairs:
            raise TrimtabError(f"{where}: labelled statements and pairs are in one file; split it")
    if statements:
        return [_paired(*two, name) for two in pair_up(statements, name)]
    check_choice_columns((row for _, row in rows), columns, name)
    warn_of_doubtful(pairs, name)
    return pairs


def _paired(true: Statement, false: Statement, name: str) -> Pair:
    prompt, *systems = true.prompts
    if true.text == false.text:
        raise TrimtabError(f"{name}: the statement {true.text!r} is labelled true and false")
    has_messages = not (isinstance(true.text, str) and isinstance(false.text, str))
    return Pair(true.text, false.text, prompt, "answers" if prompt or has_messages else "texts", *systems)


def _read(row: Any, where: str, columns: Columns) -> Pair | Statement:
    if not isinstance(row, Mapping):
        raise TrimtabError(
            f'{where}: an object was expected, such as {{"positive": "…", "negative": "…"}}, got {type(row).__name__}'
        )
    cells = Row.of(row, columns)
    keys = next((keys for keys in SHAPES if all(map(cells.has, keys))), None)
    if keys is None:
        raise TrimtabError(f"{where}: not a pair: {_describe_columns(cells, row)}. Shapes: {_shapes()}")
    for key in (*keys, *(() if "question" in keys else ("prompt",)), *SYSTEMS):
        cells.take(key, where)
    for key, value in cells.parts.items():
        if is_nan(value):
            raise TrimtabError(f"{where}: {cells.name(key)!r} is NaN, an empty cell; take the row out, or fill it in")
        if key in MESSAGE_PARTS:
            value = cells.parts[key] = _parse_content(value, key, f"{where}: {cells.name(key)!r}")
        if (
            key in keys
            and key != "label"
            and (not _is_content(value, key) or (isinstance(value, str) and is_blank(value)))
        ):
            shown = f" ({value!r}; write it as a text)" if isinstance(value, (bool, int, float)) else ""
            raise TrimtabError(f"{where}: {cells.name(key)!r} is empty or not text{shown}; a pair needs both sides")
    if not _is_content(cells.parts.get("prompt") or "", "prompt"):
        raise TrimtabError(f"{where}: {cells.name('prompt')!r} isn't text")
    try:
        entry = SHAPES[keys](cells.parts)
        both = sides(entry) if isinstance(entry, Pair) else ()
    except TrimtabError as error:
        raise TrimtabError(f"{where}: {error}") from None
    if both and _bare(both[0]) == _bare(both[1]):
        raise TrimtabError(f"{where}: both sides of the pair are the same, apart from surrounding whitespace")
    cells.check_rest(where)
    return entry


def _parse_content(value: Any, part: str, where: str) -> Any:
    """Messages in any of the usual layouts as a list; an answer may be a single message."""
    try:
        words = messages_from_json(value) if isinstance(value, str) else value
        words = messages_from_transcript(words) if isinstance(words, str) else words
    except TrimtabError as error:
        raise TrimtabError(f"{where}: {error}") from None
    return as_messages([words] if part in ANSWERS and is_turn(words) else words)


def _bare(side: Side) -> tuple[Any, ...]:
    """The side's content, without surrounding whitespace."""
    prompt = side.prompt.strip() if isinstance(side.prompt, str) else side.prompt
    return prompt, side.answer.strip(), side.system


def _describe_columns(cells: Row, row: Mapping[str, Any]) -> str:
    known = {*KEYS, *cells.names.values(), *(name for names in ALIASES.values() for name in names)}
    sided = [key for key in row if key in known]
    has = (
        f"it has {', '.join(map(repr, sided))} but not the rest"
        if sided
        else f"its keys are {', '.join(map(str, row))}"
    )
    return f"{has}; if they have other names, say which (--keys positive=COLUMN,negative=COLUMN)"


def _is_content(value: Any, key: str) -> bool:
    """Whether it is a text, or a list if that is allowed; the list's content is checked when it is read."""
    return is_text(value) or (isinstance(value, list) and key in MESSAGE_PARTS)


def _shapes() -> str:
    return "; ".join(" + ".join(keys) for keys in SHAPES)
