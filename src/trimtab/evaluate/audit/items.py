"""The items of an audit: requests and texts that are included in the package, or benchmarks from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.data.read import read_json
from trimtab.errors import TrimtabError
from trimtab.evaluate.ab import ABItem, evenly_spaced, in_both_orders, read_ab
from trimtab.evaluate.refusal import read_refusal
from trimtab.text.letters import letter_of

PACKAGED = "trimtab"


@dataclass(frozen=True)
class Size:
    """The number of items, and the lengths of answers.

    Args:
        name: The name of the size.
        requests: The maximum number of each kind: harmful requests, harmless ones that sound harmful, and questions of
            each A/B set.
        tokens: The length of answers that are only checked for refusal, in tokens.
        prompts: The number of prompts whose answers are checked for fluency.
        long: The length of these answers, in tokens.
        window: The length of the windows in which fluency is measured, in tokens.
        conversations: The number of conversations.
        turns: The number of turns of a conversation.
        turn_tokens: The length of an answer in a conversation, in tokens.
    """

    name: str
    requests: int
    tokens: int
    prompts: int
    long: int
    window: int
    conversations: int
    turns: int
    turn_tokens: int


FULL = Size("full", requests=40, tokens=24, prompts=24, long=96, window=32, conversations=6, turns=10, turn_tokens=16)
QUICK = Size("quick", requests=20, tokens=20, prompts=12, long=64, window=32, conversations=3, turns=4, turn_tokens=12)


@dataclass(frozen=True)
class Items:
    """The items, by kind.

    Args:
        learn_harmful: Harmful requests from which the refusal direction is learned.
        learn_harmless: Harmless requests of the same form, one for each.
        harmful: Other harmful requests, to measure with.
        harmless: Other harmless requests, to measure with.
        borderline: Harmless requests that sound harmful.
        facts: Questions about facts.
        behaviours: Questions about each behaviour.
        texts: Passages of plain text.
        conversations: The user's messages of each conversation.
        sources: The origin of each kind of items, with a digest.
    """

    learn_harmful: tuple[str, ...]
    learn_harmless: tuple[str, ...]
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    borderline: tuple[str, ...]
    facts: tuple[ABItem, ...]
    behaviours: Mapping[str, tuple[ABItem, ...]]
    texts: tuple[str, ...]
    conversations: tuple[tuple[str, ...], ...]
    sources: Mapping[str, str]


def check_protected(names: Sequence[str], items: Items) -> None:
    """Raise `TrimtabError` if one of the names isn't a behaviour of the items."""
    if unknown := [name for name in names if name not in items.behaviours]:
        raise TrimtabError(f"there is no behaviour {unknown[0]!r} to protect; there are {', '.join(items.behaviours)}")


def read_items(folder: str | Path | None = None, behaviours: Sequence[str | Path] = (), size: Size = FULL) -> Items:
    """Read the included items; those of a folder replace the kinds that it has.

    Args:
        folder: A folder with `advbench/harmful_behaviors.csv`, `xstest/xstest_prompts.csv`, `mmlu/mmlu.json` or
            `caa/*/test_dataset_ab.json`; the included items are used for the others.
        behaviours: More A/B files in CAA's format.
        size: The number of items to take of each kind, evenly spaced.

    Returns:
        The items.

    Raises:
        TrimtabError: The folder doesn't exist or has none of these files, or a file can't be read.
    """
    stored = read_json("audit.json")
    n = size.requests
    chosen = Items(
        learn_harmful=tuple(stored["learn"]["harmful"]),
        learn_harmless=tuple(stored["learn"]["harmless"]),
        harmful=tuple(evenly_spaced(stored["harmful"], n)),
        harmless=tuple(evenly_spaced(stored["harmless"], n)),
        borderline=tuple(evenly_spaced(stored["borderline"], n)),
        facts=_packaged_items(stored["facts"], "facts", n),
        behaviours={name: _packaged_items(rows, name, n) for name, rows in stored["behaviours"].items()},
        texts=tuple(evenly_spaced(stored["texts"], max(1, size.conversations))),
        conversations=tuple(
            tuple(conversation[: size.turns])
            for conversation in evenly_spaced(stored["conversations"], size.conversations)
        ),
        sources={},
    )
    source_by_kind = dict.fromkeys(
        ("harmful", "borderline", "facts", *(f"A/B: {name}" for name in chosen.behaviours)), PACKAGED
    )
    if folder is not None:
        chosen, folder_sources = _from_folder(Path(folder), chosen, n)
        source_by_kind = {
            kind: name for kind, name in source_by_kind.items() if "A/B: " not in kind or kind[5:] in chosen.behaviours
        }
        source_by_kind |= folder_sources
    for file in map(Path, behaviours):
        name = file.parent.name if file.stem.startswith("test_dataset") else file.stem
        items, _ = read_ab(file, exclude=True, limit=n)
        chosen = replace(chosen, behaviours={**chosen.behaviours, name: tuple(in_both_orders(items))})
        source_by_kind[f"A/B: {name}"] = file.name
    kinds = {
        "harmful": chosen.harmful,
        "borderline": chosen.borderline,
        "facts": [item.question for item in chosen.facts],
        **{f"A/B: {name}": [item.question for item in items] for name, items in chosen.behaviours.items()},
    }
    return replace(
        chosen, sources={kind: f"{source_by_kind[kind]} {_digest(prompts)}" for kind, prompts in kinds.items()}
    )


def _from_folder(folder: Path, items: Items, n: int) -> tuple[Items, dict[str, str]]:
    if not folder.is_dir():
        raise TrimtabError(f"there is no folder {folder}; leave out --data to use the included items")
    new: dict[str, Any] = {}
    source_by_kind = {}
    if (file := folder / "advbench" / "harmful_behaviors.csv").is_file():
        new["harmful"] = tuple(item.prompt for item in read_refusal(file, n))
        source_by_kind["harmful"] = "AdvBench"
    if (file := folder / "xstest" / "xstest_prompts.csv").is_file():
        new["borderline"] = tuple(item.prompt for item in read_refusal(file, n) if not item.harmful)
        source_by_kind["borderline"] = "XSTest"
    if (file := folder / "mmlu" / "mmlu.json").is_file():
        new["facts"] = tuple(in_both_orders(read_ab(file, exclude=True, limit=n)[0]))
        source_by_kind["facts"] = "MMLU"
    sets = {}
    for file in sorted((folder / "caa").glob("*/test_dataset_ab.json")):
        sets[file.parent.name] = tuple(in_both_orders(read_ab(file, exclude=True, limit=n)[0]))
        source_by_kind[f"A/B: {file.parent.name}"] = f"CAA {file.parent.name}"
    if sets:
        new["behaviours"] = sets
    if not new:
        raise TrimtabError(
            f"{folder} has none of advbench/harmful_behaviors.csv, xstest/xstest_prompts.csv, mmlu/mmlu.json,"
            " caa/*/test_dataset_ab.json; leave out --data to use the included items"
        )
    return replace(items, **new), source_by_kind


def _packaged_items(rows: Sequence[Mapping[str, str]], name: str, limit: int) -> tuple[ABItem, ...]:
    items = [
        ABItem(
            f"{name}/{number}",
            row["question"],
            letter_of(row["answer_matching_behavior"]),
            letter_of(row["answer_not_matching_behavior"]),
        )
        for number, row in enumerate(rows, 1)
    ]
    return tuple(in_both_orders(evenly_spaced(items, limit)))


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:12]
