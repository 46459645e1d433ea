"""The data of `trimtab tune`: an included instruction, or the user's own pairs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import TYPE_CHECKING

from trimtab.commands.instructions import instruction_dataset
from trimtab.errors import TrimtabError
from trimtab.text.pairs import Pair, as_texts, sides
from trimtab.text.shared_prompt import prompt_of, shared_side, with_system_apart

if TYPE_CHECKING:
    from trimtab.text.chat import Prompt
    from trimtab.tune.split import Split

LEARN_SHARE = 0.5
REPEAT = "combination:repeat_prompt"  # each query has its own check


@dataclass(frozen=True)
class Task:
    """Pairs to learn from, and texts to search on: base queries, the actual prompts, and those with the instruction."""

    title: str
    pairs: list[Pair]
    queries: list[str]
    prompts: Sequence[Prompt]
    instructed: Sequence[Prompt]


def instruction_task(instruction: str, with_it: bool, limit: int | None) -> Task:
    """The package's queries: `learn` to learn from, `tune` to search and confirm on."""
    from trimtab.data import prompts, queries

    sentence = instruction.strip()
    lesson = instruction_dataset(sentence, queries("learn"))
    base = list(queries("tune")[:limit])
    instructed = prompts(base, [sentence])
    return Task(f'"{sentence}"', list(lesson.pairs), base, instructed if with_it else base, instructed)


def prompt_task(pairs: list[Pair], with_it: bool, limit: int | None, seed: int, source: str) -> Task:
    """A file's pairs, split by the prompt without the instruction: some to learn from, the others to search on."""
    from trimtab.tune.split import split_by_query

    if pairs[0].shape not in ("prompts", "texts"):
        raise TrimtabError(
            f"{source} holds pairs of {pairs[0].shape}; tune takes pairs of prompts with and without an instruction,"
            " pairs of answers, or multiple-choice pairs"
        )
    texts = [as_texts(pair, "tune") for pair in pairs]
    split = split_by_query([base for _, _, base in texts], held_out=1 - LEARN_SHARE, seed=seed)
    rest = [texts[i] for i in split.held_out][:limit]
    instructed, base = [with_ for _, with_, _ in rest], [without for _, _, without in rest]
    return Task(source, [pairs[i] for i in split.search], base, instructed if with_it else base, instructed)


def answer_task(pairs: list[Pair], limit: int | None, seed: int, source: str) -> Task:
    """Pairs of answers: some to learn from; the prompts of the others are answered by the model and checked.

    The model is given what both sides' prompts share: a system message of the positive side alone would already ask for
    what the steering is to do.
    """
    from trimtab.tune.split import split_by_query

    shared = [shared_side(*map(with_system_apart, sides(pair))) for pair in pairs]
    prompts = [side.prompt for side in shared]
    if not all(prompt and (isinstance(prompt, str) or prompt[-1][0] != "system") for prompt in prompts):
        raise TrimtabError(
            f"{source} has answers without a prompt, and tune generates from prompts; give each pair one"
        )
    queries = [prompt if isinstance(prompt, str) else prompt[-1][1] for prompt in prompts]
    split = split_by_query(queries, held_out=1 - LEARN_SHARE, seed=seed)
    rest = list({queries[i]: i for i in reversed(split.held_out)}.values())[::-1][:limit]  # each prompt once
    questions = [prompt_of(shared[i]) for i in rest]
    return Task(source, [pairs[i] for i in split.search], [queries[i] for i in rest], questions, questions)


def check_behaviour(shape: str, operation: str, with_instruction: bool) -> None:
    """Raise `TrimtabError` for options that don't apply to pairs of answers."""
    if operation == "project":
        raise TrimtabError(
            f"--operation project is for pairs of prompts; what is learned from pairs of {shape} is added"
        )
    if not with_instruction:
        raise TrimtabError(f"pairs of {shape} have no instruction in their prompts; leave --without-instruction out")


def held_out_warnings(task: Task, seed: int) -> list[str]:
    """Why the data can't give a verdict, whatever the search finds: too few prompts for the final test."""
    from trimtab.tune.feasibility import held_out_warning

    warning = held_out_warning(len(_split(task, seed).held_out))
    return [] if warning is None else [warning]


def budget_warnings(task: Task, candidates: int, seed: int, tokens_each: int, budget: int | None) -> list[str]:
    """Why a token budget can hardly give a verdict. Raises `TrimtabError` for one that can't even begin."""
    from trimtab.tune.feasibility import budget_warning, check_token_budget
    from trimtab.tune.halving import ladder

    split = _split(task, seed)
    check_token_budget(candidates, len(split.held_out), tokens_each, budget)
    rungs = ladder(candidates, len(split.search))
    warning = budget_warning(candidates, rungs, len(split.held_out), tokens_each, budget)
    return [] if warning is None else [warning]


def _split(task: Task, seed: int) -> Split:
    """The split that the search will make."""
    from trimtab.tune.split import split_by_query
    from trimtab.tune.tune import HELD_OUT

    return split_by_query(task.queries, held_out=HELD_OUT, seed=seed)


def letter_task(pairs: list[Pair], limit: int | None, seed: int, source: str) -> Task:
    """Multiple-choice pairs: some to learn from, and the questions of the others."""
    from trimtab.tune.letters import check_one_question
    from trimtab.tune.split import split_by_query

    check_one_question(pairs)
    questions = [str(pair.prompt) for pair in pairs]
    split = split_by_query(questions, held_out=1 - LEARN_SHARE, seed=seed)
    questions = [questions[i] for i in split.held_out][:limit]
    return Task(source, [pairs[i] for i in split.search], questions, questions, questions)


def select_search_pairs(pairs: list[Pair], task: Task) -> list[Pair]:
    """The pairs whose questions are searched on."""
    questions = set(task.queries)
    return [pair for pair in pairs if pair.prompt in questions]


def check_of(instruction: str) -> tuple[str | None, str | None, str | None]:
    """The check for an instruction that the package knows: a name, or a type and kwargs."""
    from trimtab.data import instructions, recognise
    from trimtab.evaluate.constraints import CONSTRAINTS

    phrasings = {
        text.lower(): name
        for name, instruction_set in instructions().items()
        if name in CONSTRAINTS
        for text in (*instruction_set.learn, *instruction_set.test)
    }
    close = difflib.get_close_matches(instruction.strip().lower(), phrasings, n=1, cutoff=0.9)
    if close:
        return phrasings[close[0]], None, None
    recognised = recognise(instruction)
    if recognised is None or recognised.type.name == REPEAT:
        return None, None, None
    return None, recognised.type.name, dumps(recognised.type.arguments(recognised.values))
