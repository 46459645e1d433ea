"""Tasks of following an instruction on an answer's form, checked by IFEval's code: with it in the prompt, and without.

Methods learn from the package's queries and phrasings. The items are IFEval's own prompts with that one instruction, if
the data folder has them and the instruction is in them word for word, followed by the package's test queries.

Some types have parameters, such as a word or a number. In the prompt, each item has its own. Without the instruction in
the prompt nobody could know them, so all items and all that is learned from have the same; both are drawn by the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.bench.measures import by_answers
from trimtab.bench.store import Store
from trimtab.bench.tasks import BATCH, PLAIN, PROMPT, TWICE, Cost, Outline, Task, TrainingData
from trimtab.data import instruction_pairs, instruction_type, prompts, queries
from trimtab.data.types import Values, instruction_types
from trimtab.evaluate.constraints import count_bullets, is_bullets, is_json
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
"""The types that run by default, which a short answer can follow; the others are of the kind `MORE`."""
MORE = "more-instructions"
LENGTHS = ("length_constraints:number_words", "length_constraints:number_sentences")
FILE = Path("ifeval") / "ifeval_single_instr_format.jsonl"
REFERENCE_PROMPTS = 6
PROMPT_TOKENS = 60.0
"""The approximate number of tokens of a question with an instruction."""
PLAIN_ENDS = ("Answer as you usually do.", "Write it in the ordinary way.")
_type = cache(instruction_type)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Item:
    """A query, the instruction that is added to it or contained in it, the full prompt, and IFEval's arguments."""

    name: str
    query: str
    phrase: str
    instructed: str
    arguments: Mapping[str, Any]


def outlines(data: Path | None, pairs: int, tokens: int, seed: int) -> list[Outline]:
    """Two tasks per type: without the instruction in the prompt (a steering stands in for it), and with it.

    Those that run by default come first. Raises `TrimtabError` if IFEval's checkers aren't installed.
    """
    checkers()
    stored = read_ifeval(data / FILE) if data is not None and (data / FILE).is_file() else []
    built = []
    for kind in (*TYPES, *(name for name in instruction_types() if name not in TYPES)):
        for in_prompt in (False, True):
            items = _items(kind, stored, in_prompt, seed)
            name = f"{kind.partition(':')[2]}{' (said)' if in_prompt else ''}"
            make = partial(_task, kind, name, in_prompt, items, pairs, tokens, seed)
            arm = Cost(tokens, tokens + PROMPT_TOKENS)
            written = Cost(2 * tokens, 2 * PROMPT_TOKENS)
            sizes = 2 * (tokens + PROMPT_TOKENS), 2.0 * tokens, PROMPT_TOKENS
            built.append(
                Outline(
                    name,
                    "instructions" if kind in TYPES else MORE,
                    len(items),
                    arm,
                    written,
                    *sizes,
                    make,
                    instruction_in_prompt=in_prompt,
                )
            )
    return built


def follows_instruction(kind: str, text: str, cut: bool, arguments: Mapping[str, Any] | None = None) -> bool:
    """IFEval's loose verdict, with IFEval's arguments for this type.

    An answer that the token limit cut off is judged by its beginning, and isn't below a maximum length.
    """
    own_arguments = dict(arguments or {})
    if cut and kind == "startend:quotation":
        return text.strip().startswith('"')
    if cut and kind == "detectable_format:json_format":
        return is_json(text, cut=True)
    if cut and kind == "detectable_format:number_bullet_lists":
        most = own_arguments.get("num_bullets")
        return is_bullets(text, cut=True) and (most is None or count_bullets(text) <= most)
    if cut and kind in LENGTHS and own_arguments.get("relation") == "less than":
        return False
    return follows(kind, own_arguments, text, loose=True)


def values_for(kind: str, seed: int, number: int | None = None) -> Values:
    """Values of a type's parameters, drawn by the seed: for item `number`, or (`None`) the same for all items."""
    draw = random.Random(f"{kind} {seed}" if number is None else f"{kind} {seed} {number}")
    return {parameter.name: draw.choice(parameter.values) for parameter in _type(kind).parameters}


def _phrasings(kind: str, split: str, base: Sequence[str], varied: bool, seed: int) -> list[tuple[str, Values]]:
    """A phrasing for each query, and the values in it; `varied`: each query has its own."""
    phrased = []
    for n in range(len(base)):
        values = values_for(kind, seed, n if varied else None)
        phrasings = _type(kind).phrasings(split, values)
        phrased.append((phrasings[n % len(phrasings)], values))
    return phrased


def _items(kind: str, stored: Sequence[IFEvalItem], in_prompt: bool, seed: int) -> list[Item]:
    """IFEval's items, then the package's. Without the instruction in the prompt, all have the same arguments."""
    items = []
    base = queries("test", more=True)
    phrased = _phrasings(kind, "test", base, in_prompt, seed)
    for item in stored:
        if item.types == (kind,) and (phrase := _phrase(item)):
            assert item.prompt_without_instruction is not None
            query = item.prompt_without_instruction
            arguments = {name: value for name, value in item.kwargs[0].items() if value is not None}
            if in_prompt or arguments == _type(kind).arguments(values_for(kind, seed), query):
                items.append(Item(f"IFEval {item.item}", query, phrase, item.prompt, arguments))
    for n, (query, (phrase, values)) in enumerate(zip(base, phrased, strict=True)):
        arguments = _type(kind).arguments(values, query)
        items.append(Item(f"query {n + 1}", query, phrase, f"{query} {phrase}", arguments))
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
    seed: int,
    lm: LM,
    store: Store,
    count: int,
) -> Task:
    chosen = items[:count]
    learn = queries("learn", more=True)[:pairs]
    lessons = _training_data(lm, store, kind, list(learn), in_prompt, tokens, seed)
    bare, instructed = [item.query for item in chosen], [item.instructed for item in chosen]
    twice = [f"{item.instructed} {item.phrase}" for item in chosen]
    tune = list(queries("tune")[:REFERENCE_PROMPTS])
    reference_phrases = [phrase for phrase, _ in _phrasings(kind, "learn", tune, in_prompt, seed)]
    reference_prompts = prompts(tune, reference_phrases) if in_prompt else tune
    values = ", ".join(f"{name}: {value}" for name, value in values_for(kind, seed).items())
    arms: Mapping[str, list[Any]] = (
        {PLAIN: instructed, TWICE: twice} if in_prompt else {PLAIN: bare, PROMPT: instructed, TWICE: twice}
    )
    return Task(
        name=name,
        about=f"answers that follow {kind}"
        + (f" ({values})" if values and not in_prompt else "")
        + (", which the prompt asks for" if in_prompt else ", which isn't asked for"),
        unit="share",
        items=tuple(item.name for item in chosen),
        groups=tuple(item.name for item in chosen),
        prompted=(TWICE,) if in_prompt else (PROMPT, TWICE),
        training_data=lessons,
        reference_prompts=tuple(reference_prompts),
        measure=by_answers(
            arms,
            lambda i, text, cut: float(follows_instruction(kind, text, cut, chosen[i].arguments)),
            tokens,
            bare,
        ),
        prompts=tuple(arms[PLAIN]),
        phrases=tuple(item.phrase for item in chosen) if in_prompt else (),
        reference_phrases=tuple(reference_phrases) if in_prompt else (),
    )


def _training_data(
    lm: LM, store: Store, kind: str, learn: list[str], in_prompt: bool, tokens: int, seed: int
) -> TrainingData:
    """Prompts with and without the instruction, and the model's own answers to both.

    The parameters of the instruction vary from query to query if the prompts of the task contain it.
    """
    has_parameters = bool(_type(kind).parameters)
    phrased = _phrasings(kind, "learn", learn, in_prompt, seed)
    phrasings = [phrase for phrase, _ in phrased] if has_parameters else _type(kind).phrasings("learn")
    arguments = [_type(kind).arguments(values, query) for query, (_, values) in zip(learn, phrased, strict=True)]
    by_query = dict(zip(learn, arguments, strict=True))
    instructed = prompts(learn, phrasings)

    def write() -> list[list[Any]]:
        answers = lm.generate([*instructed, *learn], max_new_tokens=tokens, batch_size=BATCH)
        return [[answer.text, answer.finish_reason == "length"] for answer in answers]

    made = store.get_or_create("texts", kind, *(["said"] if has_parameters and in_prompt else []), make=write)
    positive, negative = made[: len(learn)], made[len(learn) :]
    both = [
        (
            Pair(mine, other, query, "answers"),
            follows_instruction(kind, mine, cut, by_query[query])
            and not follows_instruction(kind, other, cut_other, by_query[query]),
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
            # a query may be asked with another query's phrasing, and so with other values
            "check": None
            if has_parameters and in_prompt
            else lambda query, text, cut: follows_instruction(kind, text, cut, by_query[query]),
            "tokens": tokens,
        },
    )
