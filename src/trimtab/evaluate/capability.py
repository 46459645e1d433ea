"""What a steering costs in capability: knowledge by two letters (MMLU, TruthfulQA), and word problems (GSM8K).

MMLU and TruthfulQA are used in the two-option form of Rimsky et al. (2312.06681, section 7) and scored as in `ab`: the
correct letter's share, the mass, and whether it is the more probable letter. The paper's averages are means over
categories (`macro_average`). GSM8K (Cobbe et al., 2110.14168) is generated and matched exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import category_of, evenly_spaced
from trimtab.evaluate.records import ArmPrompt, Record, with_system
from trimtab.steering import Steering
from trimtab.text.text_files import read_text

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation

ANSWER_INSTRUCTION = "\n\nThink step by step. End with a last line that is #### and the answer as a number."
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MATH_SCORES = ("correct", "marked")


@dataclass(frozen=True)
class MathItem:
    """A word problem and its numeric answer."""

    item: str
    question: str
    answer: Decimal


def read_gsm8k(path: str | Path, limit: int | None = None) -> list[MathItem]:
    """The items of a JSONL file with `question` and `answer`, which ends with `#### number`; at most `limit`, evenly
    spaced.

    Raises `TrimtabError` for a file or a row that can't be read.
    """
    path, items = Path(path), []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"], _number(row["answer"].rpartition("####")[2])
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise TrimtabError(f"{path}:{number}: an object with question and answer was expected") from None
        if answer is None or not isinstance(question, str) or not question.strip():
            raise TrimtabError(f"{path}:{number}: the question is empty, or the answer doesn't end with #### number")
        items.append(MathItem(str(number), question, answer))
    if not items:
        raise TrimtabError(f"{path} has no questions in it")
    return evenly_spaced(items, limit)


def final_number(text: str) -> tuple[Decimal | None, bool]:
    """The final number of an answer, and whether it was marked: the first after the last `####`, else the last in the
    text.

    Thousands separators and dollar signs are dropped. `None` if there is no number.
    """
    marked = text.rpartition("####")[2] if "####" in text else ""
    if numbers := NUMBER.findall(marked):
        return _number(numbers[0]), True
    numbers = NUMBER.findall(text)
    return (_number(numbers[-1]) if numbers else None), False


def math_requests(
    items: Sequence[MathItem], arms: Mapping[str, Steering | None], systems: Mapping[str, str] | None = None
) -> list[ArmPrompt]:
    """One request per problem and arm, with `ANSWER_INSTRUCTION` appended. `systems[arm]` is the arm's system
    message.
    """
    systems = systems or {}
    return [
        ArmPrompt(arm, item.item, with_system(item.question + ANSWER_INSTRUCTION, systems.get(arm)), steering)
        for item in items
        for arm, steering in arms.items()
    ]


def math_scorer(items: Sequence[MathItem]) -> Callable[[ArmPrompt, Generation], dict[str, float]]:
    """A function that scores `correct` (the number is the item's) and `marked` (it follows `####`, as requested)."""
    answers = {item.item: item.answer for item in items}

    def score(request: ArmPrompt, generation: Generation) -> dict[str, float]:
        number, marked = final_number(generation.text)
        return {"correct": float(number == answers[request.item]), "marked": float(marked)}

    return score


def macro_average(records: Sequence[Record], score: str) -> dict[str, float]:
    """For each arm, the mean of the category means (the paper's "Average" row)."""
    values: dict[str, dict[str, list[float]]] = {}
    for record in records:
        values.setdefault(record.arm, {}).setdefault(category_of(record), []).append(record.scores[score])
    return {arm: mean(mean(category_values) for category_values in parts.values()) for arm, parts in values.items()}


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip().replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
