"""Tasks of following an instruction on an answer's form, checked by IFEval's code: with it in the prompt, and without.

Methods learn from the package's queries and phrasings. The items are IFEval's own prompts with that one instruction, if
the data folder has them and the instruction is in them word for word, followed by the package's test queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.bench.measures import by_answers
from trimtab.bench.store import Store
from trimtab.bench.tasks import BATCH, PLAIN, PROMPT, TWICE, Cost, Outline, Task, TrainingData
from trimtab.data import instruction_pairs, instruction_type, prompts, queries
from trimtab.evaluate.constraints import is_bullets, is_json
from trimtab.evaluate.ifeval import IFEvalItem, checkers, follows, read_ifeval
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.lm import LM

TYPES = (
    "change_case:english_capital",
    "change_case:english_lowercase",
    "punctuation:no_comma",
    "detectable_format:title",
    "startend:quotation",
    "detectable_format:json_format",
)
"""Types without a number or a word that the answer would have to guess, and that a short answer can follow."""
FILE = Path("ifeval") / "ifeval_single_instr_format.jsonl"
REFERENCE_PROMPTS = 6
PROMPT_TOKENS = 60.0
"""The approximate number of tokens of a question with an instruction."""
PLAIN_ENDS = ("Answer as you usually do.", "Write it in the ordinary way.")
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Item:
    """A query, the instruction that is added to it or contained in it, and the full prompt."""

    name: str
    query: str
    phrase: str
    instructed: str


def outlines(data: Path | None, pairs: int, tokens: int, types: tuple[str, ...] = TYPES) -> list[Outline]:
    """Two tasks per type: without the instruction in the prompt (a steering stands in for it), and with it.

    Raises `TrimtabError` if IFEval's checkers aren't installed.
    """
    checkers()
    built = []
    for kind in types:
        items = _items(kind, data)
        for in_prompt in (False, True):
            name = f"{kind.partition(':')[2]}{' (said)' if in_prompt else ''}"
            make = partial(_task, kind, name, in_prompt, items, pairs, tokens)
            arm = Cost(tokens, tokens + PROMPT_TOKENS)
            written = Cost(2 * tokens, 2 * PROMPT_TOKENS)
            sizes = 2 * (tokens + PROMPT_TOKENS), 2.0 * tokens, PROMPT_TOKENS
            built.append(
                Outline(name, "instructions", len(items), arm, written, *sizes, make, instruction_in_prompt=in_prompt)
            )
    return built


def follows_instruction(kind: str, text: str, cut: bool) -> bool:
    """IFEval's loose verdict; an answer that the token limit cut off is judged by its beginning."""
    if cut and kind == "startend:quotation":
        return text.strip().startswith('"')
    if cut and kind == "detectable_format:json_format":
        return is_json(text, cut=True)
    if cut and kind == "detectable_format:number_bullet_lists":
        return is_bullets(text, cut=True)
    return follows(kind, {}, text, loose=True)


def _items(kind: str, data: Path | None) -> list[Item]:
    """IFEval's items, then the package's."""
    items = []
    if data is not None and (data / FILE).is_file():
        for item in read_ifeval(data / FILE):
            if item.types == (kind,) and (phrase := _phrase(item)):
                assert item.prompt_without_instruction is not None
                items.append(Item(f"IFEval {item.item}", item.prompt_without_instruction, phrase, item.prompt))
    questions = queries("test", more=True)
    phrasings = instruction_type(kind).phrasings("test")
    for n, query in enumerate(questions):
        phrase = phrasings[n % len(phrasings)]
        items.append(Item(f"query {n + 1}", query, phrase, f"{query} {phrase}"))
    return items


def _phrase(item: IFEvalItem) -> str | None:
    """The sentence of the prompt that the version without the instruction lacks; `None` unless there is exactly one."""
    bare = item.prompt_without_instruction
    if bare is None:
        return None
    more = [part.strip() for part in SENTENCE.split(item.prompt) if part.strip() and part.strip() not in bare]
    return more[0] if len(more) == 1 and item.prompt.count(more[0]) == 1 else None


def _task(
    kind: str,
    name: str,
    in_prompt: bool,
    items: list[Item],
    pairs: int,
    tokens: int,
    lm: LM,
    store: Store,
    count: int,
) -> Task:
    chosen = items[:count]
    learn = queries("learn", more=True)[:pairs]
    phrasings = instruction_type(kind).phrasings("learn")
    lessons = _training_data(lm, store, kind, list(learn), phrasings, tokens)
    bare, instructed = [item.query for item in chosen], [item.instructed for item in chosen]
    twice = [f"{item.instructed} {item.phrase}" for item in chosen]
    tune = list(queries("tune")[:REFERENCE_PROMPTS])
    reference_prompts = (
        [f"{query} {phrasings[n % len(phrasings)]}" for n, query in enumerate(tune)] if in_prompt else tune
    )
    arms: Mapping[str, list[Any]] = (
        {PLAIN: instructed, TWICE: twice} if in_prompt else {PLAIN: bare, PROMPT: instructed, TWICE: twice}
    )
    return Task(
        name=name,
        about=f"answers that follow {kind}"
        + (", which the prompt asks for" if in_prompt else ", which isn't asked for"),
        unit="share",
        items=tuple(item.name for item in chosen),
        groups=tuple(item.name for item in chosen),
        prompted=(TWICE,) if in_prompt else (PROMPT, TWICE),
        training_data=lessons,
        reference_prompts=tuple(reference_prompts),
        measure=by_answers(arms, lambda _, text, cut: float(follows_instruction(kind, text, cut)), tokens, bare),
        prompts=tuple(arms[PLAIN]),
        phrases=tuple(item.phrase for item in chosen) if in_prompt else (),
        reference_phrases=tuple(phrasings[n % len(phrasings)] for n in range(len(tune))) if in_prompt else (),
    )


def _training_data(
    lm: LM, store: Store, kind: str, learn: list[str], phrasings: list[str], tokens: int
) -> TrainingData:
    """Prompts with and without the instruction, and the model's own answers to both."""
    instructed = prompts(learn, phrasings)

    def write() -> list[list[Any]]:
        answers = lm.generate([*instructed, *learn], max_new_tokens=tokens, batch_size=BATCH)
        return [[answer.text, answer.finish_reason == "length"] for answer in answers]

    made = store.get_or_create("texts", kind, make=write)
    positive, negative = made[: len(learn)], made[len(learn) :]
    both = [
        (
            Pair(mine, other, query, "answers"),
            follows_instruction(kind, mine, cut) and not follows_instruction(kind, other, cut_other),
        )
        for query, (mine, cut), (other, cut_other) in zip(learn, positive, negative, strict=True)
        if mine.strip() and other.strip() and mine != other
    ]
    good = [pair for pair, right in both if right]
    kept = good if len(good) >= len(learn) // 3 else [pair for pair, _ in both]
    return TrainingData(
        pairs={"prompts": tuple(instruction_pairs(learn, phrasings)), "answers": tuple(kept)},
        contrast=(phrasings[0], PLAIN_ENDS[0]),
        teacher={
            "instruction": tuple(phrasings),
            "queries": tuple(learn),
            "check": lambda _, text, cut: follows_instruction(kind, text, cut),
            "tokens": tokens,
        },
    )
