"""The input and output of an evaluation: a request, and the record of its answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.text.chat import Prompt

FORMAT = 1
FORMAT_KEY = "trimtab_records"


@dataclass(frozen=True)
class ArmPrompt:
    """One prompt to be answered in one arm of an evaluation.

    `arm` names the condition ("unsteered", "steered"), `item` the question, which is the same in every arm. Items that
    aren't independent of each other (several instructions on one query) share a `group`.
    """

    arm: str
    item: str
    prompt: Prompt
    steering: Steering | None = None
    group: str | None = None


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt as it is, or, if there is a system message, as messages that start with it."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [{"role": "system", "content": system}, *messages]


@dataclass(frozen=True)
class Record:
    """One answer, its steering, and its scores.

    `tokens` counts the generated ones; `finish` is `"stop"`, `"length"`, or `"scored"` if nothing was generated;
    `steering` is the digest of the steering, `edits` those that acted, and `dose` the largest mean `‖edit‖ /
    ‖activation‖` of any layer. `seed` is that of the request's batch, `None` for greedy decoding.
    """

    arm: str
    item: str
    prompt: Prompt
    answer: str
    tokens: int
    finish: str
    steering: str | None = None
    edits: tuple[str, ...] = ()
    dose: float = 0.0
    seed: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    group: str | None = None

    def to_json(self) -> str:
        """The record as one line of JSON, without the newline; NaN and infinities become null."""
        data = asdict(self)
        data["dose"] = _finite(self.dose)
        data["scores"] = {name: _finite(value) for name, value in self.scores.items()}
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record of a line; null numbers become NaN. Raises `TrimtabError` for any other line."""
        try:
            data = json.loads(line)
            if set(data) != {f.name for f in fields(cls)}:
                raise TypeError("its keys aren't those of a record")
            data["edits"] = tuple(data["edits"])
            data["dose"] = _number(data["dose"])
            data["scores"] = {name: _number(value) for name, value in data["scores"].items()}
            return cls(**data)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TrimtabError(f"this isn't a record: {error}") from None


def read_records(path: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of a file that `answer` wrote; an incomplete last line is ignored.

    Raises `TrimtabError` if the file doesn't exist, is of another kind, or has a damaged line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrimtabError(f"can't read {path}: {error.strerror}") from None
    header, records = split_records(data, path)
    return header, records


def split_records(data: bytes, path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records in a file's bytes. Raises as `read_records` does."""
    first, *rest = data.split(b"\n")[:-1] or [b""]
    try:
        header = json.loads(first)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get(FORMAT_KEY) != FORMAT:
        raise TrimtabError(f"{path} isn't a file of records (format {FORMAT}); name another file")
    records = []
    for number, line in enumerate(rest, 2):
        try:
            records.append(Record.from_json(line.decode()))
        except (TrimtabError, UnicodeDecodeError) as error:
            raise TrimtabError(f"{path}:{number}: {error}; the file is damaged, delete it to start again") from None
    return header, records


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
