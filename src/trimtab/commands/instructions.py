"""The sources of `trimtab learn instruct` other than a file of pairs: a sentence, or every type of instruction.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data import (
    COMMON_LANGUAGES,
    InstructionType,
    Recognised,
    instruction_pairs,
    instruction_types,
    queries,
    recognise,
)
from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair

LANGUAGE = "language:response_language"


@dataclass(frozen=True)
class InstructionDataset:
    """Pairs to learn an instruction from, the operation that suits it, and the options for its card."""

    name: str
    pairs: tuple[Pair, ...]
    operation: str
    options: dict[str, Any]
    remark: str = ""


def instruction_dataset(sentence: str, base: Sequence[str]) -> InstructionDataset:
    """A lesson on one instruction, in the user's words and, if its type is recognized, in other phrasings of it.

    Raises `TrimtabError` for an empty sentence.
    """
    sentence = " ".join(sentence.split())
    if not sentence:
        raise TrimtabError('--instruction is empty; write a sentence: --instruction "Answer in all lowercase letters."')
    recognised = recognise(sentence)
    phrasings = (sentence, *recognised.type.phrasings("learn", recognised.values)) if recognised else (sentence,)
    about = {
        "instruction": sentence,
        **({"type": recognised.type.name, "values": dict(recognised.values)} if recognised else {}),
    }
    return _make_dataset(
        recognised.type if recognised else None, "instruction", base, phrasings, about, _remark(recognised)
    )


def all_instruction_datasets(base: Sequence[str]) -> list[InstructionDataset]:
    """One lesson for each of IFEval's types; for the language type, one for each of the common languages.

    Other parameters, such as the number of bullet points, take a few values in turn.
    """
    datasets = []
    for name, kind in instruction_types().items():
        each = [{"language": language} for language in COMMON_LANGUAGES] if name == LANGUAGE else [{}]
        for values in each:
            stem = "_".join((name.partition(":")[2], *(str(value).lower() for value in values.values())))
            about = {"type": name, "values": values}
            datasets.append(_make_dataset(kind, stem, base, kind.phrasings("learn", values), about))
    return datasets


def base_queries(limit: int | None) -> tuple[str, ...]:
    """The package's queries for learning, or the first `limit` of them."""
    return queries("learn", more=True)[:limit]


def _make_dataset(
    kind: InstructionType | None,
    name: str,
    base: Sequence[str],
    phrasings: Sequence[str],
    about: dict[str, Any],
    remark: str = "",
) -> InstructionDataset:
    different = tuple(dict.fromkeys(phrasings))
    formats = kind is None or kind.kind == "format"
    return InstructionDataset(
        name,
        tuple(instruction_pairs(base, different)),
        # lengths and words use a fixed weight, as in the paper: the length of the learned difference
        "project" if formats else "add",
        {**{key: value for key, value in about.items() if value}, "phrasings": _digest(different), "queries": "learn"},
        remark,
    )


def _remark(recognised: Recognised | None) -> str:
    if recognised is None:
        return "no known type of instruction: learning from the sentence alone"
    values = ", ".join(f"{name} {value}" for name, value in recognised.values.items())
    how = "" if recognised.exact else f", by its similarity ({recognised.likeness:.0%}) to a phrasing of it"
    return f"recognized as {recognised.type.name}{f' ({values})' if values else ''}{how}"


def _digest(phrasings: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(phrasings), ensure_ascii=False).encode()).hexdigest()[:16]
